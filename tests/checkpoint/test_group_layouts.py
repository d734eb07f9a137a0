"""Weights of fewer than 8 bits as engines have them: w4afp8 and compressed-tensors, written and read back."""

import json

import pytest
import torch

from blockscale import (
    Recipe,
    dequantize_checkpoint,
    inspect_checkpoint,
    plan_checkpoint,
    quantize_checkpoint,
    reference,
    verify_checkpoint,
)
from blockscale.checkpoint.convert import RunOptions, run_plan
from blockscale.checkpoint.group_storage import amax_of, companion
from blockscale.checkpoint.plan import plan_quantize
from blockscale.checkpoint.rounded import read_rounded
from blockscale.checkpoint.source import open_source
from blockscale.checkpoint.tasks import Job
from blockscale.group_formats import GroupInt
from blockscale.group_spelling import parse_group_format
from blockscale.quantization_config import parse_quantization_config
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

EXPERT = "model.layers.1.mlp.experts.{}.{}_proj"
EXPERTS = [EXPERT.format(expert, leaf) for expert in range(4) for leaf in ("gate", "up", "down")]
LAYOUTS = [
    ("w4afp8", "int4:g128"),
    ("w4afp8", "int4:g128:ue8m0"),
    ("compressed-tensors", "int4:g128"),
    ("compressed-tensors", "int4:g32:ue8m0"),
    ("compressed-tensors", "int3:g64"),
    ("compressed-tensors", "mxfp4"),
]


def _recipe(layout, fmt="int4:g128", **precision):
    return Recipe(layout=layout, precision={"default": "fp8", "experts": fmt, **precision})


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.deepseek_v3(hidden=256, width=128), shards=2)


def _quantize(tmp_path, source, layout, fmt="int4:g128"):
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    return quantize_checkpoint(source, tmp_path / "out", _recipe(layout, fmt))


@pytest.mark.parametrize(("layout", "spelled"), LAYOUTS)
def test_there_and_back(tmp_path, source, layout, spelled):
    report = _quantize(tmp_path, source, layout, spelled)
    assert plan_checkpoint(source, _recipe(layout, spelled)).after == report.output_bytes
    verified = verify_checkpoint(tmp_path / "out", source)
    assert verified.problems == ()
    assert verified.compared == len(data.read(source))
    assert {error.name for error in verified.errors} > {f"{name}.weight" for name in EXPERTS}
    found = inspect_checkpoint(tmp_path / "out")
    assert found.problems == ()
    assert found.parameters == sum(each.numel() for each in data.read(source).values())
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    assert verify_checkpoint(tmp_path / "back", tmp_path / "out").problems == ()
    weights, back = data.read(source), data.read(tmp_path / "back")
    assert back.keys() == weights.keys()
    for name in (f"{name}.weight" for name in EXPERTS):
        fmt = parse_group_format(spelled)
        values = reference.dequantize_group(
            *reference.quantize_group(weights[name], fmt), fmt, weights[name].shape[-1], torch.bfloat16
        )
        assert_bitwise_equal(back[name], values, name)


def test_w4afp8_as_sglang_has_it(tmp_path, source):
    report = _quantize(tmp_path, source, "w4afp8")
    weights, got = data.read(source), data.read(tmp_path / "out")
    for name in EXPERTS:
        codes, scale = reference.quantize_group(weights[f"{name}.weight"], GroupInt(4, 128))
        assert_bitwise_equal(got[f"{name}.weight"], codes.view(torch.int8))
        assert_bitwise_equal(got[f"{name}.weight_scale_inv"], scale)
        assert_bitwise_equal(got[f"{name}.input_scale"], torch.ones(1, dtype=torch.bfloat16))
    shared = "model.layers.1.mlp.shared_experts.up_proj.weight"
    assert (got[shared].dtype, got[f"{shared}_scale_inv"].dtype) == (torch.float8_e4m3fn, torch.float32)
    config = data.read_config(tmp_path / "out")
    entry = config["quantization_config"]
    assert (entry["quant_method"], entry["activation_scheme"]) == ("w4afp8", "dynamic")
    assert (entry["weight_block_size"], entry["group_size"]) == ([128, 128], 128)
    assert parse_quantization_config(config).config() == entry
    assert report.input_scales == {"calibrated": 0, "default": 24}
    manifest = json.loads((tmp_path / "out" / "blockscale.json").read_text())
    assert manifest["input_scales"] == report.input_scales


def test_an_input_scale_is_what_brings_the_largest_input_to_448():
    # 448 * 2**-7 is 3.5. What is no BF16 value is rounded up, so that the input does not saturate.
    assert companion("x.input_scale", (1, 1), 3.5).tolist() == [2.0**-7]
    for amax in (3.51, 3.52, 3.53, 3.6, 3.7):
        scale = companion("x.input_scale", (1, 1), amax)
        assert scale.dtype == torch.bfloat16
        assert amax / 448 <= scale.item() <= amax / 448 * (1 + 2**-7)


