"""What dequantizing writes (bitwise the reference), and every scale or code that it refuses."""

import dataclasses
import json

import pytest
import torch

from blockscale import RunOptions, dequantize_checkpoint, quantize_checkpoint, reference, verify_checkpoint
from blockscale.checkpoint import strips
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

BF16, F16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
NAMES = {"BF16": BF16, "F16": F16, "F32": F32}
Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
OUT = "model.layers.0.self_attn.o_proj.weight"


def _check(folder, quantized, block_size=(128, 128), dtype=BF16):
    got = data.read(folder)
    scales = {f"{name}_scale_inv" for name, t in quantized.tensors.items() if t.dtype == FP8}
    assert got.keys() == quantized.tensors.keys() - scales
    for name, tensor in got.items():
        source = quantized.tensors[name]
        if source.dtype == FP8:
            scale = quantized.tensors[f"{name}_scale_inv"].float()
            assert_bitwise_equal(tensor, reference.dequantize_weight(source, scale, block_size, dtype), name)
        else:
            assert_bitwise_equal(tensor, source, name)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("block_size", [(128, 128), (64, 64), (1, 128)])
def test_values_are_those_of_the_reference(tmp_path, block_size, dtype):
    quantized = data.in_fp8(data.llama(), block_size=block_size)
    source = data.write(tmp_path / "source", quantized)
    before = data.snapshot(source)
    dequantize_checkpoint(source, tmp_path / "out", dtype=dtype)
    _check(tmp_path / "out", quantized, block_size, NAMES[dtype])
    assert data.snapshot(source) == before


@pytest.mark.parametrize("chunk", [100, 8 << 20])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_deepseek_checkpoint_in_shards(tmp_path, monkeypatch, workers, chunk):
    monkeypatch.setattr(strips, "CHUNK_BYTES", chunk)
    quantized = data.in_fp8(data.deepseek_v3(), block_size=(32, 48), scale_fmt="ue8m0")
    source = data.write(tmp_path / "source", quantized, shards=3)
    dequantize_checkpoint(source, tmp_path / "out", run=RunOptions(workers=workers))
    _check(tmp_path / "out", quantized, (32, 48))


@pytest.mark.parametrize("dtype", [BF16, F16, torch.float8_e8m0fnu])
def test_scales_of_other_dtypes(tmp_path, dtype):
    quantized = data.in_fp8(data.llama(), scale_fmt="ue8m0")
    scales = {name: t.to(dtype) for name, t in quantized.tensors.items() if name.endswith("_scale_inv")}
    quantized = quantized.changed(scales)
    dequantize_checkpoint(data.write(tmp_path / "source", quantized), tmp_path / "out")
    _check(tmp_path / "out", quantized)


def test_scales_lie_in_other_shards_than_their_weights_and_a_shard_of_scales_alone_is_left_out(tmp_path):
    quantized = data.in_fp8(data.llama())
    shards = {
        name: f"{'scales' if name.endswith('_scale_inv') else 'weights'}.safetensors"
        for name in quantized.tensors
    }
    dequantize_checkpoint(data.write(tmp_path / "source", quantized, shards), tmp_path / "out")
    _check(tmp_path / "out", quantized)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["weights.safetensors"]


@pytest.mark.parametrize(("model_type", "axes"), [("qwen3_moe", "nk"), ("gpt_oss", "kn")])
def test_fused_experts(tmp_path, model_type, axes):
    model, stored = data.fused_experts(model_type, axes), (32, 16) if axes == "nk" else (16, 32)
    experts = [f"model.layers.0.mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down")]
    quantized = data.in_fp8(model, experts, block_size=stored)
    quantized.config["quantization_config"]["weight_block_size"] = [32, 16]
    dequantize_checkpoint(data.write(tmp_path / "source", quantized), tmp_path / "out")
    _check(tmp_path / "out", quantized, stored)


def test_empty_fp8_tensors(tmp_path):
    empty = {
        "model.layers.0.a_proj.weight": (0, 192),
        "model.layers.0.b_proj": (0, 8, 8),
        "c_proj.weight": (5, 0),
    }
    more = {name: torch.empty(shape).to(FP8) for name, shape in empty.items()}
    grids = {
        "model.layers.0.a_proj.weight": (0, 2),
        "model.layers.0.b_proj": (0, 1, 1),
        "c_proj.weight": (1, 0),
    }
    more |= {f"{name}_scale_inv": torch.empty(shape) for name, shape in grids.items()}
    quantized = data.in_fp8(data.llama()).changed(more)
    dequantize_checkpoint(data.write(tmp_path / "source", quantized), tmp_path / "out")
    got = data.read(tmp_path / "out")
    assert {name: tuple(got[name].shape) for name in empty} == empty
    assert all(got[name].dtype == BF16 for name in empty)


