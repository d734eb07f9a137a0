"""Linear layers put together: below each other, side by side, or as the experts of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from blockscale import ops
from blockscale.errors import BlockscaleError, CorruptCheckpointError
from blockscale.formats import BlockFP8
from blockscale.model.linear import Linear

_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Parallel:
    """Layers of the same input that cannot be one, for their formats or block edges; outputs side by side."""

    layers: tuple[Linear, ...]
    quantizes: ClassVar[None] = None  # each layer does that for itself

    def on(self, x: ops.Normed) -> torch.Tensor:
        """The product with a norm that is not quantized."""
        assert x.y is not None
        return self(x.y)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, K) -> (T, N), the sum of all N."""
        return torch.cat([layer(x) for layer in self.layers], -1)


def stacked(layers: Sequence[Linear]) -> Linear:
    """Layers of the same input and format as one, their outputs side by side."""
    first = layers[0]
    scale = None if first.scale is None else below([layer.scale for layer in layers])
    bias = None if first.bias is None else below([layer.bias for layer in layers])
    return replace(first, weight=below([layer.weight for layer in layers]), scale=scale, bias=bias)


def below(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Tensors of one dtype and the same columns, one below the other."""
    parts = [each for each in tensors if each is not None]
    raw = torch.cat([_bytes(each) for each in parts])  # FP8 tensors cannot be concatenated everywhere
    return raw.view(parts[0].dtype).view(-1, *parts[0].shape[1:])


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def more_rows(layer: Linear, more: int) -> Linear:
    """With `more` rows of zeros below; the scales cover them."""
    weight = F.pad(layer.weight.view(torch.uint8), (0, 0, 0, more)).view(_FP8)
    bias = None if layer.bias is None else F.pad(layer.bias, (0, more))
    return replace(layer, weight=weight, bias=bias)


def more_columns(layer: Linear, more: int, fmt: BlockFP8) -> Linear:
    """With `more` columns of zeros at the right; one scale more a row where the last block is full."""
    if layer.scale is None:
        return replace(layer, weight=F.pad(layer.weight, (0, more)))
    weight = F.pad(layer.weight.view(torch.uint8), (0, more)).view(_FP8)
    missing = fmt.scale_shape(tuple(weight.shape))[1] - layer.scale.shape[1]
    return replace(layer, weight=weight, scale=F.pad(layer.scale, (0, missing), value=1.0))


def split_up(
    wide: tuple[Linear | Parallel, Linear], like: tuple[Linear | Parallel, Linear]
) -> list[tuple[Linear, Linear]]:
    """Experts `like` one, of gate_up_down, that a wide one is the sum of; none where their formats differ.

    Nor where FP8 blocks reach over the edge between two of them, which filling up with zeros shows.
    """
    (gate_up, down), (one, one_down) = wide, like
    if isinstance(gate_up, Parallel) or isinstance(one, Parallel):
        return []
    if gate_up.bias is not None or down.bias is not None:
        return []
    size = one.weight.shape[0] // 2
    rows, columns = one.fmt.block_size if one.scale is not None else (1, 1)
    formats = {(layer.weight.dtype, layer.scale is None) for layer in (one, one_down, gate_up, down)}
    if len(formats) > 1 or gate_up.weight.shape[0] % (2 * size) or size % rows or size % columns:
        return []
    count = gate_up.weight.shape[0] // (2 * size)
    return [
        (
            stacked([_part(gate_up, number + side * count, size, rows, 0) for side in (0, 1)]),
            _part(down, number, size, columns, 1),
        )
        for number in range(count)
    ]


def _part(layer: Linear, number: int, size: int, block: int, dim: int) -> Linear:
    """`size` rows (dim 0) or columns (dim 1) from number * size on; whole blocks if there are scales."""
    raw = layer.weight if layer.scale is None else layer.weight.view(torch.uint8)
    weight = raw.narrow(dim, number * size, size).contiguous().view(layer.weight.dtype)
    if layer.scale is None:
        return replace(layer, weight=weight)
    blocks = size // block
    return replace(layer, weight=weight, scale=layer.scale.narrow(dim, number * blocks, blocks).contiguous())


def room_for(layer: Linear | Parallel, count: int, where: str) -> Linear:
    """For the same layer of `count` experts.

    Raises:
        BlockscaleError: it is none that experts can share.
    """
    if isinstance(layer, Parallel) or layer.bias is not None:
        raise BlockscaleError("gate_proj and up_proj of an expert differ in format", where=where)
    scale = None if layer.scale is None else layer.scale.new_empty(count, *layer.scale.shape)
    return replace(layer, weight=layer.weight.new_empty(count, *layer.weight.shape), scale=scale)


def put(room: Linear, layer: Linear | Parallel, expert: int, where: str) -> None:
    """An expert into the room for all.

    Raises:
        CorruptCheckpointError: it is of another format than the first one.
    """
    if isinstance(layer, Parallel) or layer.weight.dtype != room.weight.dtype:
        raise CorruptCheckpointError(
            "experts of a layer differ in format",
            where=where,
            expected=str(room.weight.dtype),
            got=str(layer.layers if isinstance(layer, Parallel) else layer.weight.dtype),
        )
    room.weight[expert].copy_(layer.weight)
    if room.scale is not None and layer.scale is not None:
        room.scale[expert].copy_(layer.scale)
