"""Files beside the weights: carried byte for byte, but no weights of other formats; config.json in order."""

import hashlib
import json
import os

import pytest

from blockscale import dequantize_checkpoint, quantize_checkpoint, verify_checkpoint
from tests import data

OTHER_WEIGHTS = (
    "pytorch_model.bin",
    "consolidated.00.pth",
    "x.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "m.onnx",
    "m.onnx_data",
    "weights.npz",
    "rust_model.ot",
    "m.tflite",
)


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.llama(), shards=2)


def test_every_other_file_is_carried_byte_for_byte(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out")
    got = data.contents(tmp_path / "out")
    for name, content in data.CARRIED.items():
        assert got.pop(name) == content
    assert got.keys() == {
        *("blockscale.json", "config.json", data.INDEX),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }


def test_links_are_carried_as_the_files_they_lead_to(source, tmp_path):
    (tmp_path / "blobs").mkdir()
    for name in ("tokenizer.json", "model-00001-of-00002.safetensors", "config.json"):
        (source / name).rename(tmp_path / "blobs" / name)
        (source / name).symlink_to(f"../blobs/{name}")
    quantize_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == data.CARRIED["tokenizer.json"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert verify_checkpoint(tmp_path / "out", source).ok


def test_links_to_folders_are_followed_once(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "page.md").write_bytes(b"text")
    (tmp_path / "elsewhere" / "back").symlink_to(source)
    (source / "docs").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(".")
    quantize_checkpoint(source, tmp_path / "out")
    got = data.contents(tmp_path / "out")
    assert got["docs/page.md"] == b"text"
    assert not any(name.startswith(("docs/back", "loop")) for name in got)


def test_weights_of_other_formats_and_hidden_files_stay_behind(source, tmp_path):
    for name in (*OTHER_WEIGHTS, ".gitattributes", ".cache/x", "original/consolidated.00.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"\x80\x04junk")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    quantize_checkpoint(source, tmp_path / "out")
    assert data.contents(tmp_path / "out").keys() == {
        *("blockscale.json", "config.json", data.INDEX, *data.CARRIED),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }


def test_a_file_name_that_is_no_unicode_is_carried(source, tmp_path):
    odd = os.fsdecode(b"caf\xe9.txt")
    try:
        (source / odd).write_bytes(b"1")
    except OSError:
        pytest.skip("the filesystem takes Unicode names only")
    quantize_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / odd).read_bytes() == b"1"
    assert verify_checkpoint(tmp_path / "out", source).ok


def test_a_pipe_in_the_folder_is_no_file(source, tmp_path):
    os.mkfifo(source / "pipe")
    quantize_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out" / "pipe").exists()


def test_the_config_keeps_its_keys_in_order_and_gains_the_quantization(tmp_path):
    model = data.llama().changed(
        {}, zeta=[1, {"b": None, "a": 1e-6}], alpha="é\U0001f600", auto_map={"A": "m.A"}
    )
    source = data.write(tmp_path / "source", model)
    quantize_checkpoint(source, tmp_path / "out")
    result = data.read_config(tmp_path / "out")
    assert list(result) == [*model.config, "quantization_config"]
    del result["quantization_config"]
    assert result == model.config


def test_the_manifest_holds_the_checksum_of_every_file_and_tensor(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "blockscale.json").read_text())
    files = data.contents(tmp_path / "out")
    assert manifest["files"] == {
        name: hashlib.sha256(files[name]).hexdigest() for name in (*data.CARRIED, "config.json", data.INDEX)
    }
    import torch

    assert manifest["tensors"] == {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in data.read(tmp_path / "out").items()
    }


def test_the_manifest_of_a_source_is_replaced(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "fp8")
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back")
    manifest = json.loads((tmp_path / "back" / "blockscale.json").read_text())
    assert manifest["command"] == "dequantize"
    assert verify_checkpoint(tmp_path / "back", tmp_path / "fp8").ok
    for name, content in data.CARRIED.items():
        assert (tmp_path / "back" / name).read_bytes() == content