def test_quantizing_and_back_gives_the_dequantized_values_and_the_original_config(tmp_path):
    model = data.deepseek_v3()
    source = data.write(tmp_path / "source", model, shards=2)
    quantize_checkpoint(source, tmp_path / "fp8")
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back")
    assert data.read_config(tmp_path / "back") == model.config
    got = data.read(tmp_path / "back")
    for name, tensor in model.tensors.items():
        expected = tensor
        if "_proj" in name and "eh_proj" not in name:
            expected = reference.dequantize_weight(*reference.quantize_weight(tensor))
        assert_bitwise_equal(got[name], expected, name)


@pytest.mark.parametrize("dtype", [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_the_config_loses_its_quantization_and_names_the_new_dtype(tmp_path, dtype):
    quantized = data.in_fp8(data.llama())
    config = {
        "dtype": "x",
        **quantized.config,
        "compression_config": {},
        "last": {"nested": [1.5, None, "é"]},
    }
    source = data.write(tmp_path / "source", dataclasses.replace(quantized, config=config))
    dequantize_checkpoint(source, tmp_path / "out", dtype=dtype[0])
    result = data.read_config(tmp_path / "out")
    expected = {
        key: value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }
    assert result == expected | {"dtype": dtype[1], "torch_dtype": dtype[1]}
    assert list(result) == list(expected), "in the order of the source"


def _refusal(tmp_path, model, shards=None, **options):
    source = data.write(tmp_path / "source", model, shards)
    target = tmp_path / "out"
    return data.refusal(lambda: dequantize_checkpoint(source, target, **options), source, target)


def test_missing_scales_are_all_named(tmp_path):
    quantized = data.in_fp8(data.llama()).changed({f"{Q}_scale_inv": None, f"{OUT}_scale_inv": None})
    assert _refusal(tmp_path, quantized) == (
        f"2 of 7 FP8 weights have no scale (expected {OUT}_scale_inv beside {OUT}, got none for {OUT}, {Q}); "
        "fetch the missing shard, or keep them as raw FP8 with --on-missing-scale keep"
    )


def test_weights_without_a_scale_can_be_kept_and_that_is_recorded(tmp_path):
    quantized = data.in_fp8(data.llama()).changed({f"{Q}_scale_inv": None})
    source = data.write(tmp_path / "source", quantized, shards=2)
    report = dequantize_checkpoint(source, tmp_path / "out", on_missing_scale="keep")
    assert report.warnings == (f"{Q}: no scale; kept as raw FP8, which is not usable as a weight",)
    got = data.read(tmp_path / "out")
    assert_bitwise_equal(got[Q], quantized.tensors[Q])
    assert got[OUT].dtype == BF16
    config = data.read_config(tmp_path / "out")
    assert config["blockscale"] == {"kept_fp8_without_scale": [Q.removesuffix(".weight")]}
    assert "quantization_config" not in config
    found = verify_checkpoint(tmp_path / "out", source)
    assert found.ok
    (problem,) = found.problems
    assert str(problem).startswith(f"warning: {Q}: raw FP8 without a scale")
    config["blockscale"]["kept_fp8_without_scale"] = []
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert not verify_checkpoint(tmp_path / "out").ok


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2, 1), (4,), (3, 3)])
def test_a_scale_grid_of_another_shape(tmp_path, shape):
    quantized = data.in_fp8(data.llama()).changed({f"{Q}_scale_inv": torch.ones(shape)})
    assert _refusal(tmp_path, quantized) == (
        f"{Q}_scale_inv: scale grid does not fit the 128x128 blocks of config.json "
        f"(expected [2, 2] for weight [192, 192], got {list(shape)})"
    )


@pytest.mark.parametrize(("dtype", "name"), [(torch.int32, "I32"), (torch.float64, "F64"), (FP8, "F8_E4M3")])
def test_a_scale_of_a_wrong_dtype(tmp_path, dtype, name):
    quantized = data.in_fp8(data.llama()).changed({f"{Q}_scale_inv": torch.ones(2, 2).to(dtype)})
    line = _refusal(tmp_path, quantized)
    if dtype == FP8:
        assert line.startswith("1 of 8 FP8 weights have no scale")
    else:
        expected = "F32 | BF16 | F16 | F8_E8M0"
        assert line == f"{Q}_scale_inv: scale has a wrong dtype (expected {expected}, got {name})"


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number(tmp_path, value):
    scale = torch.ones(2, 2)
    scale[1, 0] = value
    quantized = data.in_fp8(data.llama()).changed({f"{Q}_scale_inv": scale})
    assert _refusal(tmp_path, quantized) == (
        f"{Q}_scale_inv in model.safetensors: 1 scales are not positive finite numbers "
        f"(got {value} at [1, 0])"
    )


def test_a_scale_without_its_weight_is_copied_with_a_warning(tmp_path):
    orphan = "model.layers.9.self_attn.q_proj.weight_scale_inv"
    quantized = data.in_fp8(data.llama()).changed({orphan: torch.ones(2, 2)})
    report = dequantize_checkpoint(data.write(tmp_path / "source", quantized), tmp_path / "out")
    assert report.warnings == (f"{orphan}: scale without its weight; copied",)
    assert_bitwise_equal(data.read(tmp_path / "out")[orphan], torch.ones(2, 2))