def test_input_scales_of_a_calibration_are_written(tmp_path, source):
    opened = open_source(source)
    plan = plan_quantize(opened, _recipe("w4afp8"))
    (tmp_path / "rounded").mkdir()
    amax = {f"{EXPERTS[0]}.weight": 3.5, f"{EXPERTS[2]}.weight": 7.0}
    (tmp_path / "rounded" / "inputs.json").write_text(json.dumps(amax))
    rounded = read_rounded(tmp_path / "rounded", {}, {})
    report = run_plan(plan, opened, tmp_path / "out", RunOptions(), Job(opened, rounded=rounded))
    assert report.input_scales == {"calibrated": 3, "default": 21}
    got = data.read(tmp_path / "out")
    assert [got[f"{name}.input_scale"].item() for name in EXPERTS[:4]] == [2**-7, 2**-7, 2**-6, 1.0]


@pytest.mark.parametrize("content", ["[]", "{", '{"x": "a"}', '{"x": -1}', '{"x": NaN}'])
def test_inputs_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "inputs.json").write_text(content)
    assert "inputs.json: cannot be used" in data.told(read_rounded, tmp_path, {}, {})


def test_weights_of_one_input_have_one_input_scale():
    amax = {f"{EXPERTS[0]}.weight": 3.0, f"{EXPERTS[1]}.weight": 4.0, f"{EXPERTS[2]}.weight": 5.0}
    assert [amax_of(f"{name}.weight", amax) for name in EXPERTS[:4]] == [4.0, 4.0, 5.0, None]


