"""What quantizing writes: bitwise what the reference quantizer says, whatever shards and threads."""

import json

import pytest
import torch
from safetensors import safe_open

from blockscale import Recipe, RunOptions, quantize_checkpoint, reference
from blockscale.checkpoint import strips
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _is_linear(name):
    return "_proj" in name and "eh_proj" not in name and "bias" not in name


def _check(folder, model, block_size=(128, 128), scale_fmt="float32"):
    """Every projection of the model is quantized in `folder`, everything else is there bit for bit."""
    got = data.read(folder)
    linear = {name for name in model.tensors if _is_linear(name)}
    assert linear
    assert got.keys() == model.tensors.keys() | {f"{name}_scale_inv" for name in linear}
    for name, tensor in model.tensors.items():
        if name in linear:
            codes, scale = reference.quantize_weight(tensor, block_size, scale_fmt)
            assert_bitwise_equal(got[name], codes, name)
            assert_bitwise_equal(got[f"{name}_scale_inv"], scale, f"{name}_scale_inv")
        else:
            assert_bitwise_equal(got[name], tensor, name)


@pytest.mark.parametrize("shards", [None, 1, 3])
@pytest.mark.parametrize("make", [data.llama, data.deepseek_v3])
def test_codes_and_scales_are_those_of_the_reference(tmp_path, make, shards):
    model = make()
    source = data.write(tmp_path / "source", model, shards)
    before = data.snapshot(source)
    quantize_checkpoint(source, tmp_path / "out")
    _check(tmp_path / "out", model)
    assert data.snapshot(source) == before


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("block_size", [(128, 128), (64, 64), (1, 128), (32, 48), (1000, 1000)])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_every_source_dtype_block_size_and_scale_format(tmp_path, dtype, block_size, scale_fmt):
    model = data.llama(dtype=dtype)
    source = data.write(tmp_path / "source", model)
    quantize_checkpoint(source, tmp_path / "out", Recipe(scale_fmt, block_size))
    _check(tmp_path / "out", model, block_size, scale_fmt)
    quantization = data.read_config(tmp_path / "out")["quantization_config"]
    assert quantization["weight_block_size"] == list(block_size)
    assert quantization.get("scale_fmt") == ("ue8m0" if scale_fmt == "ue8m0" else None)
    assert ("scale_fmt" in quantization) == (scale_fmt == "ue8m0")


