"""Weights of fewer than 8 bits in a checkpoint: written, verified, read back, and what is refused."""

import json
from functools import partial

import pytest
import torch

from blockscale import (
    BlockscaleError,
    Recipe,
    RunOptions,
    dequantize_checkpoint,
    inspect_checkpoint,
    plan_checkpoint,
    quantize_checkpoint,
    reference,
    verify_checkpoint,
)
from blockscale.checkpoint.recipe import PRESETS, read_recipe
from blockscale.checkpoint.shard import shard_checkpoint
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.group_spelling import parse_group_format, spell_group_format
from blockscale.quantization_config import parse_quantization_config
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"
EXPERTS = [EXPERT.format(expert, leaf) for expert in range(4) for leaf in ("gate", "up", "down")]
FORMATS = ["int4:g128", "int4:g32:ue8m0", "int3:g64", "mxfp4"]


def _recipe(fmt="int4:g128", **fields):
    return Recipe(layout="blockscale", precision={"default": "fp8", "experts": fmt}, **fields)


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.deepseek_v3(), shards=2)


@pytest.fixture
def out(tmp_path, source):
    quantize_checkpoint(source, tmp_path / "out", _recipe())
    return tmp_path / "out"


@pytest.fixture
def pair(tmp_path):
    """A checkpoint of one file, and what it was made from."""
    source = data.write(tmp_path / "whole", data.deepseek_v3())
    quantize_checkpoint(source, tmp_path / "made", _recipe())
    return source, tmp_path / "made"


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("spelled", FORMATS)
def test_there_and_back(tmp_path, source, spelled, scale_fmt):
    recipe, fmt = _recipe(spelled, scale_fmt=scale_fmt), parse_group_format(spelled)
    plan = plan_checkpoint(source, recipe)
    report = quantize_checkpoint(source, tmp_path / "out", recipe)
    assert plan.after == report.output_bytes
    assert plan.group_formats == report.group_formats == {spelled: 24}  # those of the MTP layer too
    weights, result = data.read(source), data.read(tmp_path / "out")
    for name in EXPERTS:
        packed, scale = reference.quantize_group(weights[name], fmt)
        assert_bitwise_equal(result[name], packed, name)
        assert_bitwise_equal(result[f"{name}_scale"], scale, name)
    shared = "model.layers.1.mlp.shared_experts.up_proj.weight"
    assert result[shared].dtype == torch.float8_e4m3fn
    verified = verify_checkpoint(tmp_path / "out", source)
    assert verified.problems == ()
    assert {error.name for error in verified.errors} > set(EXPERTS)
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    assert verify_checkpoint(tmp_path / "back", tmp_path / "out").problems == ()
    back = data.read(tmp_path / "back")
    for name in EXPERTS:
        values = reference.dequantize_group(
            result[name], result[f"{name}_scale"], fmt, weights[name].shape[-1], torch.bfloat16
        )
        assert_bitwise_equal(back[name], values, name)
    assert "quantization_config" not in data.read_config(tmp_path / "back")


def test_the_way_through_a_gpu_gives_the_same_bytes(tmp_path, source, out, monkeypatch):
    monkeypatch.setattr("blockscale.checkpoint.convert.usable_device", lambda device: "cpu:0")
    quantize_checkpoint(source, tmp_path / "there", _recipe(), run=RunOptions(workers=2))
    ours, theirs = data.read(out), data.read(tmp_path / "there")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_bitwise_equal(theirs[name], tensor, name)


