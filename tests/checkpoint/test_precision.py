"""Precision by role and pattern: which entry counts, what is refused, and what a conversion makes of it."""

import json

import pytest
import torch

from blockscale import (
    BlockscaleError,
    Recipe,
    dequantize_checkpoint,
    plan_checkpoint,
    quantize_checkpoint,
    verify_checkpoint,
)
from blockscale.checkpoint.names import role_of
from blockscale.checkpoint.precision import Precision, parse_precision
from blockscale.checkpoint.recipe import read_recipe
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

FP8 = torch.float8_e4m3fn
LAYER = "model.layers.1."
EXPERT, SHARED = f"{LAYER}mlp.experts.2.up_proj.weight", f"{LAYER}mlp.shared_experts.up_proj.weight"
QUERY, DENSE = f"{LAYER}self_attn.q_b_proj.weight", "model.layers.0.mlp.up_proj.weight"

SPELLINGS = "fp8 | fp8:ROWSxCOLUMNS | bf16 | int4[:g32|g64|g128][:ue8m0] | int3[...] | mxfp4"


def _quantized(folder):
    return {name for name, tensor in data.read(folder).items() if tensor.dtype == FP8}


def _roles(names):
    return {role_of(name) for name in names}


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.deepseek_v3(), shards=2)


@pytest.mark.parametrize(
    ("entries", "name", "wanted"),
    [
        ({}, EXPERT, None),
        ({"experts": "fp8"}, EXPERT, "fp8"),
        ({"experts": "fp8"}, f"{EXPERT}_scale_inv", "fp8"),
        ({"experts": "fp8"}, SHARED, None),
        ({"shared_experts": "fp8", "experts": "bf16"}, SHARED, "fp8"),
        ({"default": "bf16", "experts": "fp8"}, QUERY, "bf16"),
        ({"experts": "fp8", "default": "bf16"}, EXPERT, "fp8"),
        ({"model.layers.1.*": "bf16", "experts": "fp8"}, EXPERT, "bf16"),
        ({"*.experts.*": "fp8", "model.layers.1.*": "bf16"}, EXPERT, "bf16"),
        ({"model.layers.1.*": "bf16", "*.experts.*": "fp8"}, EXPERT, "fp8"),
        ({"*.q_b_proj": "fp8"}, QUERY, "fp8"),
        ({"*.q_b_proj.weight": "fp8"}, QUERY, "fp8"),
        ({"*.layers.?.self_attn.*": "fp8"}, DENSE, None),
        ({"default": "fp8"}, "lm_head.weight", None),
        ({"default": "bf16"}, "lm_head.weight", "bf16"),
        ({"default": "bf16", "head": "fp8"}, "lm_head.weight", "fp8"),
        ({"head": "fp8"}, "model.layers.61.shared_head.head.weight", "fp8"),
        ({"lm_head.weight": "fp8"}, "lm_head.weight", "fp8"),
        ({"default": "fp8"}, "model.layers.1.mixer.out_proj.weight", "fp8"),
        ({"*": "fp8"}, f"{LAYER}mlp.gate.weight", None),
        ({"*": "fp8"}, f"{LAYER}self_attn.q_a_layernorm.weight", None),
        ({"default": "bf16"}, "model.embed_tokens.weight", None),
    ],
)
def test_a_pattern_beats_a_role_and_a_role_the_default(entries, name, wanted):
    assert parse_precision(entries).precision_of(name) == wanted


def test_it_is_spelled_as_a_mapping_or_as_texts():
    expected = Precision((("experts", "fp8"), ("*.layers.0.*", "bf16")))
    assert parse_precision({"experts": "fp8", "*.layers.0.*": "bf16"}) == expected
    assert parse_precision(["experts=fp8", "*.layers.0.*=bf16"]) == expected
    assert parse_precision(expected.spelled()) == expected
    assert parse_precision(expected) is expected


def test_one_over_another_counts_where_both_speak():
    below = parse_precision({"experts": "fp8", "attention": "bf16"})
    both = parse_precision({"experts": "bf16"}).over(below)
    assert both.precision_of(EXPERT) == both.precision_of(QUERY) == "bf16"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (
            {"expert": "fp8"},
            "precision 'expert': unknown role (expected attention | dense_mlp | shared_experts | experts | "
            "head | default, or a pattern with a dot or a wildcard); did you mean experts?",
        ),
        (
            {"router": "fp8"},
            "precision 'router': role is never quantized and has no precision to set (expected attention | "
            "dense_mlp | shared_experts | experts | head | default, or a pattern with a dot or a wildcard)",
        ),
        (
            {"experts": "int2"},
            f"precision experts: unknown precision (expected {SPELLINGS}, got 'int2')",
        ),
        (
            {"experts": ["fp8"]},
            f"precision experts: unknown precision (expected {SPELLINGS}, got ['fp8'])",
        ),
        (
            ["experts"],
            f"bad precision (expected ROLE or PATTERN={SPELLINGS}, got 'experts')",
        ),
        (["experts=fp8", "experts=bf16"], "precision experts: given twice (expected one value)"),
        ("fp8", """bad precision (expected a mapping, as {"experts": "fp8"}, got 'fp8')"""),
    ],
)
def test_what_makes_no_sense(value, line):
    assert data.told(parse_precision, value) == line


