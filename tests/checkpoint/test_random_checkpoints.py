"""Random small checkpoints: round trips are exact, and any damage ends in one clean line or in success."""

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockscale import (
    Recipe,
    RunOptions,
    dequantize_checkpoint,
    inspect_checkpoint,
    quantize_checkpoint,
    reference,
    verify_checkpoint,
)
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
OTHERS = [torch.float64, torch.int64, torch.uint8, torch.bool, torch.int8]
LINEAR = ["self_attn.o_proj", "mlp.down_proj", "mlp.experts.{}.up_proj", "self_attn.kv_b_proj"]
KEPT = ["mlp.gate", "input_layernorm", "self_attn.rotary", "eh_proj", "weird name/é.\x7f"]

_names = st.builds(
    lambda layer, leaf, expert: f"model.layers.{layer}.{leaf.format(expert)}.weight",
    st.integers(0, 3),
    st.sampled_from(LINEAR + KEPT),
    st.integers(0, 2),
)
_shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
_matrices = st.tuples(st.integers(1, 70), st.integers(1, 70))


@st.composite
def _models(draw):
    """Names of linear layers and of anything else, with shapes and dtypes that may or may not suit them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors = {"model.layers.9.mlp.down_proj.weight": torch.randn(33, 65, generator=generator).bfloat16()}
    for name in draw(st.lists(_names, max_size=8, unique=True)):
        shape = draw(st.one_of(_matrices, _shapes))
        scale = 2.0 ** draw(st.integers(-30, 12))
        values = torch.randn(shape, generator=generator) * scale
        values[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5]))] = 0
        tensors[name] = values.to(draw(st.sampled_from(FLOATS + OTHERS)))
    shards = draw(st.one_of(st.none(), st.integers(1, 4)))
    model_type = draw(st.sampled_from(["deepseek_v3", "llama", "brand_new"]))
    config = {"model_type": model_type, "num_hidden_layers": 4}
    return data.Model(tensors, config), shards


_recipes = st.builds(
    Recipe,
    st.sampled_from(["float32", "ue8m0"]),
    st.tuples(st.sampled_from([1, 16, 33, 128]), st.sampled_from([1, 16, 64, 128])),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(_models(), _recipes, st.integers(1, 3))
def test_a_random_checkpoint_goes_there_and_back(model_and_shards, recipe, workers):
    model, shards = model_and_shards
    with tempfile.TemporaryDirectory() as folder:
        root, run = Path(folder), RunOptions(workers=workers)
        source = data.write(root / "source", model, shards)
        quantize_checkpoint(source, root / "fp8", recipe, run=run)
        found = verify_checkpoint(root / "fp8", source)
        assert found.ok, found.problems
        dequantize_checkpoint(root / "fp8", root / "back", dtype="F32", run=run)
        found = verify_checkpoint(root / "back", root / "fp8")
        assert found.ok, found.problems
        fp8, back = data.read(root / "fp8"), data.read(root / "back")
        assert back.keys() == model.tensors.keys()
        for name, tensor in model.tensors.items():
            expected = tensor
            if fp8[name].dtype == torch.float8_e4m3fn:
                codes, scale = reference.quantize_weight(tensor, recipe.block_size, recipe.scale_fmt)
                assert_bitwise_equal(fp8[name], codes, name)
                expected = reference.dequantize_weight(codes, scale, recipe.block_size, torch.float32)
            assert back[name].shape == tensor.shape
            if tensor.numel():
                assert_bitwise_equal(back[name], expected, name)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(_models(), _recipes)
def test_quantizing_what_was_dequantized_gives_the_same_codes(model_and_shards, recipe):
    model, shards = model_and_shards
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        quantize_checkpoint(data.write(root / "source", model, shards), root / "fp8", recipe)
        dequantize_checkpoint(root / "fp8", root / "back", dtype="F32")
        quantize_checkpoint(root / "back", root / "again", recipe)
        again = data.read(root / "again")
        for name, tensor in data.read(root / "fp8").items():
            if tensor.dtype != torch.float8_e4m3fn:
                continue
            # Its scale may halve under ue8m0, where the largest value was rounded down to a power of two.
            values = reference.dequantize_weight(again[name], again[f"{name}_scale_inv"], recipe.block_size)
            scale = data.read(root / "fp8")[f"{name}_scale_inv"]
            assert_bitwise_equal(values, reference.dequantize_weight(tensor, scale, recipe.block_size), name)


_FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", data.INDEX, "config.json"]
_damage = st.tuples(st.sampled_from(_FILES), st.integers(0, 2**20), st.integers(0, 255), st.booleans())


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_damage, min_size=1, max_size=3), st.booleans())
def test_any_damage_is_told_in_one_line_or_does_no_harm(damage, quantized):
    model = data.llama(hidden=16, intermediate=24)
    model = data.in_fp8(model, block_size=(16, 16)) if quantized else model
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = data.write(root / "source", model, shards=2)
        for name, place, value, cut in damage:
            raw = bytearray((source / name).read_bytes())
            if raw:
                # The head of a file is where damage is dangerous.
                place %= len(raw) if place % 2 else min(len(raw), 1200)
                raw[place:] = b"" if cut else bytes([value]) + raw[place + 1 :]
            (source / name).write_bytes(raw)
        before = data.snapshot(source)
        convert = dequantize_checkpoint if quantized else quantize_checkpoint
        lines = [data.told(inspect_checkpoint, source), data.told(verify_checkpoint, source)]
        lines.append(data.told(convert, source, root / "out"))
        assert all(line is None or (line and "\n" not in line) for line in lines)
        visible = [name for name in data.contents(root / "out") if not name.startswith(".blockscale/")]
        assert not visible or "config.json" in visible
        assert data.snapshot(source) == before


@settings(max_examples=60)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-1, 200)
        | st.text(max_size=3)
        | st.sampled_from(["fp8", "float", "block"]),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(
                    [
                        *(
                            "quant_method",
                            "weight_block_size",
                            "scale_fmt",
                            "modules_to_not_convert",
                            "config_groups",
                        ),
                        *("weights", "block_structure", "strategy", "type", "num_bits", "ignore", "a"),
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
def test_any_quantization_config_is_understood_or_refused(entry):
    for method in ("fp8", "compressed-tensors", None):
        if method and isinstance(entry, dict):
            entry = {**entry, "quant_method": method}
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            model = data.in_fp8(data.Model({"model.layers.0.mlp.down_proj.weight": torch.ones(4, 4)}, {}))
            source = data.write(root / "source", model)
            (source / "config.json").write_text(
                json.dumps({"model_type": "llama", "quantization_config": entry})
            )
            lines = [
                data.told(inspect_checkpoint, source),
                data.told(dequantize_checkpoint, source, root / "out"),
            ]
            assert all(line is None or (line and "\n" not in line) for line in lines)
