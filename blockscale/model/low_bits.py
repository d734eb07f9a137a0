"""Weights of fewer than 8 bits on their way from a checkpoint into a model.

Routed experts in formats of which there are W4A8 products stay as they are, prepared for these; all other
weights are dequantized as they are read. Whatever the layout of the checkpoint, codes and scales are first
brought into ours (`group_storage`), a weight at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale import ops
from blockscale.checkpoint.group_storage import check_companions
from blockscale.errors import CorruptCheckpointError
from blockscale.group_spelling import WrittenFormat, spell_group_format
from blockscale.model.linear import W4Experts
from blockscale.model.slices import Part
from blockscale.model.stack import below
from blockscale.reference import W4Weight
from blockscale.reference.w4 import multiplies

if TYPE_CHECKING:
    from blockscale.model.weights import Weights

_LEAVES = ("gate", "up", "down")


def stays(weights: Weights, expert: str, group: WrittenFormat, hidden: int, width: int) -> bool:
    """Whether the experts of a layer are multiplied as they are stored; `expert` is one of them."""
    paths = (f"{weights.prefix}{expert}.{leaf}_proj.weight" for leaf in _LEAVES)
    as_stored = all(weights.precision.precision_of(path) is None for path in paths)
    return as_stored and multiplies(group, hidden, width)


def w4_experts(
    weights: Weights, numbers: range, hidden: int, width: int, group: WrittenFormat
) -> tuple[W4Experts, W4Experts]:
    """gate_proj above up_proj, and down_proj, of these experts, each read and prepared by itself.

    Raises:
        CorruptCheckpointError: a missing tensor, a wrong shape, or another format.
    """
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    made: dict[str, W4Weight] = {}
    for place, number in enumerate(numbers):
        own = weights.at(f"experts.{number}")
        gate, up, down = (
            _packed(own, f"{leaf}_proj.weight", group, shape)
            for leaf, shape in zip(_LEAVES, shapes, strict=True)
        )
        gate_up = below([gate[0], up[0]]), below([gate[1], up[1]])
        for name, (codes, scale), columns in (("gate_up", gate_up, hidden), ("down", down, width)):
            one = ops.prepare_w4(codes, scale, group, columns)
            if name not in made:
                made[name] = one.room_for(len(numbers))
            room = made[name]
            room.words[place].copy_(one.words)
            room.scale[place].copy_(one.scale)
        weights.store.formats[spell_group_format(group)] += len(_LEAVES)
    above, under = (W4Experts(made[name], weights.fmt, weights.compute) for name in ("gate_up", "down"))
    return above, under


def dequantized(weights: Weights, name: str, group: WrittenFormat, parts: tuple[Part, Part]) -> torch.Tensor:
    """A whole weight (N, K) in the dtype of the model.

    Raises:
        CorruptCheckpointError: a missing tensor or a wrong shape.
    """
    rows, columns = (part.size for part in parts)
    packed = _packed(weights, name, group, (rows, columns))
    weights.store.converted[f"dequantized from {spell_group_format(group)}"] += 1
    return ops.dequantize_group(*packed, group, columns, weights.dtype)


def _packed(
    weights: Weights, name: str, group: WrittenFormat, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight of this shape, as operators take them, whatever the layout."""
    tensors, found = weights.store.tensors, weights.low.get(weights.prefix + name)
    if found is None or found.fmt != group:
        raise CorruptCheckpointError(
            "experts of a layer differ in format",
            where=weights.prefix + name,
            expected=spell_group_format(group),
            got="another" if found is None else spell_group_format(found.fmt),
        )
    there = [each for each in (found.codes, *found.companions) if each in tensors]
    check_companions(found, {each: (tensors[each].dtype, tensors[each].shape) for each in there})
    weights.store.read.update(there)
    storage = found.storage
    codes, scale = (
        weights.read(name + leaf, tuple(Part((size,)) for size in stored)).to(weights.device)
        for leaf, (_, stored) in zip((storage.codes, storage.scale), storage.signatures(shape), strict=True)
    )
    return storage.packed(codes, shape[1]), storage.own_scale(scale)
