"""Codes and scales of a quantized checkpoint as what training begins with.

The scales become those of the layers. A weight that was calibrated is not its source rounded to nearest, so
master weights have to be such as round to its codes q: of all of these the nearest to the model's own weight
w, but no nearer to the edge than a tenth of the distance h between the numbers of the grid at q,

    master = s q + clamp(w - s q, -0.4 s h, 0.4 s h)

or s q itself where that would round to another code: below a power of two numbers are closer, and zero has a
sign (but in integers). From there a code can go back to where w was by a small step, and none changes without
one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from blockscale.calibrate.formats import QuantizedFormat, Rounding, block_of, grid_of, values_of
from blockscale.checkpoint.compare import Side, open_side
from blockscale.checkpoint.decide import FP8
from blockscale.checkpoint.scales import read_scale
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8
from blockscale.group_formats import GroupInt
from blockscale.huggingface.partial import read_tensor
from blockscale.huggingface.targets import Target
from blockscale.qat.modules import FakeQuantLayer, start_scale_name
from blockscale.reference import is_power_of_two
from blockscale.reference.fp8 import spread_scale
from blockscale.reference.rounding import Grid, to_grid

_REACH = 0.4  # of the distance between two numbers of the grid


class Beginning(NamedTuple):
    """The values of a weight and its scales, float32."""

    values: torch.Tensor
    scale: torch.Tensor


def begin_with(
    model: nn.Module, formats: Mapping[Target, QuantizedFormat], spec: str | os.PathLike[str]
) -> None:
    """Set the master weights and scales of a prepared model.

    Args:
        model: its scales are frozen or learned.
        formats: every weight that trains -> its format.
        spec: folder, Hub repository or URL of a quantized checkpoint of the same model.

    Raises:
        BlockscaleError: the checkpoint lacks a weight, or has it in another format or shape.
    """
    side = open_side(spec)
    low = {each.name: codes for codes, each in side.low.items()}
    for target, fmt in formats.items():
        layer = model.get_submodule(target.path)
        assert isinstance(layer, FakeQuantLayer)
        master, start = getattr(layer, target.leaf), getattr(layer, start_scale_name(target.leaf))
        read = [_read(side, name, low.get(name), fmt) for name in target.sources]
        if len(read) == 1:
            found = read[0]
        else:
            found = Beginning(*(torch.stack(each) for each in zip(*read, strict=True)))
        with torch.no_grad():
            matrices = layer.trained[target.leaf].matrices(master)
            if found.values.shape != matrices.shape:
                got = list(found.values.shape)
                raise _misfit(side, target.sources[0], f"the shape of {target.name}", got)
            found = Beginning(*(each.to(master.device) for each in found))
            made = nearest_master(matrices.float(), found, fmt)
            master.copy_(made.view(master.shape))
            start.copy_(found.scale)


def nearest_master(own: torch.Tensor, beginning: Beginning, fmt: QuantizedFormat) -> torch.Tensor:
    """The master weight that rounds to these values, as near to one's own as the module says.

    Args:
        own: float32 (N, K) or (E, N, K).
        beginning: values of that shape, and their scales.
        fmt: of the values.
    """
    values, grid = beginning.values, grid_of(fmt)
    spread = spread_scale(beginning.scale, block_of(fmt), values.shape)
    codes = to_grid(values / spread, grid)
    reach = _REACH * spread * _distance(codes, grid)
    master = values + (own - values).clamp(-reach, reach)
    rounded = to_grid(master / spread, grid)
    same = rounded == codes
    if not isinstance(fmt, GroupInt):
        same &= rounded.signbit() == codes.signbit()
    return torch.where(same, master, values)


def _distance(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """From numbers of a grid to the next ones away from zero."""
    _, exponent = torch.frexp(codes.abs().clamp_min(grid.smallest_normal))
    return torch.ldexp(torch.ones_like(codes), exponent - 1 - grid.mantissa_bits)


def _read(side: Side, name: str, codes_name: str | None, fmt: QuantizedFormat) -> Beginning:
    """A weight of a checkpoint in the format that is asked for."""
    entry = side.index.tensors.get(name if codes_name is None else codes_name)
    if entry is None:
        raise _misfit(side, name, "a quantized weight", "none")
    if codes_name is not None:
        low = side.low[codes_name]
        if low.fmt != fmt:
            raise _misfit(side, name, fmt, low.fmt)
        width = low.storage.shape(entry.shape)[-1]
        codes = low.storage.packed(read_tensor(side.source, entry), width)
        scale = read_scale(side.index.tensors[low.scale], side.source, low.storage)
        return Beginning(values_of(Rounding(codes, scale.to(low.fmt.scale_dtype)), fmt, width), scale)
    if entry.dtype != FP8 or not isinstance(fmt, BlockFP8):
        raise _misfit(side, name, fmt, entry.dtype)
    scale, block = side.scale(entry), side.stored_block(entry)
    fits = fmt.scale_fmt == "float32" or bool(is_power_of_two(scale).all())
    if block != fmt.block_size or not fits:
        raise _misfit(side, name, fmt, f"blocks of {block}" + ("" if fits else ", no powers of two"))
    return Beginning(values_of(Rounding(read_tensor(side.source, entry), scale), fmt, entry.shape[-1]), scale)


def _misfit(side: Side, name: str, expected: object, got: object) -> BlockscaleError:
    return BlockscaleError(
        "cannot begin with this checkpoint",
        where=f"{name} in {side.source.spec}",
        expected=expected,
        got=got,
        remedy="quantize it by the recipe of the training",
    )
