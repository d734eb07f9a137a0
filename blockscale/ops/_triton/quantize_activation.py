"""Quantize rows to E4M3 in 1 x G groups on the GPU, in one pass over memory.

    scale[m, g] = max(max |x[m, gG : gG + G]|, 1e-4) / 448        codes = e4m3(x / scale)

x (M, K) BF16, F16 or F32, rows at any stride, values of a row adjacent; codes (M, K) contiguous; scale
(M, ceil(K/G)) float32 at any strides, so that it lands in the layout its reader wants. Rounding: `e4m3.py`.

A program takes a tile of ROWS x GROUPS groups, one group a row of a two-dimensional block: Triton then gives
a thread 16 adjacent values, two 16-byte loads and one 16-byte store, and 8 threads of a warp share a group.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import cdiv, current, next_power_of_2, overlap, wait_for_previous_kernel
from blockscale.ops._triton.e4m3 import activation_scale, converts_to_e4m3, magnitude, scaled_codes, widen
from blockscale.ops._triton.launch import quick

# Values a program takes: 8 KB of BF16 and 32 values a thread, enough loads in flight with 8 programs on a
# multiprocessor; and small enough that a single row of 7168 still makes 7 programs.
TILE_VALUES = 4096
NUM_WARPS = 4
# Groups of a row in a tile: 8 of 128 are 2 KB in one piece, with rows left to fill sectors of column scales.
_MOST_GROUPS_ACROSS = 8
# A group has to fit the registers of one program.
LARGEST_GROUP = 1 << 15


class Tiling(NamedTuple):
    """How (M, ceil(K/G)) groups are cut into tiles of `rows` x `groups`, `across` tiles side by side."""

    rows: int
    groups: int
    across: int
    programs: int
    warps: int


def tiling(rows: int, groups: int, group_size: int) -> Tiling:
    """Tiles of about TILE_VALUES values, with no groups past the end of a row and few rows past the last."""
    width = next_power_of_2(group_size)
    most = max(1, TILE_VALUES // width)
    across = min(most, groups & -groups, _MOST_GROUPS_ACROSS)  # a power of two that divides `groups`
    down = min(most // across, next_power_of_2(rows))
    warps = max(1, min(16, NUM_WARPS * across * down * width // TILE_VALUES))
    return Tiling(down, across, groups // across, cdiv(rows, down) * (groups // across), warps)


@triton.jit
def tile_offsets(tiles_across, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """int64 row and group of every group of this program's tile, both (ROWS * GROUPS,)."""
    tile = tl.program_id(0)
    index = tl.arange(0, ROWS * GROUPS)
    row = (tile // tiles_across).to(tl.int64) * ROWS + index // GROUPS
    group = (tile % tiles_across).to(tl.int64) * GROUPS + index % GROUPS
    return row, group


# The number of rows changes from call to call: a new value must not mean a new compilation.
@quick
@triton.jit(do_not_specialize=["rows", "scale_row_stride", "scale_group_stride"])
def _quantize_activation_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    columns,
    x_stride,
    scale_row_stride,
    scale_group_stride,
    tiles_across,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    POW2: tl.constexpr,
    FLOOR: tl.constexpr,
    NATIVE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous_kernel(OVERLAPS)
    CORRECTIONS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1
    row, group = tile_offsets(tiles_across, ROWS, GROUPS)
    inside = tl.arange(0, WIDTH)
    column = group[:, None] * GROUP_SIZE + inside[None, :]  # (ROWS * GROUPS, WIDTH)
    mask = (row < rows)[:, None] & (column < columns) & (inside < GROUP_SIZE)[None, :]
    x = widen(tl.load(x_ptr + row[:, None] * x_stride + column, mask=mask, other=0.0))
    scale = activation_scale(tl.max(magnitude(x), axis=1), POW2, FLOOR)
    codes = scaled_codes(x, scale[:, None], CORRECTIONS, POW2, NATIVE)
    tl.store(codes_ptr + row[:, None] * columns + column, codes, mask=mask)
    tl.store(scale_ptr + row * scale_row_stride + group * scale_group_stride, scale, mask=row < rows)


def quantize_activation(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    pow2: bool,
    amax_floor: float,
) -> None:
    """Fill `codes` (M, K), contiguous, and `scale` (M, ceil(K/G)) from x (M, K) with unit stride along K."""
    rows, columns = x.shape
    tiles = tiling(rows, scale.shape[1], group_size)
    with current(x.device):
        _quantize_activation_kernel[(tiles.programs,)](
            x,
            codes.view(torch.uint8),
            scale,
            rows,
            columns,
            x.stride(0),
            scale.stride(0),
            scale.stride(1),
            tiles.across,
            GROUP_SIZE=group_size,
            WIDTH=next_power_of_2(group_size),
            ROWS=tiles.rows,
            GROUPS=tiles.groups,
            POW2=pow2,
            FLOOR=_bits(amax_floor),
            NATIVE=converts_to_e4m3(x.device),
            num_warps=tiles.warps,
            **overlap(x.device),
        )


@functools.cache
def _bits(x: float) -> int:
    """Of a positive float32 number."""
    return int(np.float32(x).view(np.int32))
