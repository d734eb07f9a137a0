"""What a tensor is by its name: its role, why it stays unquantized, and which weights must share a precision.

Names are full tensor names of Hugging Face checkpoints (`model.layers.3.mlp.experts.7.up_proj.weight`), with
or without the prefix of a multimodal wrapper. The rules compare whole path segments, so `gate` (a router)
and `gate_proj` (a linear layer) stay apart; only vision and audio parts are found by a part of a word.

Sources: DeepSeek-V3's `README_WEIGHTS.md` and checkpoint (what is BF16 and F32 there), vLLM's fused layers
(qkv, gate_up, `fused_qkv_a_proj`, one expert kernel a layer).
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Iterable
from typing import Literal

from blockscale.checkpoint.families import Family
from blockscale.errors import BlockscaleError
from blockscale.formats import HIGH_PRECISION, module_path, scaled_weight_name

Role = Literal[
    "embedding",
    "head",
    "norm",
    "router",
    "attention",
    "dense_mlp",
    "shared_experts",
    "experts",
    "mtp_projection",
    "vision",
    "bias",
    "other",
]

_VISION = re.compile(r"vision|visual|image|video|audio|speech|projector|multi_?modal|patch_merge")
_EMBEDDINGS = {"embed_tokens", "embed_tokens_per_layer", "tok_embeddings", "word_embeddings", "wte", "wpe"}
_HEADS = {"lm_head", "embed_out"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_SHARED = {"shared_experts", "shared_expert", "shared_mlp"}
_ATTENTION = {"self_attn", "linear_attn", "cross_attn", "self_attention", "attention", "attn"}
_MLP = {"mlp", "feed_forward", "ffn", "block_sparse_moe"}
# Last module names that engines run as one merged linear layer, which has one precision.
_MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)

# Roles that are not quantized, the head unless it is asked for, and the reason given for them.
_KEPT_ROLES: dict[Role, str] = {
    "embedding": "embedding",
    "head": "output head",
    "norm": "norm",
    "router": "router",
    "mtp_projection": "MTP input projection",
    "vision": "vision or audio part",
    "bias": "bias",
}

_FUSED_EXPERTS = re.compile(r"(?:^|\.)experts\.(?:gate_up_proj|down_proj)$")
_LAYER_NORM = re.compile(r"ln_?\w{1,2}")


@functools.lru_cache(maxsize=1 << 17)  # the names of DeepSeek-V3 and of its scales: plans ask for each often
def role_of(name: str) -> Role:
    """The role of a tensor, by its full name; a scale has the role of the weight it belongs to."""
    path = (scaled_weight_name(name) or name).split(".")
    modules = path[:-1] or path
    leaf, parameter = modules[-1], path[-1]
    if _VISION.search(name) or path[0] == "mlp1":  # mlp1 is the projector of InternVL
        return "vision"
    if leaf in _EMBEDDINGS:
        return "embedding"
    if leaf in _HEADS or modules[-2:] == ["shared_head", "head"]:
        return "head"
    if leaf == "eh_proj" or modules == ["mtp", "fc"]:
        return "mtp_projection"
    if "norm" in leaf or _LAYER_NORM.fullmatch(leaf):
        return "norm"
    if _ROUTERS.intersection(modules) or parameter == "e_score_correction_bias":
        return "router"
    if parameter.endswith("bias"):
        return "bias"
    return _block_role(set(path))


def _block_role(segments: set[str]) -> Role:
    if "experts" in segments:
        return "experts"
    if segments & _SHARED:
        return "shared_experts"
    if segments & _ATTENTION:
        return "attention"
    return "dense_mlp" if segments & _MLP else "other"


def matches(name: str, pattern: str) -> bool:
    """Whether a shell-style pattern matches a full tensor name or its module path."""
    return bool(matcher(pattern)(name))


@functools.lru_cache(maxsize=4096)
def matcher(pattern: str) -> Callable[[str], object]:
    """`matches` of one pattern, for many names: what it returns is true of those that match."""
    # A module path is the name without ".weight".
    return re.compile(f"{fnmatch.translate(pattern)}|{fnmatch.translate(f'{pattern}.weight')}").match


def check_patterns(patterns: Iterable[str], names: Collection[str]) -> None:
    """Refuse a pattern that matches none of the tensors.

    Raises:
        BlockscaleError: a pattern with a typo would do, silently, the contrary of what was meant.
    """
    for pattern in patterns:
        if not any(map(matcher(pattern), names)):
            raise BlockscaleError(
                "pattern matches no tensor",
                where=repr(pattern),
                got=f"{len(names)} tensors, such as {next(iter(names), 'none')}",
                remedy="patterns are shell-style and match the full name or module path",
            )


def keep_reason(
    name: str, shape: tuple[int, ...], dtype: str, family: Family, *, head: bool = False
) -> str | None:
    """Why a tensor stays as it is, in a few words; None if it is a linear weight that can be quantized.

    Quantizable are 2-D `*.weight` tensors of `family.linears` inside numbered layers, and 3-D fused expert
    parameters (`experts.gate_up_proj`, `experts.down_proj`) if the family declares their layout.

    Args:
        name: full tensor name.
        shape: (N, K), or (E, ., .) for fused experts; anything else is kept.
        dtype: safetensors dtype name; only BF16, F16 and F32 can be quantized.
        family: from `families.family_of`.
        head: whether the output head may be quantized.
    """
    role = role_of(name)
    if role in _KEPT_ROLES and not (head and role == "head"):
        return _KEPT_ROLES[role]
    if dtype not in HIGH_PRECISION:
        return f"{dtype} is not a high-precision float"
    if 0 in shape:
        return "empty tensor"
    if _FUSED_EXPERTS.search(name) and len(shape) == 3:
        return None if family.expert_layout else "fused experts of undeclared layout"
    if not name.endswith(".weight"):
        return "not a linear weight"
    if len(shape) != 2:
        return f"{len(shape)}-D weight"
    if role == "head":
        return None
    modules = module_path(name).split(".")
    if modules[-1] not in family.linears:
        return f"not a quantized layer of {family.model_type}"
    if not any(segment.isdecimal() for segment in modules):
        return "outside the numbered layers"
    return None


def sharing_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of weights that engines fuse, so that all of a group must have one precision.

    They are q/k/v, gate/up (w1/w3), `q_a_proj` with `kv_a_proj_with_mqa`, and all the experts of a layer (one
    kernel runs them). Only groups of two or more present weights are returned, in order of first appearance.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        layer = _fused_layer(name)
        if layer is not None:
            groups.setdefault(layer, []).append(name)
    return [tuple(members) for members in groups.values() if len(members) > 1]


def _fused_layer(name: str) -> tuple[str, ...] | None:
    """What identifies the fused layer a weight becomes part of: (parent module, merged names), or None."""
    if not (name.endswith(".weight") or _FUSED_EXPERTS.search(name)):
        return None
    role = role_of(name)
    if role in _KEPT_ROLES:
        return None
    if role == "experts":
        return name.split("experts.")[0], "experts"
    parent, _, leaf = module_path(name).rpartition(".")
    merged = next((leaves for leaves in _MERGED if leaf in leaves), None)
    return None if merged is None else (parent, *merged)