def test_a_width_of_576_has_a_remainder_block_of_64_at_the_end(tmp_path):
    model = data.llama(hidden=576, intermediate=1536)
    quantize_checkpoint(data.write(tmp_path / "source", model), tmp_path / "out")
    _check(tmp_path / "out", model)
    got = data.read(tmp_path / "out")
    assert got["model.layers.0.self_attn.q_proj.weight_scale_inv"].shape == (5, 5)
    assert got["model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (5, 12)


@pytest.mark.parametrize(("model_type", "axes"), [("qwen3_moe", "nk"), ("gpt_oss", "kn")])
def test_fused_experts_have_blocks_of_their_own_on_the_axes_of_their_model_type(tmp_path, model_type, axes):
    model = data.fused_experts(model_type, axes)
    quantize_checkpoint(data.write(tmp_path / "source", model), tmp_path / "out", Recipe(block_size=(32, 16)))
    got = data.read(tmp_path / "out")
    stored = (32, 16) if axes == "nk" else (16, 32)
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        tensor = model.tensors[name]
        sides = (-(-tensor.shape[1] // stored[0]), -(-tensor.shape[2] // stored[1]))
        assert got[f"{name}_scale_inv"].shape == (3, *sides)
        for expert in range(3):
            codes, scale = reference.quantize_weight(tensor[expert], stored)
            assert_bitwise_equal(got[name][expert], codes, f"{name} expert {expert}")
            assert_bitwise_equal(got[f"{name}_scale_inv"][expert], scale, f"{name} expert {expert} scale")
        assert_bitwise_equal(got[f"{name}_bias"], model.tensors[f"{name}_bias"])


def test_fused_experts_of_an_unknown_model_type_are_kept(tmp_path):
    model = data.fused_experts("brand_new", "nk")
    report = quantize_checkpoint(data.write(tmp_path / "source", model), tmp_path / "out")
    got = data.read(tmp_path / "out")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert_bitwise_equal(got[name], model.tensors[name])
    assert "model.layers.0.mlp.experts" in _skip(tmp_path / "out")
    assert report.warnings == (
        "model_type 'brand_new' is not known: only weights that are linear layers by their name are "
        "quantized; --dry-run shows how many",
    )


def _skip(folder):
    return data.read_config(folder)["quantization_config"]["modules_to_not_convert"]


def test_tensors_of_other_dtypes_and_empty_tensors_pass_through(tmp_path):
    prefix = "model.layers.0.self_attn."
    more = {
        f"{prefix}rotary.inv_freq": torch.linspace(0, 1, 7, dtype=torch.float64),
        f"{prefix}mask": torch.tensor([[True, False, True]]),
        f"{prefix}ids": torch.tensor([-1, 2**62]),
        f"{prefix}small": torch.tensor([-3, 3], dtype=torch.int8),
        f"{prefix}phase": torch.tensor([1 + 2j]),
        f"{prefix}half": torch.tensor([1.5], dtype=torch.float16),
        f"{prefix}scalar": torch.tensor(2.5),
        f"{prefix}none.weight": torch.empty(0, 64, dtype=BF16),
        "model.layers.0.mlp.experts.down_proj": torch.empty(0, 8, 8, dtype=BF16),
        "model.layers.1.self_attn.o_proj.weight": torch.empty(64, 0, dtype=BF16),
    }
    model = data.llama().changed(more)
    source = data.write(tmp_path / "source", model, shards=2)
    quantize_checkpoint(source, tmp_path / "out")
    got = data.read(tmp_path / "out")
    for name, tensor in more.items():
        assert_bitwise_equal(got[name], tensor, name) if tensor.numel() else None
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert f"{name}_scale_inv" not in got


def test_zeros_get_scale_one_and_tiny_weights_keep_their_values(tmp_path):
    model = data.llama()
    q, k = (f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qk")
    model = model.changed({q: torch.zeros(192, 192, dtype=BF16), k: model.tensors[k] * 2.0**-100})
    quantize_checkpoint(data.write(tmp_path / "source", model), tmp_path / "out")
    _check(tmp_path / "out", model)
    got = data.read(tmp_path / "out")
    assert torch.equal(got[f"{q}_scale_inv"], torch.ones(2, 2))
    assert not got[q].float().any()
    assert got[k].float().abs().max() == 448


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("chunk", [100, 5000, 8 << 20])
def test_the_bytes_depend_on_no_thread_and_no_strip(tmp_path, monkeypatch, workers, chunk):
    source = data.write(tmp_path / "source", data.deepseek_v3(), shards=3)
    quantize_checkpoint(source, tmp_path / "whole", Recipe("ue8m0", (32, 48)), run=RunOptions(workers=2))
    monkeypatch.setattr(strips, "CHUNK_BYTES", chunk)
    quantize_checkpoint(
        source, tmp_path / "strips", Recipe("ue8m0", (32, 48)), run=RunOptions(workers=workers)
    )
    assert data.contents(tmp_path / "strips") == data.contents(tmp_path / "whole")


def test_shards_keep_their_names_and_metadata_and_the_index_its_own(tmp_path):
    model = data.llama(layers=2)
    source = data.write(
        tmp_path / "source", model, 3, metadata={"origin": "é", "format": "pt"}, index_metadata={"note": [1]}
    )
    report = quantize_checkpoint(source, tmp_path / "out")
    out = tmp_path / "out"
    assert {path.name for path in source.glob("*.safetensors")} == {p.name for p in out.glob("*.safetensors")}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"origin": "é", "format": "pt"}
            weights = {name.removesuffix("_scale_inv") for name in sorted(file.keys())}
        with safe_open(source / path.name, "pt") as file:
            assert weights == set(file.keys())
    index = json.loads((out / data.INDEX).read_text())
    total = sum(tensor.nbytes for tensor in data.read(out).values())
    assert index["metadata"] == {"total_size": total, "note": [1]}
    assert list(index["weight_map"]) == sorted(data.read(out))
    assert report.output_bytes == total
    assert report.input_bytes == sum(tensor.nbytes for tensor in model.tensors.values())
    assert (report.shards, report.resumed_shards, report.already_complete) == (3, 0, False)
    assert report.tensors == {"copy": 7, "quantize": 14}


def test_a_single_file_stays_one_without_an_index(tmp_path):
    source = data.write(tmp_path / "source", data.llama(), file="my-model.safetensors", metadata={})
    quantize_checkpoint(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "transformers refuses a file without the format"


def test_the_skip_list_of_deepseek_v3_is_exact(tmp_path):
    quantize_checkpoint(data.write(tmp_path / "source", data.deepseek_v3()), tmp_path / "out")
    assert data.read_config(tmp_path / "out")["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [
            "lm_head",
            "model.layers.1.mlp.gate",
            "model.layers.2.eh_proj",
            "model.layers.2.mlp.gate",
            "model.layers.2.shared_head.head",
        ],
    }


def test_a_head_tied_to_the_embedding_is_on_the_skip_list(tmp_path):
    quantize_checkpoint(data.write(tmp_path / "source", data.llama(tied=True)), tmp_path / "out")
    assert _skip(tmp_path / "out") == ["lm_head"]
    assert "lm_head.weight" not in data.read(tmp_path / "out")


def test_a_complete_result_is_left_alone(tmp_path):
    source = data.write(tmp_path / "source", data.llama(), shards=2)
    quantize_checkpoint(source, tmp_path / "out")
    before = data.snapshot(tmp_path / "out")
    report = quantize_checkpoint(source, tmp_path / "out")
    assert report.already_complete
    assert data.snapshot(tmp_path / "out") == before


def test_vision_towers_and_projectors_stay(tmp_path):
    model = data.llama()
    tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in model.tensors.items()}
    vision = "model.visual.blocks.0.attn.q_proj.weight"
    tensors |= {
        vision: data.weight(vision, 64, 64),
        "model.multi_modal_projector.q_proj.weight": data.weight("p", 64, 64),
    }
    config = {"model_type": "mistral3", "text_config": {**model.config, "model_type": "mistral"}}
    source = data.write(tmp_path / "source", data.Model(tensors, config))
    quantize_checkpoint(source, tmp_path / "out")
    got = data.read(tmp_path / "out")
    assert got[vision].dtype == BF16
    assert {name for name, t in got.items() if t.dtype == torch.float8_e4m3fn} == {
        name for name in tensors if name.startswith("model.language_model.layers") and "_proj" in name
    }
    assert vision.removesuffix(".weight") in _skip(tmp_path / "out")
    assert "model.multi_modal_projector.q_proj" in _skip(tmp_path / "out")
