"""Which files make up a checkpoint: an index or a folder that says it wrong is refused in one line."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from blockscale import dequantize_checkpoint, inspect_checkpoint, quantize_checkpoint
from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.source import open_source
from tests import data

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.llama(), shards=2)


def _change_index(source, change):
    path = source / data.INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def _refusal(source):
    target = source.parent / "out"
    line = data.refusal(lambda: quantize_checkpoint(source, target), source, target)
    assert data.refusal(lambda: inspect_checkpoint(source), source) == line
    return line


def test_a_file_that_the_index_names_but_is_absent(source):
    (source / SECOND).unlink()
    assert _refusal(source) == (
        f"{source}/{data.INDEX}: 1 of 2 files that the index names are absent (got no {SECOND}); "
        "fetch the missing files"
    )


def test_a_file_that_is_a_dangling_link(source):
    (source / SECOND).rename(source / "elsewhere")
    (source / SECOND).symlink_to(source / "nowhere")
    assert "1 of 2 files that the index names are absent" in _refusal(source)


@pytest.mark.parametrize(
    "path",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        ".x.safetensors",
        "",
        "x.bin",
        "a\\b.safetensors",
    ],
)
def test_an_index_that_leads_out_of_the_folder(source, path):
    (source.parent / "x.safetensors").write_bytes((source / FIRST).read_bytes())
    _change_index(source, lambda index: index["weight_map"].update({NORM: path}))
    assert _refusal(source) == (
        f"{source}/{data.INDEX}: index names what is no safetensors file of this folder "
        f"(got {NORM} -> {path!r})"
    )


def test_file_names_with_spaces_are_names_like_any_other(tmp_path):
    model = data.llama()
    source = data.write(
        tmp_path / "source", model, shards=dict.fromkeys(model.tensors, "my model (1).safetensors")
    )
    quantize_checkpoint(source, tmp_path / "out")
    assert data.read(tmp_path / "out").keys() > model.tensors.keys()


def test_a_tensor_in_two_shards(source):
    tensors = data.read(source)
    save_file({NORM: tensors[NORM], "more": torch.zeros(1)}, source / "model-00003-of-00002.safetensors")
    _change_index(source, lambda index: index["weight_map"].update(more="model-00003-of-00002.safetensors"))
    assert _refusal(source) == (
        f"{NORM}: tensor is in two files (got {FIRST} and model-00003-of-00002.safetensors)"
        if NORM in _names(source / FIRST)
        else f"{NORM}: tensor is in two files (got {SECOND} and model-00003-of-00002.safetensors)"
    )


def _names(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_a_tensor_that_is_in_the_index_but_in_no_file(source):
    _change_index(source, lambda index: index["weight_map"].update(ghost=FIRST))
    assert (
        _refusal(source)
        == f"ghost: tensor is not in the file the index names (expected {FIRST}, got no file has it)"
    )


def test_a_tensor_that_is_in_another_file_than_the_index_says(source):
    real = json.loads((source / data.INDEX).read_text())["weight_map"][NORM]
    wrong = FIRST if real == SECOND else SECOND
    _change_index(source, lambda index: index["weight_map"].update({NORM: wrong}))
    assert (
        _refusal(source)
        == f"{NORM}: tensor is not in the file the index names (expected {wrong}, got {real})"
    )


def test_a_tensor_that_is_in_a_file_but_not_in_the_index(source):
    file = json.loads((source / data.INDEX).read_text())["weight_map"][NORM]
    _change_index(source, lambda index: index["weight_map"].pop(NORM))
    assert _refusal(source) == (
        f"{file}: 1 tensors are in the files but not in the index (got {NORM}); "
        "rebuild the index: which tensors count is not for the converter to guess"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"{",
            "is not JSON (got Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        ),
        (
            b"\xff\xfe",
            "is not JSON (got 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte)",
        ),
        (b"[" * 100_000, "is not JSON (got maximum recursion depth exceeded"),
        (b"[]", "is not a JSON object (got list)"),
        (b"{}", "index has no weight_map of file names"),
        (b'{"weight_map": []}', "index has no weight_map of file names"),
        (b'{"weight_map": {"a": 1}}', "index has no weight_map of file names"),
        (b'{"weight_map": {"a": "b", "a": "c"}}', "duplicate key (got 'a')"),
        (b'{"weight_map": {}, "metadata": [1]}', "index metadata is not a JSON object"),
        (b'{"weight_map": {}}', "no tensor would be quantized"),
    ],
)
def test_an_index_that_is_none(source, content, message):
    (source / data.INDEX).write_bytes(content)
    target = source.parent / "out"
    line = data.refusal(lambda: quantize_checkpoint(source, target), source, target)
    assert line.removeprefix(f"{source}/{data.INDEX}: ").startswith(message)


def test_several_files_without_an_index(source):
    (source / data.INDEX).unlink()
    assert _refusal(source) == (
        f"{source}: 2 safetensors files and no {data.INDEX} to say which belong together"
    )


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert data.refusal(lambda: inspect_checkpoint(tmp_path), tmp_path) == (
        f"{tmp_path}: no safetensors checkpoint in the folder "
        f"(expected model.safetensors or {data.INDEX}, got 1 other files)"
    )


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_are_named_and_never_opened(tmp_path):
    source = data.write(tmp_path / "source", data.llama())
    (source / "model.safetensors").unlink()
    sprung = tmp_path / "sprung"
    for name in ("pytorch_model.bin", "consolidated.pth"):
        (source / name).write_bytes(pickle.dumps(_Trap(str(sprung))))
    assert _refusal(source) == (
        f"{source}: no safetensors checkpoint in the folder (expected model.safetensors or {data.INDEX}, "
        "got consolidated.pth, which is pickled and never opened); "
        "save the model with save_pretrained of transformers first"
    )
    assert not sprung.exists()
    pickle.loads((source / "pytorch_model.bin").read_bytes()).close()
    assert sprung.exists(), "the trap works"


def test_a_file_instead_of_a_folder(tmp_path):
    source = data.write(tmp_path / "source", data.llama())
    path = source / "model.safetensors"
    line = data.refusal(lambda: quantize_checkpoint(path, tmp_path / "out"), source, tmp_path / "out")
    assert line == f"{path}: is a file (expected a checkpoint folder)"


def test_a_folder_that_is_absent(tmp_path):
    path = tmp_path / "absent"
    line = data.refusal(lambda: quantize_checkpoint(path, tmp_path / "out"), path, tmp_path / "out")
    assert line == f"{path}: no such folder (expected a folder, a Hub repo id or an fsspec URL)"


def test_no_config(source):
    (source / "config.json").unlink()
    assert _refusal(source) == f"{source}/config.json: no config.json; fetch it: it says which model this is"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON (got Expecting value: line 1 column 1 (char 0)); fetch the file again"),
        (b"{'model_type': 'llama'}", "is not JSON (got Expecting property name"),
        (b"\xff{}", "is not JSON (got 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "is not JSON (got maximum recursion depth exceeded"),
        (b"[]", "is not a JSON object (got list)"),
        (b'{"quantization_config": "fp8"}', "quantization_config is not a JSON object (got 'fp8')"),
        (b'{"compression_config": ["fp8"]}', "compression_config is not a JSON object (got ['fp8'])"),
    ],
)
def test_a_config_that_is_none(source, content, message):
    (source / "config.json").write_bytes(content)
    target = source.parent / "out"
    for convert in (quantize_checkpoint, dequantize_checkpoint):
        line = data.refusal(lambda convert=convert: convert(source, target), source, target)
        assert line.startswith(f"{source}/config.json: {message}")


def test_the_index_wins_over_files_it_does_not_name(source):
    save_file({"stray": torch.zeros(2)}, source / "model.safetensors")
    assert "stray" not in read_index(open_source(source)).tensors


def test_an_index_of_another_name_and_a_single_file_of_another_name(tmp_path):
    model = data.llama()
    source = data.write(tmp_path / "a", model, shards=2)
    (source / data.INDEX).rename(source / "weights.safetensors.index.json")
    quantize_checkpoint(source, tmp_path / "a8")
    assert (tmp_path / "a8" / data.INDEX).exists()
    assert not (tmp_path / "a8" / "weights.safetensors.index.json").exists()
    source = data.write(tmp_path / "b", model, file="weights.safetensors")
    quantize_checkpoint(source, tmp_path / "b8")
    sharded, single = data.read(tmp_path / "a8"), data.read(tmp_path / "b8")
    assert sharded.keys() == single.keys() > model.tensors.keys()
    for name, tensor in single.items():
        assert torch.equal(tensor.view(torch.uint8), sharded[name].view(torch.uint8))
