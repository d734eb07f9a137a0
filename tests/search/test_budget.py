"""`budget:SIZE` fits, leaves little, and takes from experts in the middle first."""

import json

import pytest
import torch

from blockscale import BlockscaleError, reference, verify_checkpoint
from blockscale.checkpoint.recipe import PRESETS
from blockscale.checkpoint.sizing import plan_checkpoint
from blockscale.group_spelling import parse_group_format
from blockscale.search.budget import NOISE, budget_recipe
from tests.search.conftest import blockscale

__all__ = ["blockscale"]
# Like DeepSeek-V3, with an eighth of the experts, each eight times as wide (shared ones too): less to plan.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 8 * 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256 // 8,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}


def precision(recipe):
    return dict(each.split("=") for each in recipe.precision.spelled())


def test_three_quarters_saved_need_three_bits_in_the_middle():
    recipe = budget_recipe(V3, "0.25x")
    plan = plan_checkpoint(V3, recipe)
    assert 0.9975 * 0.25 * plan.before < plan.after <= 0.25 * plan.before
    experts = 32 * 3  # weights of a layer
    assert plan.group_formats == {"int4:g128": 37 * experts, "int3:g128": 21 * experts}
    entries = precision(recipe)
    three = [int(key.split(".")[2]) for key, fmt in entries.items() if fmt == "int3:g128"]
    assert three == list(range(20, 41))  # of 61
    assert {entries[role] for role in ("attention", "dense_mlp", "shared_experts")} == {"fp8"}


def test_what_is_not_needed_is_not_taken():
    w4a8 = plan_checkpoint(V3, PRESETS["w4a8"])
    assert plan_checkpoint(V3, budget_recipe(V3, f"{w4a8.after}B")).after == w4a8.after
    assert precision(budget_recipe(V3, "720GB")) == {"default": "fp8"}
    half = plan_checkpoint(V3, budget_recipe(V3, "500GB"))
    assert 493e9 < half.after <= 500e9
    assert set(half.group_formats) == {"int4:g128"}


def test_beyond_experts_attention_gives_bits_too():
    recipe = budget_recipe(V3, "275GB")
    assert plan_checkpoint(V3, recipe).after <= 275e9
    assert recipe.precision.format_of("model.layers.5.self_attn.o_proj.weight").group is not None


@pytest.mark.parametrize("size", ["200GB", "0.1x"])
def test_a_size_that_no_format_reaches_is_refused_with_the_smallest(size):
    with pytest.raises(
        BlockscaleError, match=r"no assignment of these formats is that small.*272,073,597,184 bytes"
    ):
        budget_recipe(V3, size)


@pytest.mark.parametrize("name", NOISE)
def test_the_noise_of_the_formats_is_that_of_rounding(name):
    w = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    if name == "fp8":
        values = reference.dequantize_weight(*reference.quantize_weight(w), dtype=torch.float32)
    else:
        fmt = parse_group_format(name)
        values = reference.dequantize_group(*reference.quantize_group(w, fmt), fmt, 2048, torch.float32)
    measured = float((values - w).square().sum() / w.square().sum())
    assert measured == pytest.approx(NOISE[name], rel=0.03)


def test_quantize_with_a_budget_makes_a_checkpoint_of_that_size(blockscale, deepseek, tmp_path):
    before = sum(file.stat().st_size for file in deepseek.glob("*.safetensors"))
    out = tmp_path / "out"
    code, said, _ = blockscale("plan", deepseek, "--recipe", "budget:0.6x", "--json")
    assert code == 0
    assert json.loads(said)["after"] <= 0.6 * json.loads(said)["before"]
    assert blockscale("quantize", deepseek, out, "--recipe", "budget:0.6x")[0] == 0
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) < 0.7 * before
    assert verify_checkpoint(out, deepseek).ok


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--precision", "experts=int4"], "--precision: a budget says this itself"),
        (["--layout", "compressed-tensors"], "--layout: a budget says this itself"),
        (["--recipe", "budget:"], "bad size"),
        (["--recipe", "budget:tiny"], "bad size"),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused(blockscale, deepseek, tmp_path, options, line):
    code, _, error = blockscale("quantize", deepseek, tmp_path / "out", "--recipe", "budget:0.6x", *options)
    assert code == 2
    assert line in error
    assert not (tmp_path / "out").exists()
