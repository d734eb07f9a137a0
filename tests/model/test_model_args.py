"""Config files of DeepSeek's own folder: what a key means, the shipped ones, every refusal."""

import math
from pathlib import Path

import pytest

from blockscale.model.config import from_deepseek, load_config
from tests.model.configs import BAD, refusal

SHIPPED = Path(__file__).parent.parent.parent / "inference" / "configs"
MEASURES = (
    "hidden_size",
    "num_hidden_layers",
    "n_routed_experts",
    "n_group",
    "topk_method",
    "q_lora_rank",
    "dtype",
)


@pytest.mark.parametrize(
    ("name", "measures", "mscale", "scale_fmt"),
    [
        ("16B", (2048, 27, 64, 1, "greedy", None, "bf16"), 0.707, "float32"),
        ("236B", (5120, 60, 160, 8, "group_limited_greedy", 1536, "bf16"), 1.0, "float32"),
        ("671B", (7168, 61, 256, 8, "noaux_tc", 1536, "fp8"), 1.0, "float32"),
        ("v3.1", (7168, 61, 256, 8, "noaux_tc", 1536, "fp8"), 1.0, "ue8m0"),
    ],
)
def test_the_shipped_configurations(name, measures, mscale, scale_fmt):
    config = load_config(SHIPPED / f"config_{name}.json")
    assert tuple(getattr(config, field) for field in MEASURES) == measures
    assert (config.scale_fmt, config.max_position_embeddings) == (scale_fmt, 16384)
    assert config.weight_block_size == ((128, 128) if config.dtype == "fp8" else None)
    assert config.norm_topk_prob == (config.scoring_func == "sigmoid")
    # The reference scales the logits, and never cos and sin.
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.1 * mscale * math.log(40) + 1) ** 2)
    assert config.rope_attention_scale == 1.0


def test_an_empty_file_of_deepseek_has_the_defaults_of_the_reference():
    config = from_deepseek({})
    assert config == from_deepseek({"max_seq_len": 16384, "max_batch_size": 1})
    assert str(config) == (
        "vocab_size=102400 hidden_size=2048 intermediate_size=10944 num_hidden_layers=27 "
        "num_attention_heads=16 max_position_embeddings=16384 q_lora_rank=None kv_lora_rank=512 "
        "qk_nope_head_dim=128 qk_rope_head_dim=64 v_head_dim=128 n_routed_experts=64 n_shared_experts=2 "
        "num_experts_per_tok=6 moe_intermediate_size=1408 first_k_dense_replace=1 moe_layer_freq=1 "
        "n_group=1 topk_group=1 topk_method='greedy' scoring_func='softmax' norm_topk_prob=False "
        "routed_scaling_factor=1.0 rms_norm_eps=1e-06 rope_theta=10000.0 rope_interleave=True "
        "rope_scaling=Yarn(factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, "
        "beta_slow=1.0, mscale=None, mscale_all_dim=1.0, attention_factor=1.0) num_nextn_predict_layers=0 "
        "tie_word_embeddings=False attention_bias=False bos_token_id=None eos_token_id=() dtype='bf16' "
        "scale_fmt='float32' weight_block_size=None precision=Precision(entries=()) stored=None"
    )


def test_yarn_applies_past_the_original_context():
    assert from_deepseek({}, max_seq_len=4097).rope_scaling is not None
    plain = from_deepseek({}, max_seq_len=4096)
    assert (plain.rope_scaling, plain.softmax_scale, plain.rope_attention_scale) == (None, 192**-0.5, 1.0)
    assert from_deepseek({"max_seq_len": 2048}).max_position_embeddings == 2048
    assert from_deepseek({"mscale": 0}).softmax_scale == 192**-0.5


@pytest.mark.parametrize("spelling", ["ue8m0", "uf8m0"])
def test_both_spellings_of_the_scale_format(spelling):
    config = from_deepseek({"dtype": "fp8", "scale_fmt": spelling})
    assert (config.scale_fmt, config.weight_block_size) == ("ue8m0", (128, 128))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"n_expert_group": 8},
            "unknown key n_expert_group (expected names of DeepSeek's ModelArgs); "
            "did you mean n_expert_groups?",
        ),
        (
            {"hidden_size": 64},
            "unknown key hidden_size (expected names of DeepSeek's ModelArgs); did you mean dim?",
        ),
        ({"dim": -1}, f"bad dim (expected greater than 0, got -1){BAD}"),
        ({"moe_inter_dim": "fp8"}, f"bad moe_inter_dim (expected a valid integer, got 'fp8'){BAD}"),
        ({"n_expert_groups": 7}, f"bad n_expert_groups (expected a divisor of 64 experts, got 7){BAD}"),
        (
            {"n_limited_groups": 2},
            f"bad n_limited_groups (expected at most 1, the number of groups, got 2){BAD}",
        ),
        (
            {"n_expert_groups": 32},
            "bad n_activated_experts (expected 1 to 2, the experts of the chosen groups, got the default 6)"
            + BAD,
        ),
        ({"rope_factor": 0.5}, f"bad rope_factor (expected greater than or equal to 1, got 0.5){BAD}"),
        ({"original_seq_len": None}, f"bad original_seq_len (expected a valid integer, got None){BAD}"),
        ({"dtype": "int8"}, f"bad dtype (expected 'bf16' or 'fp8', got 'int8'){BAD}"),
        (
            {"scale_fmt": "e8m0"},
            "unknown scale_fmt (expected float32 | ue8m0 | uf8m0 | null, got 'e8m0')" + BAD,
        ),
        ({"max_seq_len": 0}, f"bad max_seq_len (expected greater than 0, got 0){BAD}"),
    ],
)
def test_a_file_of_deepseek_that_cannot_be_honoured(values, line):
    assert refusal(lambda: from_deepseek(values, where="mine.json")) == f"mine.json: {line}"


def test_an_unknown_key_that_resembles_none_is_answered_with_all_of_them():
    line = refusal(lambda: from_deepseek({"zzz": 1}))
    assert line.startswith("config: unknown key zzz (expected max_batch_size, max_seq_len, dtype, ")
    assert line.endswith(", mscale); remove it")