def test_a_scale_of_a_weight_that_is_not_fp8_is_dropped_with_a_warning(tmp_path):
    quantized = data.in_fp8(data.llama()).changed({Q: data.llama().tensors[Q]})
    report = dequantize_checkpoint(data.write(tmp_path / "source", quantized), tmp_path / "out")
    assert report.warnings == (f"{Q}_scale_inv: scale of a weight that is not FP8 (BF16); dropped",)
    assert f"{Q}_scale_inv" not in data.read(tmp_path / "out")


def test_fp8_without_a_quantization_config(tmp_path):
    quantized = data.in_fp8(data.llama()).changed({}, quantization_config=None)
    assert _refusal(tmp_path, quantized) == (
        "FP8 weights but no quantization_config in config.json (expected weight_block_size); "
        'add {"quant_method": "fp8", "weight_block_size": [128, 128]} with the true block size'
    )


def test_nothing_to_dequantize(tmp_path):
    line = "no FP8 weight in the checkpoint (expected F8_E4M3); nothing needs dequantizing"
    assert _refusal(tmp_path, data.llama()) == line


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            {"quant_method": "fp8"},
            "config.json quantization_config: FP8 checkpoint without block scales "
            "(per-tensor or per-channel) (expected weight_block_size); start from the unquantized checkpoint",
        ),
        (
            {"quant_method": "awq"},
            "config.json quantization_config: quantization method is not block FP8 "
            "(expected quant_method fp8, compressed-tensors, w4afp8 or blockscale, got 'awq'); "
            "start from an unquantized (BF16) or block FP8 checkpoint",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            "config.json quantization_config: "
            "bad block size (expected two positive integers, as 128x128, got [128])",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 0]},
            "config.json quantization_config: "
            "bad block size (expected two positive integers, as 128x128, got [128, 0])",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "e5m2"},
            "config.json quantization_config: "
            "unknown scale_fmt (expected float32 | ue8m0 | uf8m0 | null, got 'e5m2')",
        ),
    ],
)
def test_quantizations_that_are_not_block_fp8(tmp_path, entry, line):
    assert _refusal(tmp_path, data.in_fp8(data.llama()).changed({}, quantization_config=entry)) == line


@pytest.mark.parametrize("scale_fmt", ["uf8m0", "float32"])
def test_spellings_of_the_scale_format_seen_in_the_wild(tmp_path, scale_fmt):
    quantized = data.in_fp8(data.llama())
    quantized.config["quantization_config"]["scale_fmt"] = scale_fmt
    dequantize_checkpoint(data.write(tmp_path / "source", quantized), tmp_path / "out")
    _check(tmp_path / "out", quantized)


def test_an_fp8_tensor_that_is_no_matrix(tmp_path):
    more = {"a.weight": torch.ones(8).to(FP8), "a.weight_scale_inv": torch.ones(1)}
    line = _refusal(tmp_path, data.in_fp8(data.llama()).changed(more))
    assert line == "a.weight: FP8 tensor is not a matrix (expected 2 or 3 dimensions, got [8])"


def _with_nan_code(position):
    quantized = data.in_fp8(data.llama())
    codes = quantized.tensors[OUT].view(torch.uint8).clone()
    codes[position] = 0xFF
    return quantized.changed({OUT: codes.view(FP8)})


def test_a_nan_code_is_refused_with_its_position(tmp_path):
    assert _refusal(tmp_path, _with_nan_code((150, 7)), shards=1) == (
        f"{OUT} in model-00001-of-00001.safetensors: 1 NaN or Inf value, the first at [150, 7] "
        "(expected finite weights); repair the weight, or keep it unquantized: --on-nonfinite keep"
    )


def test_nan_codes_can_be_let_through(tmp_path):
    quantized = _with_nan_code((150, 7))
    dequantize_checkpoint(data.write(tmp_path / "source", quantized), tmp_path / "out", on_nonfinite="keep")
    _check(tmp_path / "out", quantized)
    assert data.read(tmp_path / "out")[OUT].isnan().nonzero().tolist() == [[150, 7]]


@pytest.mark.parametrize(("dtype", "scale"), [("F16", 1000.0), ("BF16", 2.0**125), ("F32", 2.0**125)])
def test_values_beyond_the_largest_of_the_dtype_are_refused(tmp_path, dtype, scale):
    quantized = data.in_fp8(data.llama()).changed({f"{OUT}_scale_inv": torch.full((2, 2), scale)})
    assert _refusal(tmp_path, quantized, dtype=dtype) == (
        f"{OUT} in model.safetensors: dequantized values are beyond the largest of {dtype}; "
        "choose a dtype of more range, or let them become Inf: --on-nonfinite keep"
    )
    source = tmp_path / "source"
    dequantize_checkpoint(source, tmp_path / "out", dtype=dtype, on_nonfinite="keep")
    assert data.read(tmp_path / "out")[OUT].isinf().any()


def test_an_unknown_dtype(tmp_path):
    line = _refusal(tmp_path, data.in_fp8(data.llama()), dtype="F64")
    assert line == "unknown dtype (expected BF16 | F16 | F32, got 'F64')"
