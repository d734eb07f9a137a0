"""What calibrated rounding has to know of a weight's format: its grid, who shares a scale, how it is stored.

While it is rounded, a weight (N, K) is held as float32 numbers of the grid, with scales as of blocks:

    codes (N, K)        scale (ceil(N / rows), ceil(K / columns))

Block FP8 has blocks of any shape; groups of a format below 8 bits are blocks of one row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from blockscale import ops
from blockscale.checkpoint.rounded import QuantizedFormat
from blockscale.formats import BlockFP8, ScaleFmt
from blockscale.group_formats import GroupInt
from blockscale.reference.fp4 import to_e2m1
from blockscale.reference.fp8 import MIN_WEIGHT_SCALE
from blockscale.reference.grids import block_of as block_of
from blockscale.reference.grids import grid_of as grid_of
from blockscale.reference.packing import pack

_ACTIVATION_GROUP = 128  # of the inputs of weights below 8 bits


class Rounding(NamedTuple):
    """A weight as it is stored: what ops.quantize_weight or ops.quantize_group gives."""

    codes: torch.Tensor
    scale: torch.Tensor


class Points(NamedTuple):
    """A weight while it is rounded; see the module."""

    codes: torch.Tensor
    scale: torch.Tensor


def inputs_of_format(fmt: QuantizedFormat, scale_fmt: ScaleFmt) -> BlockFP8:
    """How the inputs of such a weight are quantized: in groups of its block_k."""
    return fmt if isinstance(fmt, BlockFP8) else BlockFP8((1, _ACTIVATION_GROUP), scale_fmt)


def round_plainly(weight: torch.Tensor, fmt: QuantizedFormat) -> Rounding:
    """Every value (N, K) to the nearest code.

    Raises:
        NonFiniteError: the weight holds NaN or Inf.
        BlockscaleError: wrong dtype or shape.
    """
    if isinstance(fmt, BlockFP8):
        return Rounding(*ops.quantize_weight(weight.contiguous(), fmt.block_size, fmt.scale_fmt))
    return Rounding(*ops.quantize_group(weight.contiguous(), fmt))


def values_of(rounding: Rounding, fmt: QuantizedFormat, width: int) -> torch.Tensor:
    """The float32 weight (N, width) that is stored so."""
    if isinstance(fmt, BlockFP8):
        return ops.dequantize_weight(*rounding, fmt.block_size, torch.float32)
    return ops.dequantize_group(*rounding, fmt, width, torch.float32)


def plain_points(weight: torch.Tensor, fmt: QuantizedFormat) -> Points:
    """`round_plainly`, as it is while a weight is rounded."""
    codes, scale = round_plainly(weight, fmt)
    if isinstance(fmt, BlockFP8):
        return Points(codes.float(), scale)
    ones = torch.ones_like(scale)
    return Points(ops.dequantize_group(codes, ones, fmt, weight.shape[1], torch.float32), scale.float())


def values_of_points(points: Points, fmt: QuantizedFormat) -> torch.Tensor:
    """codes * scale, float32 (N, K)."""
    rows, columns = block_of(fmt)
    height, width = points.codes.shape
    scale = points.scale if rows == 1 else points.scale.repeat_interleave(rows, 0)[:height]
    return points.codes * scale.repeat_interleave(columns, 1)[:, :width]


def nearest_scale(scale: torch.Tensor, fmt: QuantizedFormat) -> torch.Tensor:
    """Positive scales as near as they can be stored, float32; powers of two stay what they are."""
    scale = scale.clamp_min(MIN_WEIGHT_SCALE)
    if not isinstance(fmt, BlockFP8) and fmt.scale_fmt == "bf16":
        return scale.bfloat16().float()
    return scale


def stored(points: Points, fmt: QuantizedFormat) -> Rounding:
    """Points as they are stored; scales are such as can be."""
    codes, scale = points
    if isinstance(fmt, BlockFP8):
        return Rounding(codes.to(torch.float8_e4m3fn), scale)
    numbers = codes.to(torch.int8) if isinstance(fmt, GroupInt) else to_e2m1(codes)
    return Rounding(pack(numbers, fmt.bits), scale.to(fmt.scale_dtype))