def test_fused_experts(tmp_path):
    source = data.write(tmp_path / "source", data.fused_experts("qwen3_5_moe", "nk"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    quantize_checkpoint(source, tmp_path / "out", _recipe("mxfp4"))
    assert verify_checkpoint(tmp_path / "out", source).problems == ()
    packed, scale = reference.quantize_group(data.read(source)[name], MXFP4())
    assert_bitwise_equal(data.read(tmp_path / "out")[name], packed)
    assert_bitwise_equal(data.read(tmp_path / "out")[f"{name}_scale"], scale)


def test_config_names_the_experts_of_a_layer_by_one_expression(out):
    config = data.read_config(out)
    entry = config["quantization_config"]
    assert entry["quant_method"] == "blockscale"
    assert entry["group_formats"] == {
        "int4:g128": [
            f"re:model\\.layers\\.{layer}\\.mlp\\.experts\\.\\d+\\.{leaf}_proj$"
            for layer in (1, 2)
            for leaf in ("down", "gate", "up")
        ]
    }
    quantization = parse_quantization_config(config)
    assert quantization.group_format_of(EXPERTS[0]) == GroupInt(4, 128)
    assert quantization.group_format_of("model.layers.1.mlp.shared_experts.up_proj.weight") is None
    assert quantization.config() == entry


def test_what_is_in_it(out):
    found = inspect_checkpoint(out)
    experts = next(each for each in found.counts if each.dtype == "U8")
    assert experts.parameters == 24 * 160 * 72
    assert found.parameters == sum(each.numel() for each in data.deepseek_v3().tensors.values())
    assert found.problems == ()


def test_a_recipe_by_its_name():
    assert read_recipe("w4a8") == PRESETS["w4a8"] == _recipe("int4:g128")
    assert read_recipe("mxfp4a8") == _recipe("mxfp4")


@pytest.mark.parametrize("spelled", [*FORMATS, "int3:g128:ue8m0"])
def test_spellings(spelled):
    assert spell_group_format(parse_group_format(spelled)) == spelled


@pytest.mark.parametrize("spelled", ["int5", "int4:g16", "int4:g32:g64", "mxfp4:g32", "int4:", "int4:fp8", 4])
def test_unknown_formats(spelled):
    line = data.told(parse_group_format, spelled, "precision experts")
    assert line.startswith("precision experts: unknown format (expected int4[:g32|g64|g128][:ue8m0]")
    with pytest.raises(BlockscaleError):
        Recipe(layout="blockscale", precision={"experts": spelled})


def _spoil(name, change):
    def spoil(folder):
        data.rewrite(folder, lambda tensors: tensors.update({name: change(tensors[name])}))

    return spoil


def _config(change):
    def spoil(folder):
        config = data.read_config(folder)
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


FAULTS = {
    "a changed code": (
        _spoil(EXPERTS[0], lambda each: each ^ (torch.arange(each.numel()).view(each.shape) == 5).byte() * 4),
        "is not the source rounded to its codes",
    ),
    "scales off by two": (_spoil(f"{EXPERTS[1]}_scale", lambda each: each * 2), "is not the source rounded"),
    "a negative scale": (_spoil(f"{EXPERTS[2]}_scale", lambda each: -each), "scales are not positive"),
    "scales of another group size": (
        _spoil(f"{EXPERTS[3]}_scale", lambda each: each.repeat_interleave(2, 1)),
        "scales do not fit int4:g128",
    ),
    "scales in float32": (_spoil(f"{EXPERTS[3]}_scale", lambda each: each.float()), "scales do not fit"),
    "a format that is not said": (_config(lambda entry: entry.pop("group_formats")), "is packed, and config"),
    "another format": (
        _config(lambda entry: entry.update(group_formats={"mxfp4": ["re:.*experts"]})),
        "scales do not fit mxfp4",
    ),
    "a format of what has none": (
        _config(lambda entry: entry["group_formats"].update({"int3:g32": ["lm_head"]})),
        "is BF16 but config.json says int3:g32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds(pair, fault):
    (source, out), (spoil, line) = pair, FAULTS[fault]
    (out / "blockscale.json").unlink()  # or checksums would tell
    spoil(out)
    problems = verify_checkpoint(out, source).problems
    assert any(line in str(problem) for problem in problems), problems


REFUSED = {
    "a layout without a place": (
        {"layout": "deepseek"},
        "the deepseek layout has no place for weights of fewer than 8 bits (got int4:g128); "
        "use --layout blockscale",
    ),
    "experts of one layer in two formats": (
        {"precision": {"default": "fp8", "*.experts.0.*": "int4", "*.experts.[123].*": "int3"}},
        "model.layers.1.mlp.experts.1.down_proj.weight: weights that engines fuse need one format (expected "
        "int4:g128, as model.layers.1.mlp.experts.0.up_proj.weight, got int3:g128); "
        "name a format for all of them",
    ),
    "two sizes of FP8 blocks": (
        {"precision": {"default": "fp8", "experts": "int4", "shared_experts": "fp8:64x64"}},
        "the blockscale layout has one block size for the whole checkpoint (got 128x128, 64x64); "
        "use --layout compressed-tensors, or one size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, source, case):
    fields, line = REFUSED[case]
    recipe = Recipe(**{"layout": "blockscale", "precision": {"experts": "int4"}, **fields})
    action = partial(quantize_checkpoint, source, tmp_path / "out", recipe)
    assert data.refusal(action, source, tmp_path / "out") == line


def test_experts_stored_the_other_way_round(tmp_path):
    source = data.write(tmp_path / "source", data.fused_experts("gpt_oss", "kn"))
    line = data.refusal(partial(quantize_checkpoint, source, tmp_path / "out", _recipe()), source)
    assert "proj: experts stored as (E, in, out) cannot become int4:g128 (expected groups along" in line


def test_rows_that_are_not_whole_bytes(tmp_path):
    model = data.deepseek_v3()
    odd = {
        name: torch.randn(each.shape[0], 71) for name, each in model.tensors.items() if "down_proj" in name
    }
    source = data.write(tmp_path / "source", model.changed(odd))
    line = data.refusal(partial(quantize_checkpoint, source, tmp_path / "out", _recipe()), source)
    assert line == (
        "model.layers.1.mlp.experts.0.down_proj.weight: rows of int4:g128 are not whole bytes "
        "(expected a multiple of 2 inputs, got 71); leave it in FP8"
    )


def test_a_nan_is_named(tmp_path):
    model = data.deepseek_v3()
    broken = model.tensors[EXPERTS[4]].clone()
    broken[3, 7] = torch.nan
    source = data.write(tmp_path / "source", model.changed({EXPERTS[4]: broken}))
    action = partial(quantize_checkpoint, source, tmp_path / "out", _recipe())
    line = data.refusal(action, source, tmp_path / "out")
    assert f"{EXPERTS[4]} in " in line
    assert "[3, 7]" in line


def test_what_cannot_be_done_with_it_yet(tmp_path, source, out):
    with pytest.raises(BlockscaleError, match="cannot be divided: DeepSeek's inference code knows FP8"):
        shard_checkpoint(out, tmp_path / "ranks", 2)
    with pytest.raises(BlockscaleError, match=r"already quantized .*run blockscale dequantize first"):
        quantize_checkpoint(out, tmp_path / "again", _recipe())
    with pytest.raises(BlockscaleError, match="precision int4:g128: only FP8 is made here"):
        _ = _recipe().fmt
