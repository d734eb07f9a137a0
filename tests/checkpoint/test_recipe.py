"""What is quantized and what is not: refused sources, patterns, non-finite weights, fused partners."""

import json

import pytest
import torch

from blockscale import BlockscaleError, Recipe, quantize_checkpoint
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

FP8 = torch.float8_e4m3fn
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."


def _quantized(folder):
    return {name for name, tensor in data.read(folder).items() if tensor.dtype == FP8}


def _skip(folder):
    return data.read_config(folder)["quantization_config"]["modules_to_not_convert"]


def _refusal(tmp_path, model, recipe=None, **options):
    source = data.write(tmp_path / "source", model)
    target = tmp_path / "out"
    return data.refusal(lambda: quantize_checkpoint(source, target, recipe, **options), source, target)


@pytest.mark.parametrize(
    ("model", "got", "remedy"),
    [
        (data.in_fp8(data.llama()), "quant_method 'fp8'", "run blockscale dequantize first"),
        (
            data.llama().changed({}, quantization_config={"quant_method": "compressed-tensors"}),
            "quant_method 'compressed-tensors'",
            "run blockscale dequantize first",
        ),
        (
            data.llama().changed({}, quantization_config={"quant_method": "mxfp4"}),
            "quant_method 'mxfp4'",
            "start from the unquantized checkpoint",
        ),
        (
            data.in_fp8(data.llama(), [f"{MLP}up_proj.weight"]).changed({}, quantization_config=None),
            f"{MLP}up_proj.weight",
            "run blockscale dequantize first",
        ),
        (
            data.llama().changed({f"{MLP}experts.gate_up_proj_blocks": torch.zeros(2, 2, dtype=torch.uint8)}),
            f"{MLP}experts.gate_up_proj_blocks",
            "start from the unquantized checkpoint",
        ),
        (
            data.llama().changed({f"{MLP}up_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)}),
            f"{MLP}up_proj.qweight",
            "start from the unquantized checkpoint",
        ),
    ],
)
def test_a_source_that_is_quantized_already(tmp_path, model, got, remedy):
    assert _refusal(tmp_path, model) == (
        "source is already quantized (expected BF16, F16 or F32 weights and no quantization_config, "
        f"got {got}); {remedy}"
    )


def test_an_empty_quantization_config_is_none(tmp_path):
    source = data.write(tmp_path / "source", data.llama().changed({}, quantization_config={}))
    quantize_checkpoint(source, tmp_path / "out")
    assert data.read_config(tmp_path / "out")["quantization_config"]["quant_method"] == "fp8"


def test_a_name_that_the_scale_would_take(tmp_path):
    name = f"{MLP}up_proj.weight_scale_inv"
    line = _refusal(tmp_path, data.llama().changed({name: torch.ones(3, 2)}))
    assert line == f"{name}: name is taken by a tensor of the source"


@pytest.mark.parametrize(
    "recipe", [Recipe(exclude=("*.q_porj",)), Recipe(include=("model.layers.0", "*.qproj"))]
)
def test_a_pattern_with_a_typo(tmp_path, recipe):
    pattern = (*recipe.include, *recipe.exclude)[0]
    assert _refusal(tmp_path, data.llama(), recipe).startswith(
        f"'{pattern}': pattern matches no tensor (got 12 tensors, such as "
    )


def test_nothing_left_to_quantize(tmp_path):
    line = _refusal(tmp_path, data.llama(), Recipe(exclude=("model.layers.*",)))
    assert line == "no tensor would be quantized; widen --include, narrow --exclude"


@pytest.mark.parametrize("pattern", ["*.q_proj", "*.q_proj.weight", "model.layers.?.self_attn.q_proj"])
def test_the_partners_of_an_excluded_projection_are_kept_too(tmp_path, pattern):
    model = data.llama()
    source = data.write(tmp_path / "source", model, shards=3)
    report = quantize_checkpoint(source, tmp_path / "out", Recipe(exclude=(pattern,)))
    kept = [f"{ATTENTION}{leaf}_proj" for leaf in "kqv"]
    assert _quantized(tmp_path / "out") == {
        f"{ATTENTION}o_proj.weight",
        *(f"{MLP}{leaf}_proj.weight" for leaf in ("gate", "up", "down")),
    }
    assert _skip(tmp_path / "out") == ["lm_head", *kept]
    assert report.warnings == (
        f"{ATTENTION}q_proj.weight keeps its precision (excluded), "
        f"so {ATTENTION}k_proj.weight and 1 more must too",
    )


def test_include_takes_only_what_matches(tmp_path):
    recipe = Recipe(include=("*.down_proj", "*.o_proj"), exclude=("*.o_proj",))
    quantize_checkpoint(data.write(tmp_path / "source", data.llama(layers=2)), tmp_path / "out", recipe)
    assert _quantized(tmp_path / "out") == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    assert len(_skip(tmp_path / "out")) == 1 + 2 * 6


def test_a_pattern_cannot_quantize_what_its_family_keeps(tmp_path):
    recipe = Recipe(include=("*",))
    quantize_checkpoint(data.write(tmp_path / "source", data.deepseek_v3()), tmp_path / "out", recipe)
    assert all("_proj" in name and "eh_proj" not in name for name in _quantized(tmp_path / "out"))


def test_one_expert_excluded_keeps_all_experts_of_its_layer(tmp_path):
    recipe = Recipe(exclude=("model.layers.1.mlp.experts.2.down_proj",))
    source = data.write(tmp_path / "source", data.deepseek_v3(), shards=2)
    quantize_checkpoint(source, tmp_path / "out", recipe)
    quantized = _quantized(tmp_path / "out")
    assert not any(name.startswith("model.layers.1.mlp.experts.") for name in quantized)
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in quantized
    assert "model.layers.2.mlp.experts.2.down_proj.weight" in quantized
    assert "model.layers.1.mlp.experts.0.up_proj" in _skip(tmp_path / "out")


def test_the_latent_projections_share_their_precision(tmp_path):
    recipe = Recipe(exclude=("model.layers.0.self_attn.q_a_proj",))
    quantize_checkpoint(data.write(tmp_path / "source", data.deepseek_v3()), tmp_path / "out", recipe)
    kept = {f"{ATTENTION}{leaf}.weight" for leaf in ("q_a_proj", "kv_a_proj_with_mqa")}
    assert not kept & _quantized(tmp_path / "out")
    assert {f"{ATTENTION}q_b_proj.weight", f"{ATTENTION}kv_b_proj.weight"} <= _quantized(tmp_path / "out")


def test_an_unknown_model_type_gets_the_rule_by_names_and_a_warning(tmp_path):
    model = data.llama(model_type="brand_new")
    more = {
        f"{MLP}odd_proj.weight": data.weight("odd", 64, 64),
        f"{MLP}dt_proj.weight": data.weight("dt", 64, 64),
    }
    source = data.write(tmp_path / "source", model.changed(more))
    report = quantize_checkpoint(source, tmp_path / "out")
    assert report.warnings == (
        "model_type 'brand_new' is not known: only weights that are linear layers by their name are "
        "quantized; --dry-run shows how many",
    )
    assert _quantized(tmp_path / "out") == {
        name for name in model.tensors if "layers.0" in name and "_proj" in name
    }
    assert {name.removesuffix(".weight") for name in more} < set(_skip(tmp_path / "out"))


def _with_values(name, positions):
    tensor = data.llama().tensors[name].clone()
    for position, value in positions.items():
        tensor[position] = value
    return data.llama().changed({name: tensor})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_with_name_position_and_count(tmp_path, value):
    name = f"{MLP}up_proj.weight"
    line = _refusal(tmp_path, _with_values(name, {(130, 5): value, (300, 191): value, (300, 0): value}))
    assert line == (
        f"{name} in model.safetensors: 3 NaN or Inf values, the first at [130, 5] (expected finite weights); "
        "repair the weight, or keep it unquantized: --on-nonfinite keep"
    )


def test_shards_that_are_finished_are_kept_for_the_run_after_the_repair(tmp_path):
    name = f"{MLP}up_proj.weight"
    model = _with_values(name, {(0, 0): float("nan")})
    shards = {other: f"{int(other == name)}.safetensors" for other in model.tensors}
    source, target = data.write(tmp_path / "source", model, shards), tmp_path / "out"
    line = data.refusal(lambda: quantize_checkpoint(source, target), source, target, keeps_shards=True)
    assert line.startswith(f"{name} in 1.safetensors: 1 NaN or Inf value, the first at [0, 0]")


def test_a_fused_expert_that_is_not_finite_is_named_with_expert_row_and_column(tmp_path):
    model = data.fused_experts("gpt_oss", "kn")
    name = f"{MLP}experts.down_proj"
    tensor = model.tensors[name].clone()
    tensor[2, 79, 3] = float("nan")
    line = _refusal(tmp_path, model.changed({name: tensor}))
    assert line.endswith(
        "1 NaN or Inf value, the first at [2, 79, 3] (expected finite weights); "
        "repair the weight, or keep it unquantized: --on-nonfinite keep"
    )


def test_a_weight_that_is_not_finite_can_be_kept_with_its_partners(tmp_path):
    name, partner = f"{MLP}up_proj.weight", f"{MLP}gate_proj.weight"
    model = _with_values(name, {(130, 5): float("nan"), (300, 191): float("inf")})
    source = data.write(tmp_path / "source", model, shards=3)
    report = quantize_checkpoint(source, tmp_path / "out", on_nonfinite="keep")
    got = data.read(tmp_path / "out")
    for kept in (name, partner):
        assert_bitwise_equal(got[kept], model.tensors[kept])
        assert f"{kept}_scale_inv" not in got
    assert len(_quantized(tmp_path / "out")) == 5
    assert _skip(tmp_path / "out") == ["lm_head", f"{MLP}gate_proj", f"{MLP}up_proj"]
    assert report.warnings == (
        f"{name} keeps its precision: 2 NaN or Inf",
        f"{name} keeps its precision (2 NaN or Inf), so {partner} must too",
    )
    manifest = json.loads((tmp_path / "out" / "blockscale.json").read_text())
    assert manifest["options"]["kept"] == {name: "2 NaN or Inf"}


def test_a_lone_weight_that_is_not_finite_is_kept_with_a_warning(tmp_path):
    name = f"{MLP}down_proj.weight"
    source = data.write(tmp_path / "source", _with_values(name, {(0, 0): float("nan")}))
    report = quantize_checkpoint(source, tmp_path / "out", on_nonfinite="keep")
    assert _skip(tmp_path / "out") == ["lm_head", f"{MLP}down_proj"]
    assert report.warnings == (f"{name} keeps its precision: 1 NaN or Inf",)


def test_nothing_finite_left(tmp_path):
    model = data.llama()
    bad = {name: torch.full_like(t, float("nan")) for name, t in model.tensors.items() if "_proj" in name}
    line = _refusal(tmp_path, model.changed(bad), on_nonfinite="keep")
    assert line == "no tensor would be quantized; widen --include, narrow --exclude"


def test_values_that_are_not_finite_in_what_is_kept_anyway_are_no_fault(tmp_path):
    model = _with_values("model.norm.weight", {3: float("nan")})
    quantize_checkpoint(data.write(tmp_path / "source", model), tmp_path / "out")
    assert data.read(tmp_path / "out")["model.norm.weight"].isnan().sum() == 1


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Recipe("e4m3"), "unknown scale_fmt (expected float32 | ue8m0 | uf8m0 | null, got 'e4m3')"),
        (
            lambda: Recipe(layout="gguf"),
            "unknown layout (expected deepseek | compressed-tensors | w4afp8 | blockscale, got 'gguf')",
        ),
        (
            lambda: Recipe(block_size="0x128"),
            "bad block size (expected two positive integers, as 128x128, or auto, got '0x128')",
        ),
        (
            lambda: Recipe(block_size=(128, -1)),
            "bad block size (expected two positive integers, as 128x128, or auto, got (128, -1))",
        ),
    ],
)
def test_recipes_that_make_no_sense(make, line):
    with pytest.raises(BlockscaleError) as caught:
        make()
    assert str(caught.value) == line
