"""Small models with random weights, made and saved by transformers, to hold ours against."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 208,
    "moe_intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 48,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
V2 = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5, "norm_topk_prob": False}


def make(folder, family="v3", seed=0, **changes):
    """Save a model with `changes` to SMALL; the model of transformers, in float32."""
    name = f"Deepseek{family.upper()}"
    values = {**SMALL, **(V2 if family == "v2" else {}), **changes}
    config = getattr(transformers, f"{name}Config")(**values)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if key.endswith(("norm.weight", "layernorm.weight")):
                tensor.uniform_(0.5, 1.5)  # ones would hide a norm that is left out
            elif key.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.3, 0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model, tokens):
    """Float32 (T, vocab_size) of one sequence, from a model of transformers."""
    return model(torch.tensor([tokens])).logits[0].float()
