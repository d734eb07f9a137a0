"""Tiny checkpoints of several architectures, and what transformers alone makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from blockscale import reference
from blockscale.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from tests import data

transformers = pytest.importorskip("transformers")

# No size is a multiple of 128, and 72 and 200 none of 16: no GEMM takes those.
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 192,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
}
QWEN3_MOE = {
    "vocab_size": 64,
    "hidden_size": 160,
    "intermediate_size": 144,
    "moe_intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "initializer_range": 0.15,
}
DEEPSEEK_V3 = {
    "vocab_size": 64,
    "hidden_size": 160,
    "intermediate_size": 208,
    "moe_intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 48,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.15,
}
MODELS = {
    "llama": ("Llama", LLAMA),
    "qwen3_moe": ("Qwen3Moe", QWEN3_MOE),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK_V3),
}
TOKENS = torch.randint(64, (2, 11), generator=torch.Generator().manual_seed(3))


def make(folder, name, dtype=torch.bfloat16, **changes):
    """Save a model with random weights; the folder."""
    prefix, values = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**{**values, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                tensor.uniform_(-0.3, 0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


def quantize(source, folder, **recipe):
    """Quantize a checkpoint; the new folder."""
    quantize_checkpoint(source, folder, Recipe(**recipe))
    return folder


def plain(folder, **options):
    """The model of transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def dequantized(fp8, folder):
    """An FP8 checkpoint's weights in float32, as a model of transformers alone."""
    dequantize_checkpoint(fp8, folder, dtype="F32")
    return plain(folder)


def fake_quantized(model, fp8):
    """The model with inputs of what is FP8 in a checkpoint quantized and dequantized by the reference."""
    model = copy.deepcopy(model)
    config = data.read_config(fp8)["quantization_config"]
    group, scale_fmt = config["weight_block_size"][1], config.get("scale_fmt", "float32")
    stored = {
        name.removesuffix(".weight") for name, each in data.read(fp8).items() if each.element_size() == 1
    }

    def fake(x):
        codes, scale = reference.quantize_activation(x, group, scale_fmt)
        return reference.dequantize_activation(codes, scale, group, x.dtype)

    def before(module, inputs):
        return (fake(inputs[0]), *inputs[1:])

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path in stored:
            module.register_forward_pre_hook(before)
        elif hasattr(module, "gate_up_proj") and any(name.startswith(f"{path}.") for name in stored):
            module.register_forward_pre_hook(before)
            gate = module._apply_gate
            module._apply_gate = lambda x, gate=gate: fake(gate(x))
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits.float()
