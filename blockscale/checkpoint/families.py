"""Model families by `model_type`: which modules are linear layers, the layout of fused experts, where MTP is.

A family is what a checkpoint's tensor names cannot tell by themselves. The lists were read off the model
definitions and weight conversion tables of transformers 5.23 (names on disk: one tensor an expert, although
version 5 fuses the experts in memory) and the published FP8 checkpoints of DeepSeek-V3, V3.2 and Qwen3-Next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from blockscale.checkpoint.config_fields import ConfigFields

# How a fused expert parameter (3-D, no `.weight`) is stored: "nk" is (E, out, in), as in a stack of
# `nn.Linear` weights; "kn" is (E, in, out).
ExpertLayout = Literal["nk", "kn"]

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
_LATENT_ATTENTION = frozenset({"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"})
_MIXTRAL_EXPERTS = frozenset({"w1", "w2", "w3"})


@dataclass(frozen=True)
class Family:
    """What is known of the checkpoints of one `model_type`.

    Attributes:
        model_type: the type the rules were chosen by (of the text part in a multimodal checkpoint).
        linears: last module names of the 2-D weights that engines run as quantized linear layers;
            every other 2-D weight is kept.
        expert_layout: axes of the fused expert parameters `experts.gate_up_proj` and `experts.down_proj`;
            None if not declared, and then they are kept: a shape cannot tell (E, out, in) from (E, in, out).
        mtp: where multi-token prediction modules live: "layers" (`layers.N` past the last decoder layer, N
            counted by `num_nextn_predict_layers`), "mtp" (a top-level module), or None.
        known: False for the generic rules of an unlisted type; the caller warns.
    """

    model_type: str
    linears: frozenset[str]
    expert_layout: ExpertLayout | None = None
    mtp: Literal["layers", "mtp"] | None = None
    known: bool = True


_DENSE = Family("", _ATTENTION | _MLP)
_MOE = replace(_DENSE, expert_layout="nk")
_DEEPSEEK = Family("", _LATENT_ATTENTION | _MLP, "nk", mtp="layers")
# The sparse-attention indexer: wq_b and wk are FP8 in the official checkpoint, `weights_proj` stays BF16.
_DEEPSEEK_SPARSE = replace(_DEEPSEEK, linears=_DEEPSEEK.linears | {"wq_b", "wk"})
_FUSED_MLP = Family("", _ATTENTION | {"gate_up_proj", "down_proj"})
_MIXTRAL = Family("", _ATTENTION | _MIXTRAL_EXPERTS, "nk")
# Lightning attention layers of MiniMax-01 and M1: fused qkv, an output gate that is a full linear layer.
_LIGHTNING = replace(_MIXTRAL, linears=_MIXTRAL.linears | _MLP | {"qkv_proj", "out_proj", "output_gate"})
# Gated delta nets: `in_proj_ba` (one row a head) stays unquantized in the official FP8 checkpoints.
_QWEN3_NEXT = replace(_MOE, linears=_MOE.linears | {"in_proj_qkvz", "out_proj"}, mtp="mtp")
_QWEN3_5 = replace(_MOE, linears=_MOE.linears | {"in_proj_qkv", "in_proj_z", "out_proj"}, mtp="mtp")

_FAMILIES: dict[str, Family] = {
    "deepseek_v2": replace(_DEEPSEEK, mtp=None),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK_SPARSE,
    "kimi_k2": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "glm_moe_dsa": _DEEPSEEK_SPARSE,
    "gemma": _DENSE,
    "gemma2": _DENSE,
    "gemma3": _DENSE,
    "glm": _FUSED_MLP,
    "glm4": _FUSED_MLP,
    "glm4_moe": replace(_MOE, mtp="layers"),
    "glm4v_moe": replace(_MOE, mtp="layers"),
    "gpt_oss": Family("", _ATTENTION, "kn"),
    "llama": _DENSE,
    "llama4": replace(_DENSE, expert_layout="kn"),
    "minimax": _LIGHTNING,
    "minimax_text_01": _LIGHTNING,
    "minimax_m1": _LIGHTNING,
    "minimax_m2": _MIXTRAL,
    "ministral3": _DENSE,
    "mistral": _DENSE,
    "mistral3": _DENSE,
    "mixtral": _MIXTRAL,
    "olmo2": _DENSE,
    "phi3": Family("", frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})),
    "qwen2": _DENSE,
    "qwen2_moe": _MOE,
    "qwen2_vl": _DENSE,
    "qwen2_5_vl": _DENSE,
    "qwen3": _DENSE,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_moe": _MOE,
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_vl": _DENSE,
    "qwen3_vl_moe": replace(_DENSE, expert_layout="kn"),
    "smollm3": _DENSE,
}

# The generic rule takes exact names, not the suffix `_proj`: a state-space model's dt_proj, a low-rank gate
# or a projector by that suffix would be quantized to no gain and some harm. All of these are (out, in).
_GENERIC_LINEARS = (
    _ATTENTION
    | _MLP
    | _LATENT_ATTENTION
    | _MIXTRAL_EXPERTS
    | {"qkv_proj", "out_proj", "gate_up_proj", "fc1", "fc2"}
    | {"query_key_value", "dense_h_to_4h", "dense_4h_to_h"}
)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a parsed config.json: itself, or what a multimodal wrapper nests in it."""
    for key in ("text_config", "language_config", "llm_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    return config


def family_of(config: dict[str, Any]) -> Family:
    """The family of a parsed config.json, by its text part's `model_type` first, then its own.

    An unlisted (or missing) type gets a family with `known=False`: only 2-D weights whose module has a name
    that means the same linear layer everywhere (`q_proj`, `down_proj`, `w1`, `fc1`, ...) are quantizable,
    fused experts are kept.
    """
    candidates = [str(part.get("model_type", "")) for part in (text_config(config), config)]
    for model_type in candidates:
        family = _FAMILIES.get(model_type) or _FAMILIES.get(model_type.removesuffix("_text"))
        if family is not None:
            return replace(family, model_type=model_type)
    return Family(candidates[-1] or "unknown", _GENERIC_LINEARS, known=False)


def mtp_prefixes(config: dict[str, Any]) -> tuple[str, ...]:
    """Name prefixes of multi-token prediction modules: `("model.layers.61.",)` for DeepSeek-V3, else `()`.

    A multimodal wrapper has two spellings of the path to its text layers, and both are given.

    Raises:
        BlockscaleError: the layer counts in the config are missing or senseless.
    """
    family, text = family_of(config), text_config(config)
    if family.mtp == "mtp":
        return ("mtp.",)
    fields = ConfigFields(text)
    count = 0 if family.mtp is None else fields.count("num_nextn_predict_layers", 0)
    if not count:
        return ()
    roots = ("model.",) if text is config else ("language_model.model.", "model.language_model.")
    first = fields.size("num_hidden_layers")
    return tuple(f"{root}layers.{layer}." for root in roots for layer in range(first, first + count))


def stored_block_size(block_size: tuple[int, int], shape: tuple[int, ...], family: Family) -> tuple[int, int]:
    """The block size over the last two axes of a weight as it is stored.

    Args:
        block_size: (block_n, block_k) over (out, in) features.
        shape: the stored shape; 3-D is a fused expert parameter.
        family: where its `expert_layout` is "kn" the axes are (E, in, out), so the two sides swap.
    """
    if len(shape) == 3 and family.expert_layout == "kn":
        return block_size[1], block_size[0]
    return block_size
