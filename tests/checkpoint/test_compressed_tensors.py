"""The compressed-tensors layout: that package accepts it, picks the same modules, decompresses the same."""

import pytest
import torch

from blockscale import (
    Recipe,
    dequantize_checkpoint,
    inspect_checkpoint,
    quantize_checkpoint,
    reference,
    verify_checkpoint,
)
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

FP8 = torch.float8_e4m3fn
RECIPE = Recipe(layout="compressed-tensors")


@pytest.fixture(params=[data.llama, data.deepseek_v3])
def model(request):
    return request.param()


def _modules(tensors):
    """A tree of modules with a Linear for every 2-D weight, as an engine would build it."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        if not name.endswith(".weight") or tensor.dim() != 2:
            continue
        *path, leaf = name.removesuffix(".weight").split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        rows, columns = tensor.shape
        kind = torch.nn.Embedding if leaf == "embed_tokens" else torch.nn.Linear
        parent.add_module(leaf, kind(columns, rows, device="meta"))
    return root


def test_the_package_accepts_the_config_and_quantizes_the_same_modules(tmp_path, model):
    recipe = Recipe(layout="compressed-tensors", exclude=("*.layers.0.self_attn.o_proj",))
    quantize_checkpoint(data.write(tmp_path / "source", model, shards=2), tmp_path / "out", recipe)
    config = QuantizationConfig.model_validate(data.read_config(tmp_path / "out")["quantization_config"])
    assert (config.quant_method, config.format, config.quantization_status.value) == (
        "compressed-tensors",
        "float-quantized",
        "compressed",
    )
    tree = _modules(model.tensors)
    apply_quantization_config(tree, config)
    chosen = {name for name, module in tree.named_modules() if getattr(module, "quantization_scheme", None)}
    got = data.read(tmp_path / "out")
    assert chosen == {name.removesuffix(".weight") for name, tensor in got.items() if tensor.dtype == FP8}
    assert chosen


@pytest.mark.parametrize("block_size", [(128, 128), (64, 64)])
@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
def test_the_package_decompresses_to_the_values_of_the_reference(tmp_path, model, block_size, scale_fmt):
    recipe = Recipe(scale_fmt, block_size, "compressed-tensors")
    quantize_checkpoint(data.write(tmp_path / "source", model), tmp_path / "out", recipe)
    config = QuantizationConfig.model_validate(data.read_config(tmp_path / "out")["quantization_config"])
    (scheme,) = config.config_groups.values()
    assert scheme.weights.block_structure == list(block_size)
    assert scheme.input_activations.group_size == block_size[1]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    got = data.read(tmp_path / "out")
    assert not any(name.endswith("_scale_inv") for name in got)
    weights = [name for name, tensor in got.items() if tensor.dtype == FP8]
    assert len(weights) >= 7
    for name in weights:
        codes, scale = reference.quantize_weight(model.tensors[name], block_size, scale_fmt)
        assert_bitwise_equal(got[name], codes, name)
        assert_bitwise_equal(got[f"{name}_scale"], scale, name)
        state = {"weight": got[name], "weight_scale": got[f"{name}_scale"]}
        values = compressor.decompress(state, scheme)["weight"]
        expected = reference.dequantize_weight(codes, scale, block_size, torch.float32)
        assert_bitwise_equal(values.float(), expected, name)


def test_and_back(tmp_path, model):
    source = data.write(tmp_path / "source", model, shards=3)
    quantize_checkpoint(source, tmp_path / "fp8", RECIPE)
    assert verify_checkpoint(tmp_path / "fp8", source).ok
    assert inspect_checkpoint(tmp_path / "fp8").problems == ()
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back")
    assert verify_checkpoint(tmp_path / "back", tmp_path / "fp8").ok
    quantize_checkpoint(source, tmp_path / "deepseek")
    dequantize_checkpoint(tmp_path / "deepseek", tmp_path / "same")
    assert data.read_config(tmp_path / "back") == data.read_config(tmp_path / "same") == model.config
    same = data.read(tmp_path / "same")
    for name, tensor in data.read(tmp_path / "back").items():
        assert_bitwise_equal(tensor, same[name], name)


def test_fused_experts_are_refused(tmp_path):
    source = data.write(tmp_path / "source", data.fused_experts("qwen3_moe", "nk"))
    line = data.refusal(
        lambda: quantize_checkpoint(source, tmp_path / "out", RECIPE), source, tmp_path / "out"
    )
    assert line.endswith(
        "the compressed-tensors layout has no place for fused 3-D experts; "
        "use --layout deepseek, or --exclude '*.experts.*'"
    )


@pytest.mark.parametrize(
    ("entry", "got"),
    [
        ({"config_groups": {}}, "0 groups, weights unknown"),
        (
            {"config_groups": {"a": {"weights": {"type": "int", "num_bits": 4}}}},
            "1 groups, weights {'type': 'int', 'num_bits': 4}",
        ),
        ({"config_groups": {"a": {"weights": {}}, "b": {}}}, "2 groups, weights unknown"),
    ],
)
def test_other_compressed_tensors_formats_are_refused(tmp_path, entry, got):
    config = {"quantization_config": {"quant_method": "compressed-tensors", **entry}}
    source = data.write(tmp_path / "source", data.in_fp8(data.llama()).changed({}, **config))
    line = data.refusal(lambda: dequantize_checkpoint(source, tmp_path / "out"), source, tmp_path / "out")
    assert line == (
        "config.json quantization_config: compressed-tensors checkpoint is not block FP8 "
        f"(expected config groups with 8-bit float weights and strategy block or group, or packed groups, "
        f"got {got}); "
        "start from an unquantized (BF16) or block FP8 checkpoint"
    )
