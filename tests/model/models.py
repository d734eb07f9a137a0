"""Small models with random weights, made and saved by transformers, to hold ours against."""

import copy
import json

import pytest
import torch

from tests import data

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
            elif key.endswith("bias"):
                tensor.uniform_(-0.3, 0.3)
    model.save_pretrained(folder)
    return model


def make_mtp(folder, family="v3", *, likely=False, **changes):
    """Save a model with a multi-token prediction layer: random, or with drafts that are often right.

    Returns the model of transformers without the layer, and with it alone: between what goes into the decoder
    layer and what the head takes. The layer is the last of a model with one more.
    """
    depth = changes.pop("num_hidden_layers", SMALL["num_hidden_layers"])
    theirs = make(folder, family, num_hidden_layers=depth + 1, **changes)
    alone = copy.deepcopy(theirs.model)
    theirs.model.layers, alone.layers = theirs.model.layers[:depth], theirs.model.layers[depth:]
    hidden, generator = theirs.config.hidden_size, torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.rand(shape, generator=generator)

    extras = {
        "enorm.weight": 0.5 + random(hidden),
        "hnorm.weight": 0.5 + random(hidden),
        "eh_proj.weight": (random(hidden, 2 * hidden) - 0.5) / 2,
        "shared_head.norm.weight": 0.5 + random(hidden),
        "embed_tokens.weight": theirs.model.embed_tokens.weight,
        "shared_head.head.weight": theirs.lm_head.weight,
    }
    with torch.no_grad():
        if likely:
            # Then the embedding of a token alone says much of the next one, to the model and to the layer.
            theirs.model.embed_tokens.weight *= 100
            extras["eh_proj.weight"] = 100 * torch.eye(hidden, 2 * hidden)
            extras |= {
                "enorm.weight": torch.ones(hidden),
                "shared_head.norm.weight": theirs.model.norm.weight,
            }
        alone.norm.weight.copy_(extras["shared_head.norm.weight"])

    def change(tensors):
        tensors["model.embed_tokens.weight"] = theirs.model.embed_tokens.weight.detach()
        prefix = f"model.layers.{depth}."
        tensors |= {prefix + name: value.detach().clone() for name, value in extras.items()}

    data.rewrite(folder, change)
    config = data.read_config(folder) | {"num_hidden_layers": depth, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return theirs, alone, extras


def tiny_mtp(folder):
    """Save tiny-deepseek-v3 with a layer that was not trained: its last one, on the sum of the two inputs."""
    tensors, config = data.read(data.TINY_DEEPSEEK), data.read_config(data.TINY_DEEPSEEK)
    depth, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, prefix = f"model.layers.{depth - 1}.", f"model.layers.{depth}."
    layer = {prefix + name.removeprefix(last): each for name, each in tensors.items() if last in name}
    ones, eye = torch.ones(hidden, dtype=torch.bfloat16), torch.eye(hidden, dtype=torch.bfloat16)
    layer |= {
        f"{prefix}enorm.weight": ones,
        f"{prefix}hnorm.weight": ones,
        f"{prefix}eh_proj.weight": torch.cat([eye, eye], 1),
        f"{prefix}shared_head.norm.weight": tensors["model.norm.weight"],
    }
    copies = {name: each.clone() for name, each in layer.items()}
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: (data.TINY_DEEPSEEK / name).read_bytes() for name in names}
    data.write(folder, data.Model(tensors | copies, config | {"num_nextn_predict_layers": 1}, files))


@torch.no_grad()
def logits(model, tokens):
    """Float32 (T, vocab_size) of one sequence, from a model of transformers."""
    return model(torch.tensor([tokens])).logits[0].float()