@pytest.mark.parametrize(
    ("precision", "roles"),
    [
        ({}, {"attention", "dense_mlp", "shared_experts", "experts"}),
        ({"experts": "fp8"}, {"experts"}),
        ({"experts": "fp8", "attention": "bf16"}, {"experts"}),
        ({"attention": "bf16"}, {"dense_mlp", "shared_experts", "experts"}),
        ({"default": "fp8", "experts": "bf16"}, {"attention", "dense_mlp", "shared_experts"}),
        ({"default": "fp8", "head": "fp8"}, {"attention", "dense_mlp", "shared_experts", "experts", "head"}),
        ({"head": "fp8", "*.shared_experts.*": "fp8"}, {"shared_experts", "head"}),
    ],
)
def test_what_is_quantized_and_what_is_on_the_skip_list(tmp_path, source, precision, roles):
    recipe = Recipe(precision=precision)
    plan = plan_checkpoint(source, recipe)
    report = quantize_checkpoint(source, tmp_path / "out", recipe)
    quantized = _quantized(tmp_path / "out")
    assert _roles(quantized) == roles
    assert quantized == {name for name in data.read(source) if role_of(name) in roles}
    skip = data.read_config(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert not {f"{module}.weight" for module in skip} & quantized
    assert ("lm_head" in skip) == ("head" not in roles)
    assert (f"{LAYER}self_attn.o_proj" in skip) == ("attention" not in roles)
    assert plan.after == report.output_bytes
    assert {role.role for role in plan.roles if role.quantized} == roles
    assert verify_checkpoint(tmp_path / "out", source).ok


def test_a_layer_can_be_left_out_by_a_pattern(tmp_path, source):
    recipe = Recipe(precision={"experts": "fp8", "model.layers.2.*": "bf16"})
    plan = plan_checkpoint(source, recipe)
    quantize_checkpoint(source, tmp_path / "out", recipe)
    assert {name.split(".experts.")[0] for name in _quantized(tmp_path / "out")} == {f"{LAYER}mlp"}
    reasons = {"set to bf16", "not named by the precision", "router", "norm", "output head", "embedding"}
    assert plan.kept.keys() == reasons | {"MTP input projection"}


def test_weights_that_are_fused_share_what_is_set_for_one(tmp_path, source):
    recipe = Recipe(precision={"default": "fp8", "*.q_a_proj": "bf16", f"{LAYER}mlp.experts.0.*": "bf16"})
    report = quantize_checkpoint(source, tmp_path / "out", recipe)
    quantized = _quantized(tmp_path / "out")
    assert not any("kv_a_proj" in name or name.startswith(f"{LAYER}mlp.experts.") for name in quantized)
    assert QUERY in quantized
    name = "model.layers.0.self_attn."
    told = f"{name}q_a_proj.weight keeps its precision (set to bf16), so {name}kv_a_proj_with_mqa.weight "
    assert f"{told}must too" in report.warnings


def test_patterns_and_precision_narrow_each_other(tmp_path, source):
    recipe = Recipe(include=("*.mlp.*",), exclude=("*.shared_experts.*",), precision={"experts": "bf16"})
    quantize_checkpoint(source, tmp_path / "out", recipe)
    assert _roles(_quantized(tmp_path / "out")) == {"dense_mlp"}


def test_a_quantized_head_is_told_and_comes_back(tmp_path, source):
    report = quantize_checkpoint(source, tmp_path / "out", Recipe("ue8m0", precision={"head": "fp8"}))
    assert _quantized(tmp_path / "out") == {"lm_head.weight", "model.layers.2.shared_head.head.weight"}
    (told,) = report.warnings
    assert told.endswith(
        "is quantized: vLLM and SGLang keep the output head in high precision and load no FP8 one"
    )
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    error = (
        data.read(tmp_path / "back")["lm_head.weight"].float() - data.read(source)["lm_head.weight"].float()
    )
    assert 0 < error.norm() < 0.05 * data.read(source)["lm_head.weight"].float().norm()


def test_fused_experts_are_experts(tmp_path):
    source = data.write(tmp_path / "source", data.fused_experts("qwen3_moe", "nk"))
    quantize_checkpoint(source, tmp_path / "out", Recipe(precision={"experts": "fp8"}))
    assert _quantized(tmp_path / "out") == {
        f"model.layers.0.mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down")
    }


