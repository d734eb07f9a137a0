"""Round weights with given scales, and the gradients of that, each in one pass over memory.

    w' = s q(w / s)    dw = dw' m    ds = sum over the block of dw' (q(w / s) - m w / s)

Rules: `blockscale/reference/given_scale.py`. Weights and gradients (E, N, K) with adjacent values in a row,
scales (E, ceil(N / rows), ceil(K / columns)) and results contiguous. A tile is some rows of some blocks or
groups, each padded to a power of two: (ROWS, GROUPS, WIDTH). Where the scales' gradient is wanted, a program
takes whole blocks, strip by strip, and adds up in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.ops._triton.dequantize_group import e2m1_value
from blockscale.ops._triton.device import cdiv, current, next_power_of_2
from blockscale.ops._triton.e4m3 import converts_to_e4m3, e4m3_bits, e4m3_value, narrow_canonical, widen
from blockscale.ops._triton.launch import quick
from blockscale.ops._triton.quantize_group import e2m1_field
from blockscale.reference.grids import block_of, clipping_limit, grid_of

_TILE_VALUES, _TILE_WIDTH = 4096, 1024  # rows of a few KB, as for `quantize_group`
_FORWARD_WARPS = 4
_BACKWARD_WARPS = 8  # two operands: half as many values a thread
_E4M3, _E2M1, _INTEGER = 0, 1, 2
# Added to a float32 below 2**22 and taken away again, it leaves the nearest integer, ties to even.
_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def _saturated(quotient, LARGEST: tl.constexpr):
    """Between -LARGEST and LARGEST, a NaN as it is."""
    return tl.where(quotient > LARGEST, LARGEST, tl.where(quotient < -LARGEST, -LARGEST, quotient))


@triton.jit
def _nearest(quotient, GRID: tl.constexpr, LARGEST: tl.constexpr, NATIVE: tl.constexpr):
    """The number of a grid that is nearest to float32 `quotient`."""
    x = _saturated(quotient, LARGEST)
    if GRID == 0:
        return e4m3_value(e4m3_bits(x, NATIVE), NATIVE)
    elif GRID == 1:
        return tl.where(x == x, e2m1_value(e2m1_field(x)), float("nan"))
    else:
        return (x + _TO_INTEGER) - _TO_INTEGER


@quick
@triton.jit
def _round_scaled_kernel(
    w_ptr,
    scale_ptr,
    out_ptr,
    n,
    k,
    w_stride_e,
    w_stride_n,
    grid_n,
    grid_k,
    tiles_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GRID: tl.constexpr,
    LARGEST: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // tiles_k).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = (tl.program_id(0) % tiles_k) * GROUPS + tl.arange(0, GROUPS)
    inside = tl.arange(0, WIDTH)
    column = group[:, None] * BLOCK_K + inside[None, :]  # (GROUPS, WIDTH)
    mask = (row < n)[:, None, None] & ((column < k) & (inside < BLOCK_K)[None, :])[None, :, :]
    grid = (expert * grid_n + row // BLOCK_N)[:, None] * grid_k + group[None, :]  # (ROWS, GROUPS)
    known = (row < n)[:, None] & (group < grid_k)[None, :]
    source = w_ptr + expert * w_stride_e + row[:, None, None] * w_stride_n + column[None, :, :]
    w = widen(tl.load(source, mask=mask, other=0.0))  # (ROWS, GROUPS, WIDTH)
    scale = tl.load(scale_ptr + grid, mask=known, other=1.0)[:, :, None]
    quotient = tl.div_rn(w, tl.broadcast_to(scale, w.shape))
    target = out_ptr + (expert * n + row)[:, None, None] * k + column[None, :, :]
    if out_ptr.dtype.element_ty == tl.uint8:
        tl.store(target, e4m3_bits(_saturated(quotient, LARGEST), NATIVE), mask=mask)
    else:
        value = _nearest(quotient, GRID, LARGEST, NATIVE) * scale
        tl.store(target, narrow_canonical(value, out_ptr.dtype.element_ty), mask=mask)


@quick
@triton.jit
def _scaled_gradients_kernel(
    grad_ptr,
    w_ptr,
    scale_ptr,
    of_w_ptr,
    of_scale_ptr,
    n,
    k,
    grad_stride_e,
    grad_stride_n,
    w_stride_e,
    w_stride_n,
    grid_n,
    grid_k,
    tiles_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GRID: tl.constexpr,
    LARGEST: tl.constexpr,
    LIMIT: tl.constexpr,
    NATIVE: tl.constexpr,
    OF_SCALE: tl.constexpr,
    TALL: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    band = (tl.program_id(0) // tiles_k).to(tl.int64)  # of TALL rows
    group = (tl.program_id(0) % tiles_k) * GROUPS + tl.arange(0, GROUPS)
    inside = tl.arange(0, WIDTH)
    column = group[:, None] * BLOCK_K + inside[None, :]  # (GROUPS, WIDTH)
    across = (column < k) & (inside < BLOCK_K)[None, :]
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    for first in range(0, TALL, ROWS):
        down = first + tl.arange(0, ROWS)
        row = band * TALL + down
        counts = (row < n) & (down < TALL)
        mask = counts[:, None, None] & across[None, :, :]
        grid = (expert * grid_n + row // BLOCK_N)[:, None] * grid_k + group[None, :]  # (ROWS, GROUPS)
        known = counts[:, None] & (group < grid_k)[None, :]
        at_w = expert * w_stride_e + row[:, None, None] * w_stride_n + column[None, :, :]
        at_grad = expert * grad_stride_e + row[:, None, None] * grad_stride_n + column[None, :, :]
        w = widen(tl.load(w_ptr + at_w, mask=mask, other=0.0))  # (ROWS, GROUPS, WIDTH)
        grad = widen(tl.load(grad_ptr + at_grad, mask=mask, other=0.0))
        scale = tl.load(scale_ptr + grid, mask=known, other=1.0)[:, :, None]
        quotient = tl.div_rn(w, tl.broadcast_to(scale, w.shape))
        kept = tl.abs(quotient) <= LIMIT
        target = of_w_ptr + (expert * n + row)[:, None, None] * k + column[None, :, :]
        of_w = grad * tl.where(kept, 1.0, 0.0)
        tl.store(target, narrow_canonical(of_w, of_w_ptr.dtype.element_ty), mask=mask)
        if OF_SCALE:
            each = _nearest(quotient, GRID, LARGEST, NATIVE) - tl.where(kept, quotient, 0.0)
            total += tl.sum(grad * each, axis=2)
            if BLOCK_N == 1:
                tl.store(of_scale_ptr + grid, total, mask=known)
    if OF_SCALE and BLOCK_N != 1:
        target = of_scale_ptr + (expert * grid_n + band) * grid_k + group
        tl.store(target, tl.sum(total, axis=0), mask=group < grid_k)


def fits(k: int, fmt: BlockFP8 | GroupInt | MXFP4) -> bool:
    """Whether a row of a block of a weight (..., K) fits a tile; groups always do."""
    return next_power_of_2(min(block_of(fmt)[1], k)) <= _TILE_VALUES


def _tile(n: int, k: int, columns: int, most: int = _TILE_WIDTH) -> tuple[int, int, int]:
    """ROWS, GROUPS and WIDTH of a tile of a weight (N, K) with blocks of so many columns."""
    width = next_power_of_2(min(columns, k))
    groups = max(1, min(next_power_of_2(cdiv(k, columns)), most // width))
    return min(next_power_of_2(n), _TILE_VALUES // (groups * width)), groups, width


def _constants(fmt: BlockFP8 | GroupInt | MXFP4, device: torch.device) -> dict[str, object]:
    grid = _E4M3 if isinstance(fmt, BlockFP8) else _INTEGER if isinstance(fmt, GroupInt) else _E2M1
    rows, columns = block_of(fmt)
    native = converts_to_e4m3(device)
    return {
        "BLOCK_N": rows,
        "BLOCK_K": columns,
        "GRID": grid,
        "LARGEST": grid_of(fmt).largest,
        "NATIVE": native,
    }


def round_scaled(
    weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, fmt: BlockFP8 | GroupInt | MXFP4
) -> None:
    """Fill `out` (E, N, K) with values, or with codes of E4M3 if it is uint8."""
    experts, n, k = weight.shape
    grid_n, grid_k = scale.shape[1:]
    rows, groups, width = _tile(n, k, block_of(fmt)[1])
    tiles_k = cdiv(grid_k, groups)
    with current(weight.device):
        _round_scaled_kernel[(cdiv(n, rows) * tiles_k, experts)](
            weight,
            scale,
            out,
            n,
            k,
            weight.stride(0),
            weight.stride(1),
            grid_n,
            grid_k,
            tiles_k,
            **_constants(fmt, weight.device),
            ROWS=rows,
            GROUPS=groups,
            WIDTH=width,
            num_warps=max(1, _FORWARD_WARPS * rows * groups * width // _TILE_VALUES),
        )


def scaled_gradients(
    grad: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    of_weight: torch.Tensor,
    of_scale: torch.Tensor | None,
    fmt: BlockFP8 | GroupInt | MXFP4,
) -> None:
    """Fill `of_weight` (E, N, K) and, if it is there, `of_scale` of the shape of `scale`."""
    experts, n, k = weight.shape
    grid_n, grid_k = scale.shape[1:]
    block_n, block_k = block_of(fmt)
    by_block = of_scale is not None and block_n > 1
    # Whole blocks, one beside the other in many programs: there are few of them.
    rows, groups, width = _tile(
        min(block_n, n) if by_block else n, k, block_k, 1 if by_block else _TILE_WIDTH
    )
    tall, tiles_k = min(block_n, n) if by_block else rows, cdiv(grid_k, groups)
    with current(weight.device):
        _scaled_gradients_kernel[(cdiv(n, tall) * tiles_k, experts)](
            grad,
            weight,
            scale,
            of_weight,
            scale if of_scale is None else of_scale,
            n,
            k,
            grad.stride(0),
            grad.stride(1),
            weight.stride(0),
            weight.stride(1),
            grid_n,
            grid_k,
            tiles_k,
            **_constants(fmt, weight.device),
            LIMIT=clipping_limit(fmt),
            OF_SCALE=of_scale is not None,
            TALL=tall,
            ROWS=rows,
            GROUPS=groups,
            WIDTH=width,
            num_warps=max(1, _BACKWARD_WARPS * rows * groups * width // _TILE_VALUES),
        )
