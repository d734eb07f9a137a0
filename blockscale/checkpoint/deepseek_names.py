"""Names in the shards of DeepSeek's `inference` folder, and how each tensor is divided over its ranks.

A rank reads `model{rank}-mp{world}.safetensors`. Column-parallel layers are split by output rows (dim 0),
row-parallel ones by input columns (dim 1), routed experts by index; everything else every rank has whole. A
scale is `X.scale` beside `X.weight`. DeepSeek's script leaves the multi-token prediction layer out; here it
is `layers.N`, N = num_hidden_layers, with `embed`, `enorm`, `hnorm`, `eh_proj`, `shared_head.norm` and
`shared_head.head` beside what every layer has.

Source: `ParallelEmbedding`, `ColumnParallelLinear`, `RowParallelLinear` and their uses in DeepSeek-V3
`inference/model.py`; the names in `inference/convert.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from blockscale.errors import CorruptCheckpointError
from blockscale.formats import scale_name, scaled_weight_name

RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
# What has to divide among the ranks: whole heads, whole experts, or nothing but rows or columns.
Unit = Literal["heads", "experts"]


def rank_file(rank: int, world: int) -> str:
    """File name of one rank's shard."""
    return f"model{rank}-mp{world}.safetensors"


@dataclass(frozen=True)
class Module:
    """A module there: its path, with `#` for every number, and how it is divided.

    Attributes:
        path: as `layers.#.attn.wq_b`.
        dim: of its weight that is split, None where every rank has all of it.
        unit: what is never divided itself.
    """

    path: str
    dim: int | None = None
    unit: Unit | None = None


@dataclass(frozen=True)
class Place:
    """Where a tensor goes.

    Attributes:
        name: its name there.
        dim: along which it is split, or None.
        unit: what is never divided itself; "experts" go whole to one rank.
        layer: index of its layer, None for the embedding, the last norm and the head.
        expert: index of the routed expert that it belongs to, or None.
    """

    name: str
    dim: int | None
    unit: Unit | None
    layer: int | None
    expert: int | None


def _mlp(theirs: str, ours: str, unit: Unit | None = None) -> dict[str, Module]:
    expert = unit is not None
    return {
        f"{theirs}.gate_proj": Module(f"{ours}.w1", None if expert else 0, unit),
        f"{theirs}.down_proj": Module(f"{ours}.w2", None if expert else 1, unit),
        f"{theirs}.up_proj": Module(f"{ours}.w3", None if expert else 0, unit),
    }


_LAYER = {
    "input_layernorm": Module("attn_norm"),
    "post_attention_layernorm": Module("ffn_norm"),
    "self_attn.q_proj": Module("attn.wq", 0, "heads"),
    "self_attn.q_a_proj": Module("attn.wq_a"),
    "self_attn.q_a_layernorm": Module("attn.q_norm"),
    "self_attn.q_b_proj": Module("attn.wq_b", 0, "heads"),
    "self_attn.kv_a_proj_with_mqa": Module("attn.wkv_a"),
    "self_attn.kv_a_layernorm": Module("attn.kv_norm"),
    "self_attn.kv_b_proj": Module("attn.wkv_b", 0, "heads"),
    "self_attn.o_proj": Module("attn.wo", 1, "heads"),
    **_mlp("mlp", "ffn"),
    "mlp.gate": Module("ffn.gate"),
    **_mlp("mlp.experts.#", "ffn.experts.#", "experts"),
    **_mlp("mlp.shared_experts", "ffn.shared_experts"),
    # Of multi-token prediction.
    "embed_tokens": Module("embed", 0),
    "enorm": Module("enorm"),
    "hnorm": Module("hnorm"),
    "eh_proj": Module("eh_proj"),
    "shared_head.norm": Module("shared_head.norm"),
    "shared_head.head": Module("shared_head.head", 0),
}
_MODULES = {
    "model.embed_tokens": Module("embed", 0),
    "model.norm": Module("norm"),
    "lm_head": Module("head", 0),
    **{
        f"model.layers.#.{path}": Module(f"layers.#.{module.path}", module.dim, module.unit)
        for path, module in _LAYER.items()
    },
}
_PATHS = {module.path: path for path, module in _MODULES.items()}
_ROUTER_BIAS = "e_score_correction_bias"


def place_of(name: str) -> Place:
    """Where a tensor of a Hugging Face checkpoint goes; a scale goes where its weight does.

    Raises:
        CorruptCheckpointError: no tensor of DeepSeek-V2 or V3 has this name.
    """
    weight = scaled_weight_name(name)
    path, _, parameter = (weight or name).rpartition(".")
    pattern, numbers = _numbers_apart(path)
    module = _MODULES.get(pattern)
    router = pattern.endswith(".mlp.gate")
    known = ("weight",) if weight else ("weight", _ROUTER_BIAS if router else "bias")
    if module is None or parameter not in known:
        raise CorruptCheckpointError(
            "has no place in DeepSeek's inference shards",
            where=name,
            expected="tensors of DeepSeek-V2 or V3 as transformers names them",
            remedy="does the checkpoint belong to this architecture?",
        )
    theirs = "scale" if weight else "weight" if parameter == "weight" else "bias"
    # Of a row-parallel layer the sum over the ranks is biased, once.
    dim = None if theirs == "bias" and module.dim == 1 else module.dim
    indices = [int(number) for number in numbers]
    return Place(
        f"{_numbers_back(module.path, numbers)}.{theirs}",
        dim,
        module.unit,
        indices[0] if indices else None,
        indices[1] if module.unit == "experts" else None,
    )


def huggingface_name(name: str) -> str:
    """Hugging Face's name of a tensor of an inference shard; the inverse of `place_of(...).name`.

    Raises:
        CorruptCheckpointError: it has no such name.
    """
    path, _, parameter = name.rpartition(".")
    pattern, numbers = _numbers_apart(path)
    module = _PATHS.get(pattern)
    bias = _ROUTER_BIAS if pattern.endswith(".ffn.gate") else "bias"
    ours = {"weight": "weight", "scale": scale_name("weight"), "bias": bias}.get(parameter)
    if module is None or ours is None:
        raise CorruptCheckpointError(
            "is no tensor of DeepSeek's inference shards",
            where=name,
            remedy="was it written by another version, or for another architecture?",
        )
    return f"{_numbers_back(module, numbers)}.{ours}"


def _numbers_apart(path: str) -> tuple[str, list[str]]:
    """The path with `#` for every number, and the numbers."""
    segments = path.split(".")
    numbers = [segment for segment in segments if re.fullmatch("[0-9]{1,9}", segment)]
    if "#" in segments:
        return "", []
    return ".".join("#" if segment in numbers else segment for segment in segments), numbers


def _numbers_back(pattern: str, numbers: list[str]) -> str:
    parts = pattern.split("#")
    return "".join(part + number for part, number in zip(parts, [*numbers, ""], strict=True))
