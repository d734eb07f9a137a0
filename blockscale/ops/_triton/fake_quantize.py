"""Round weights and activations to what a checkpoint or a GEMM holds of them, in one pass, without codes.

    x' = s q(x / s), rounded once to the dtype of the result; s and q as in the quantizers

Scales and codes are those of `quantize_weight.py`, `quantize_group.py` and `quantize_activation.py`, to the
bit; a program has them in registers only. A block or group with NaN or Inf becomes NaN as a whole, and nobody
waits to be told. Weights (E, N, K) and activations (M, K) with adjacent values in a row; results contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.ops._triton.dequantize_group import e2m1_value
from blockscale.ops._triton.device import cdiv, current, next_power_of_2
from blockscale.ops._triton.e4m3 import (
    activation_scale,
    converts_to_e4m3,
    e4m3_value,
    magnitude,
    narrow_canonical,
    scaled_codes,
    scaled_weight_codes,
    weight_scale,
    widen,
)
from blockscale.ops._triton.launch import quick
from blockscale.ops._triton.quantize_activation import LARGEST_GROUP, tile_offsets, tiling
from blockscale.ops._triton.quantize_group import e2m1_field, group_scale
from blockscale.ops._triton.quantize_weight import fits as block_fits

__all__ = [
    "LARGEST_GROUP",
    "fake_quantize_activation",
    "fake_quantize_blocks",
    "fake_quantize_groups",
    "fits",
]

_VALUES_PER_WARP = 2048
_MOST_WARPS = 16
_TILE_VALUES, _TILE_WIDTH, _NUM_WARPS = 4096, 1024, 4  # of groups
_INF = tl.constexpr(0x7F800000)
# Added to a float32 below 2**22 and taken away again, it leaves the nearest integer, ties to even.
_TO_INTEGER = tl.constexpr(12582912.0)


@quick
@triton.jit
def _fake_quantize_blocks_kernel(
    x_ptr,
    out_ptr,
    n,
    k,
    x_stride_e,
    x_stride_n,
    grid_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
):
    CORRECTIONS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1
    block = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    down, right = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    row = (block // grid_k).to(tl.int64) * BLOCK_N + down
    column = (block % grid_k).to(tl.int64) * BLOCK_K + right
    mask = ((row < n) & (down < BLOCK_N))[:, None] & ((column < k) & (right < BLOCK_K))[None, :]
    source = x_ptr + expert * x_stride_e + row[:, None] * x_stride_n + column[None, :]  # (HEIGHT, WIDTH)
    x = widen(tl.load(source, mask=mask, other=0.0))
    amax = tl.max(magnitude(x))
    scale = weight_scale(amax, POW2)
    codes = scaled_weight_codes(x, scale, CORRECTIONS, POW2, NATIVE)
    value = tl.where(amax < _INF, e4m3_value(codes, NATIVE) * scale, float("nan"))
    target = out_ptr + (expert * n + row)[:, None] * k + column[None, :]
    tl.store(target, narrow_canonical(value, out_ptr.dtype.element_ty), mask=mask)


@quick
@triton.jit
def _fake_quantize_groups_kernel(
    x_ptr,
    out_ptr,
    n,
    k,
    x_stride_e,
    x_stride_n,
    tiles_k,
    GROUP: tl.constexpr,
    INTEGER: tl.constexpr,
    LARGEST: tl.constexpr,
    POW2: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // tiles_k).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles_k) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < n)[:, None] & (column < k)[None, :]
    source = x_ptr + expert * x_stride_e + row[:, None] * x_stride_n + column[None, :]  # (ROWS, WIDTH)
    x = widen(tl.load(source, mask=mask, other=0.0))
    x = tl.reshape(x, (ROWS, WIDTH // GROUP, GROUP))
    amax = tl.max(magnitude(x), axis=2)
    bits = tl.where(amax < _INF, group_scale(amax, LARGEST, POW2), 0x7FC00000)
    scale = tl.broadcast_to(bits.to(tl.float32, bitcast=True)[:, :, None], x.shape)
    quotient = tl.div_rn(x, scale)
    if INTEGER:
        value = (quotient + _TO_INTEGER) - _TO_INTEGER
    else:
        value = e2m1_value(e2m1_field(quotient))
    target = out_ptr + (expert * n + row)[:, None] * k + column[None, :]
    value = tl.reshape(value * scale, (ROWS, WIDTH))
    tl.store(target, narrow_canonical(value, out_ptr.dtype.element_ty), mask=mask)


@quick
@triton.jit(do_not_specialize=["rows"])
def _fake_quantize_activation_kernel(
    x_ptr,
    out_ptr,
    rows,
    columns,
    x_stride,
    tiles_across,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
):
    CORRECTIONS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1
    row, group = tile_offsets(tiles_across, ROWS, GROUPS)
    inside = tl.arange(0, WIDTH)
    column = group[:, None] * GROUP_SIZE + inside[None, :]  # (ROWS * GROUPS, WIDTH)
    mask = (row < rows)[:, None] & (column < columns) & (inside < GROUP_SIZE)[None, :]
    x = widen(tl.load(x_ptr + row[:, None] * x_stride + column, mask=mask, other=0.0))
    scale = activation_scale(tl.max(magnitude(x), axis=1), POW2)[:, None]
    value = e4m3_value(scaled_codes(x, scale, CORRECTIONS, POW2, NATIVE), NATIVE) * scale
    target = out_ptr + row[:, None] * columns + column
    tl.store(target, narrow_canonical(value, out_ptr.dtype.element_ty), mask=mask)


def fits(shape: tuple[int, ...], fmt: BlockFP8 | GroupInt | MXFP4) -> bool:
    """Whether a block of a weight (..., N, K) fits the registers of a program; groups always do."""
    return not isinstance(fmt, BlockFP8) or block_fits(shape, fmt.block_size)


def fake_quantize_blocks(x: torch.Tensor, out: torch.Tensor, fmt: BlockFP8) -> None:
    """Fill `out` (E, N, K) from x."""
    experts, n, k = x.shape
    block_n, block_k = fmt.block_size
    # A block that reaches past the weight ends with it.
    height, width = next_power_of_2(min(block_n, n)), next_power_of_2(min(block_k, k))
    grid_k = cdiv(k, block_k)
    with current(x.device):
        _fake_quantize_blocks_kernel[(cdiv(n, block_n) * grid_k, experts)](
            x,
            out,
            n,
            k,
            x.stride(0),
            x.stride(1),
            grid_k,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            HEIGHT=height,
            WIDTH=width,
            POW2=fmt.scale_fmt == "ue8m0",
            NATIVE=converts_to_e4m3(x.device),
            num_warps=min(_MOST_WARPS, max(1, height * width // _VALUES_PER_WARP)),
        )


def fake_quantize_groups(x: torch.Tensor, out: torch.Tensor, fmt: GroupInt | MXFP4) -> None:
    """Fill `out` (E, N, K) from x."""
    experts, n, k = x.shape
    width = max(fmt.group_size, min(next_power_of_2(k), _TILE_WIDTH))
    rows = min(next_power_of_2(n), _TILE_VALUES // width)
    tiles_k = cdiv(k, width)
    with current(x.device):
        _fake_quantize_groups_kernel[(cdiv(n, rows) * tiles_k, experts)](
            x,
            out,
            n,
            k,
            x.stride(0),
            x.stride(1),
            tiles_k,
            GROUP=fmt.group_size,
            INTEGER=isinstance(fmt, GroupInt),
            LARGEST=float(fmt.largest),
            POW2=fmt.scale_fmt == "ue8m0",
            ROWS=rows,
            WIDTH=width,
            num_warps=max(1, _NUM_WARPS * rows * width // _TILE_VALUES),
        )


def fake_quantize_activation(x: torch.Tensor, out: torch.Tensor, fmt: BlockFP8) -> None:
    """Fill `out` (M, K) from x, in groups of block_k."""
    rows, columns = x.shape
    group_size = fmt.block_size[1]
    tiles = tiling(rows, cdiv(columns, group_size), group_size)
    with current(x.device):
        _fake_quantize_activation_kernel[(tiles.programs,)](
            x,
            out,
            rows,
            columns,
            x.stride(0),
            tiles.across,
            GROUP_SIZE=group_size,
            WIDTH=next_power_of_2(group_size),
            ROWS=tiles.rows,
            GROUPS=tiles.groups,
            POW2=fmt.scale_fmt == "ue8m0",
            NATIVE=converts_to_e4m3(x.device),
            num_warps=tiles.warps,
        )
