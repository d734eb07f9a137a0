"""A configuration of Hugging Face to change, and what a refusal says."""

import pytest

from blockscale.errors import BlockscaleError

BAD = "; correct it, or fetch the file again"
ORIGINAL = {
    "model_type": "deepseek_v3",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 160,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4, "mscale": 1.0},
}


def changed(**changes):
    """The plain configuration with some keys changed; ... takes one away."""
    return {key: value for key, value in {**ORIGINAL, **changes}.items() if value is not ...}


def refusal(call):
    with pytest.raises(BlockscaleError) as caught:
        call()
    return str(caught.value)