def test_a_role_that_a_model_lacks_may_be_left_alone_but_not_quantized(tmp_path):
    source = data.write(tmp_path / "source", data.llama(tied=True))
    quantize_checkpoint(source, tmp_path / "out", Recipe(precision={"experts": "bf16", "attention": "bf16"}))
    assert _roles(_quantized(tmp_path / "out")) == {"dense_mlp"}
    for role in ("experts", "head"):
        recipe = Recipe(precision={"attention": "fp8", role: "fp8"})
        assert data.told(quantize_checkpoint, source, tmp_path / "no", recipe) == (
            f"precision {role}=fp8: nothing becomes FP8 by it (expected linear weights, got no tensor of "
            "this role); leave it out, or name something else"
        )


@pytest.mark.parametrize(
    ("precision", "line"),
    [
        ({"*.q_porj": "bf16"}, "'*.q_porj': pattern matches no tensor (got 73 tensors, such as "),
        ({"experts": "fp8", "*.q_porj": "fp8"}, "'*.q_porj': pattern matches no tensor (got 73 tensors, "),
        (
            {"model.embed_tokens": "fp8"},
            "precision model.embed_tokens=fp8: nothing becomes FP8 by it (expected linear weights, "
            "got model.embed_tokens.weight: embedding); leave it out, or name something else",
        ),
        (
            {"*.mlp.gate": "fp8"},
            "precision *.mlp.gate=fp8: nothing becomes FP8 by it (expected linear weights, ",
        ),
        ({"*norm*": "fp8"}, "precision *norm*=fp8: nothing becomes FP8 by it (expected linear weights, "),
        (
            {"experts": "fp8", "*.experts.*": "bf16"},
            "precision experts=fp8: nothing becomes FP8 by it (expected linear weights, "
            f"got {LAYER}mlp.experts.0.up_proj.weight: set to bf16); ",
        ),
        (
            {"model.layers.0.self_attn.q_a_proj": "fp8"},
            "precision model.layers.0.self_attn.q_a_proj=fp8: nothing becomes FP8 by it (expected linear "
            "weights, got model.layers.0.self_attn.q_a_proj.weight: shares its precision with ",
        ),
        ({"default": "bf16"}, "no tensor would be quantized; set something to fp8"),
    ],
)
def test_what_cannot_be_given_is_refused(tmp_path, source, precision, line):
    target = tmp_path / "out"
    told = data.refusal(
        lambda: quantize_checkpoint(source, target, Recipe(precision=precision)), source, target
    )
    assert told.startswith(line)
    with pytest.raises(BlockscaleError) as caught:
        plan_checkpoint(source, Recipe(precision=precision))
    assert str(caught.value) == told


def test_a_recipe_file_has_it_and_the_manifest_tells_it(tmp_path, source):
    entries = {"experts": "fp8", "attention": "bf16", "model.layers.2.*": "bf16"}
    (tmp_path / "recipe.json").write_text(json.dumps({"precision": entries, "scale_fmt": "ue8m0"}))
    recipe = read_recipe(tmp_path / "recipe.json")
    assert recipe == Recipe("ue8m0", precision=entries)
    quantize_checkpoint(source, tmp_path / "out", recipe)
    manifest = json.loads((tmp_path / "out" / "blockscale.json").read_text())
    assert manifest["options"]["precision"] == [f"{key}={value}" for key, value in entries.items()]


@pytest.mark.parametrize("wrong", ['{"experts": "int2"}', '{"expert": "fp8"}', '"fp8"', "[1]"])
def test_a_bad_precision_in_a_recipe_file(tmp_path, wrong):
    (tmp_path / "recipe.json").write_text(f'{{"precision": {wrong}}}')
    line = data.told(read_recipe, tmp_path / "recipe.json")
    assert line is not None
    assert line.startswith(f"{tmp_path}/recipe.json: bad recipe: precision: ")


def test_the_order_of_patterns_is_part_of_the_plan(tmp_path, source):
    rules = [("*.experts.*", "fp8"), ("model.layers.1.*", "bf16")]
    quantize_checkpoint(source, tmp_path / "a", Recipe(precision=dict(rules)))
    quantize_checkpoint(source, tmp_path / "b", Recipe(precision={**dict(rules[::-1])}))
    assert len(_quantized(tmp_path / "b")) == 2 * len(_quantized(tmp_path / "a"))


def test_the_bytes_are_those_of_a_plain_conversion(tmp_path, source):
    quantize_checkpoint(source, tmp_path / "all", Recipe("ue8m0"))
    quantize_checkpoint(source, tmp_path / "some", Recipe("ue8m0", precision={"experts": "fp8"}))
    whole, some, before = (data.read(folder) for folder in (tmp_path / "all", tmp_path / "some", source))
    for name, tensor in some.items():
        assert_bitwise_equal(tensor, whole[name] if role_of(name) == "experts" else before[name], name)