def test_compressed_tensors_config_has_a_format_in_each_group(tmp_path, source):
    _quantize(tmp_path, source, "compressed-tensors")
    config = data.read_config(tmp_path / "out")
    entry = config["quantization_config"]
    assert (entry["format"], entry["quantization_status"]) == ("mixed-precision", "compressed")
    blocks, experts = entry["config_groups"].values()
    assert (blocks["format"], blocks["targets"]) == ("float-quantized", ["Linear"])
    assert experts["format"] == "pack-quantized"
    assert experts["targets"][0] == r"re:model\.layers\.1\.mlp\.experts\.\d+\.down_proj$"
    # What vLLM's W4A8 kernels ask for: one dynamic FP8 scale a token.
    assert experts["input_activations"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    assert parse_quantization_config(config).config() == entry


@pytest.mark.parametrize("spelled", ["int4:g128", "int4:g64", "int3:g32", "mxfp4"])
def test_the_package_decompresses_to_our_values(tmp_path, source, spelled):
    _quantize(tmp_path, source, "compressed-tensors", spelled)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(data.read_config(tmp_path / "out")["quantization_config"])
    scheme = config.config_groups["group_1"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back", dtype="F32")
    got, back = data.read(tmp_path / "out"), data.read(tmp_path / "back")
    for name in EXPERTS:
        own = {key.rpartition(".")[2]: each for key, each in got.items() if key.startswith(f"{name}.")}
        assert own.keys() == {"weight_packed", "weight_scale"} | (
            set() if spelled == "mxfp4" else {"weight_shape"}
        )
        values = compressor.decompress(own, scheme)["weight"]
        assert_bitwise_equal(values.to(torch.bfloat16), back[f"{name}.weight"].to(torch.bfloat16), name)


def test_the_package_quantizes_the_same_modules(tmp_path, source):
    _quantize(tmp_path, source, "compressed-tensors")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    from tests.checkpoint.test_compressed_tensors import _modules

    config = QuantizationConfig.model_validate(data.read_config(tmp_path / "out")["quantization_config"])
    tree = _modules(data.read(source))
    apply_quantization_config(tree, config)
    schemes = {name: getattr(module, "quantization_scheme", None) for name, module in tree.named_modules()}
    bits = {name: scheme.weights.num_bits for name, scheme in schemes.items() if scheme is not None}
    got = data.read(tmp_path / "out")
    assert {name for name, each in bits.items() if each == 4} == {
        name.removesuffix(".weight_packed") for name in got if name.endswith(".weight_packed")
    }
    assert {name for name, each in bits.items() if each == 8} == {
        name.removesuffix(".weight") for name, each in got.items() if each.dtype == torch.float8_e4m3fn
    }


REFUSED = {
    "w4afp8: groups of 64": ("w4afp8", {"experts": "int4:g64"}, "the w4afp8 layout has no place for this"),
    "w4afp8: mxfp4": ("w4afp8", {"experts": "mxfp4"}, "the w4afp8 layout has no place for this format"),
    "w4afp8: nothing in INT4": ("w4afp8", {"default": "fp8"}, "the w4afp8 layout is INT4 experts beside FP8"),
    "w4afp8: attention": (
        "w4afp8",
        {"default": "fp8", "experts": "int4", "dense_mlp": "int4"},
        "model.layers.0.mlp.down_proj.weight: the w4afp8 layout has INT4 in all routed experts and nowhere",
    ),
    "w4afp8: some experts": (
        "w4afp8",
        {"experts": "int4", "model.layers.2.mlp.experts.*": "fp8"},
        "experts.0.down_proj.weight: the w4afp8 layout has INT4 in all routed experts and nowhere else "
        "(expected int4:g128, got fp8 or bf16)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(tmp_path, source, case):
    layout, precision, line = REFUSED[case]
    recipe = Recipe(layout=layout, precision=precision)
    told = data.refusal(
        lambda: quantize_checkpoint(source, tmp_path / "out", recipe), source, tmp_path / "out"
    )
    assert line in told


@pytest.mark.parametrize("layout", ["w4afp8", "compressed-tensors"])
def test_ragged_groups_are_refused(tmp_path, layout):
    source = data.write(tmp_path / "source", data.deepseek_v3(hidden=160, width=128))
    told = data.refusal(
        lambda: quantize_checkpoint(source, tmp_path / "out", _recipe(layout)), source, tmp_path / "out"
    )
    assert f"rows of int4:g128 are not whole groups, as the {layout} layout has them" in told
    assert "(expected a multiple of 128 inputs, got 160)" in told


FAULTS = {
    "a changed code": ("weight", lambda each: each ^ (torch.arange(each.numel()).view(each.shape) == 5) * 4),
    "scales off by two": ("scale", lambda each: each * 2),
    "a negative scale": ("scale", lambda each: -each),
    "scales in float32": ("scale", lambda each: each.float()),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", ["w4afp8", "compressed-tensors"])
def test_verify_finds(tmp_path, layout, fault):
    source = data.write(tmp_path / "whole", data.deepseek_v3(hidden=256, width=128))
    _quantize(tmp_path, source, layout)
    (tmp_path / "out" / "blockscale.json").unlink()  # or checksums would tell
    names = {
        "w4afp8": ("weight", "weight_scale_inv"),
        "compressed-tensors": ("weight_packed", "weight_scale"),
    }
    what, change = FAULTS[fault]
    name = f"{EXPERTS[0]}.{names[layout][what == 'scale']}"
    data.rewrite(
        tmp_path / "out",
        lambda tensors: tensors.update(
            {
                name: change(tensors[name]).to(
                    tensors[name].dtype if what == "weight" else change(tensors[name]).dtype
                )
            }
        ),
    )
    assert not verify_checkpoint(tmp_path / "out", source).ok


@pytest.mark.skipif(not data.TINY_DEEPSEEK.exists(), reason="the trained tiny model is not here")
def test_transformers_loads_our_experts(tmp_path):
    transformers = pytest.importorskip("transformers")
    _quantize(tmp_path, data.TINY_DEEPSEEK, "compressed-tensors")
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, ours = (load(tmp_path / folder, dtype=torch.bfloat16).state_dict() for folder in ("out", "back"))
    experts = [name for name in ours if ".mlp.experts." in name]
    assert len(experts) == 10
    for name in experts:
        assert torch.equal(theirs[name], ours[name]), name


def test_what_others_pack_is_read(tmp_path):
    """A checkpoint as llm-compressor writes it: one group of INT4 for the class Linear, no FP8."""
    pytest.importorskip("compressed_tensors")
    source = data.write(tmp_path / "source", data.llama(hidden=256, intermediate=256))
    recipe = Recipe(layout="compressed-tensors", precision={"default": "int4:g128"})
    quantize_checkpoint(source, tmp_path / "out", recipe)
    (tmp_path / "out" / "blockscale.json").unlink()
    config = data.read_config(tmp_path / "out")
    entry = config["quantization_config"]
    (packed,) = (each for each in entry["config_groups"].values() if each["format"] == "pack-quantized")
    del packed["format"]
    packed["targets"] = ["Linear"]
    entry |= {"config_groups": {"group_0": packed}, "format": "pack-quantized"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert inspect_checkpoint(tmp_path / "out").problems == ()
    assert verify_checkpoint(tmp_path / "out", source).problems == ()
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    assert verify_checkpoint(tmp_path / "back", tmp_path / "out").problems == ()


@pytest.mark.parametrize(
    "change", [{"symmetric": False}, {"num_bits": 8}, {"strategy": "channel"}, {"actorder": "group"}]
)
def test_what_is_packed_otherwise_is_refused(tmp_path, source, change):
    _quantize(tmp_path, source, "compressed-tensors")
    config = data.read_config(tmp_path / "out")
    config["quantization_config"]["config_groups"]["group_1"]["weights"].update(change)
    told = data.told(parse_quantization_config, config)
    assert told is not None
    assert "compressed-tensors checkpoint is not block FP8" in told
