"""On-disk names and the configuration block: what is written, and that it is read back as what it was."""

import json

import pytest
import torch

from blockscale import formats
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8
from blockscale.quantization_config import Quantization, parse_quantization_config
from blockscale.testing.shapes import DEEPSEEK_V3

SKIP = ("lm_head", "model.layers.0.mlp.gate")


@pytest.mark.parametrize("name", DEEPSEEK_V3)
def test_scale_grids_of_deepseek_v3(name):
    shape, grid = DEEPSEEK_V3[name]
    assert BlockFP8().scale_shape(shape) == grid
    assert BlockFP8().scale_shape((256, *shape)) == (256, *grid)


@pytest.mark.parametrize(
    ("shape", "block_size", "grid"),
    [
        ((576, 576), (128, 128), (5, 5)),
        ((1, 1), (128, 128), (1, 1)),
        ((128, 129), (128, 128), (1, 2)),
        ((0, 5), (128, 128), (0, 1)),
        ((3, 0, 5), (128, 128), (3, 0, 1)),
        ((10944, 7168), (32, 32), (342, 224)),
        ((5, 300), (1, 128), (5, 3)),
    ],
)
def test_scale_grids_count_the_remainder_as_a_block(shape, block_size, grid):
    assert formats.scale_shape(shape, block_size) == grid


@pytest.mark.parametrize("shape", [(), (5,), (1, 2, 3, 4)])
def test_only_matrices_have_blocks(shape):
    with pytest.raises(BlockscaleError, match="only 2-D and 3-D weights have blocks"):
        formats.scale_shape(shape, (128, 128))


@pytest.mark.parametrize(
    ("value", "parsed"),
    [(None, "float32"), ("float32", "float32"), ("ue8m0", "ue8m0"), ("uf8m0", "ue8m0")],
)
def test_spellings_of_the_scale_format(value, parsed):
    assert formats.parse_scale_fmt(value) == parsed


@pytest.mark.parametrize("value", ["", "e8m0", "UE8M0", 8, False, ["ue8m0"]])
def test_other_scale_formats_are_refused_with_the_accepted_ones(value):
    with pytest.raises(BlockscaleError, match=r"unknown scale_fmt \(expected float32 \| ue8m0"):
        formats.parse_scale_fmt(value)


@pytest.mark.parametrize(
    ("value", "parsed"),
    [("128x128", (128, 128)), ("64", (64, 64)), ([1, 128], (1, 128)), ((32, 64), (32, 64))],
)
def test_spellings_of_the_block_size(value, parsed):
    assert formats.parse_block_size(value) == parsed


@pytest.mark.parametrize("value", ["", "0x128", "128x", "x", "-1x4", "1x2x3", 128, (128,), [128, 1.5], None])
def test_other_block_sizes_are_refused(value):
    with pytest.raises(BlockscaleError, match="bad block size"):
        formats.parse_block_size(value)


def test_a_block_format_is_checked_and_normalized():
    assert BlockFP8("32x64", "uf8m0") == BlockFP8((32, 64), "ue8m0")
    with pytest.raises(BlockscaleError, match="bad block size"):
        BlockFP8((0, 1))


@pytest.mark.parametrize(("layout", "suffix"), [("deepseek", "_scale_inv"), ("compressed-tensors", "_scale")])
def test_scale_names_and_back(layout, suffix):
    name = formats.scale_name("model.layers.0.mlp.gate_proj.weight", layout)
    assert name == "model.layers.0.mlp.gate_proj.weight" + suffix
    assert formats.scaled_weight_name(name) == "model.layers.0.mlp.gate_proj.weight"


def test_other_names_are_not_scales():
    assert formats.scaled_weight_name("model.embed_tokens.weight") is None
    assert formats.scaled_weight_name("layer_scale_inverse") is None


def test_module_paths_are_full():
    assert formats.module_path("model.layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate"
    assert formats.module_path("model.layers.0.experts.gate_up_proj") == "model.layers.0.experts.gate_up_proj"


@pytest.mark.parametrize("name", formats.SAFETENSORS_DTYPES)
def test_dtype_sizes_agree_with_torch(name):
    dtype = formats.SAFETENSORS_DTYPES[name]
    bits = formats.dtype_bits(name)
    assert formats.tensor_nbytes(name, (16, 4)) == 8 * bits
    if dtype is not None:
        assert bits == 8 * torch.empty(0, dtype=dtype).element_size()
        assert formats.DTYPE_NAMES[dtype] == name


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("block_size", [(128, 128), (32, 64)])
def test_the_deepseek_config_is_read_back_as_written(block_size, scale_fmt):
    written = Quantization("deepseek", BlockFP8(block_size, scale_fmt), SKIP)
    config = json.loads(json.dumps({"quantization_config": written.config()}))
    assert parse_quantization_config(config) == written


def test_the_deepseek_config_is_the_one_of_the_official_checkpoints():
    assert Quantization("deepseek", BlockFP8(), SKIP).config() == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": list(SKIP),
    }


def test_a_scale_format_of_null_is_never_written():
    assert "scale_fmt" not in Quantization("deepseek", BlockFP8(scale_fmt=None)).config()
    assert Quantization("deepseek", BlockFP8(scale_fmt="uf8m0")).config()["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_both_keys_of_the_skip_list_are_read(key):
    entry = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": None, key: ["b", "a"]}
    expected = Quantization("deepseek", BlockFP8(), ("a", "b"))
    assert parse_quantization_config({"quantization_config": entry}) == expected


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_an_unquantized_model_has_no_quantization(config):
    assert parse_quantization_config(config) is None


def test_the_compressed_tensors_config_is_read_back_and_by_its_package():
    package = pytest.importorskip("compressed_tensors.quantization")
    written = Quantization("compressed-tensors", BlockFP8((128, 128)), SKIP)
    config = json.loads(json.dumps({"quantization_config": written.config()}))
    assert parse_quantization_config(config) == written

    theirs = package.QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = theirs.config_groups.values()
    assert theirs.quantization_status == "compressed"
    assert theirs.ignore == list(SKIP)
    assert scheme.format == "float-quantized"
    assert scheme.weights.strategy == "block"
    assert list(scheme.weights.block_structure) == [128, 128]
    assert (scheme.input_activations.group_size, scheme.input_activations.dynamic) == (128, True)


_PER_CHANNEL = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}
_OTHERS = {
    "without block scales": {"quant_method": "fp8", "activation_scheme": "static"},
    "got 'awq'": {"quant_method": "awq"},
    "is not block FP8 .*channel": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": _PER_CHANNEL},
    },
    "got 2 groups": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": _PER_CHANNEL, "group_1": _PER_CHANNEL},
    },
    "unknown scale_fmt": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "e5m2"},
    "bad block size": {"quant_method": "fp8", "weight_block_size": [128]},
}


@pytest.mark.parametrize("message", _OTHERS)
def test_other_quantizations_are_refused(message):
    with pytest.raises(BlockscaleError, match=message):
        parse_quantization_config({"quantization_config": _OTHERS[message]})
