"""The inner loops of calibrated rounding on the GPU, bit-equal to `blockscale/reference/rounding.py`.

A program holds some rows of the block of columns (N, B), of one candidate, in registers. For one column after
the other it takes that column out, rounds it, and updates those behind it: the operations of the reference,
in its order. Nothing may be fused to multiply-adds, so the kernels are compiled without; divisions are those
of IEEE 754.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import cdiv, current, next_power_of_2
from blockscale.ops._triton.launch import quick
from blockscale.reference.rounding import Grid

# Three arrays of so many values in the registers of a program: 48 a thread.
_VALUES = 2048
_MOST_ROWS = 16  # fewer values than that in narrow blocks: what counts is how many programs there are
_WARPS = 4
LARGEST_WIDTH = 2048
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(-0x80000000)
_BINADE = tl.constexpr(0x7F800000)


@triton.jit
def _to_grid(x, LARGEST: tl.constexpr, SMALLEST_NORMAL: tl.constexpr, TO_LAST_BIT: tl.constexpr):
    """The number of a grid nearest to x: ties to even, saturating, a zero keeps its sign.

    LARGEST and SMALLEST_NORMAL are the bits of these numbers.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & _MAGNITUDE, LARGEST)
    binade = tl.maximum(magnitude & _BINADE, SMALLEST_NORMAL).to(tl.float32, bitcast=True)
    # The sum has its last bit where a number of the grid has its own.
    rounder = binade * TO_LAST_BIT
    rounded = (magnitude.to(tl.float32, bitcast=True) + rounder) - rounder
    return (rounded.to(tl.int32, bitcast=True) | (bits & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _taken_out(values, chosen):
    """Column (ROWS,) of values (ROWS, WIDTH); as integers, whose sum with zeros keeps the sign of a zero."""
    bits = tl.where(chosen, values.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 1).to(tl.float32, bitcast=True)


@quick
@triton.jit
def _round_columns_kernel(
    columns_ptr,
    factor_ptr,
    scale_ptr,
    codes_ptr,
    errors_ptr,
    loss_ptr,
    n,
    width,
    groups,
    group_size,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_NORMAL: tl.constexpr,
    TO_LAST_BIT: tl.constexpr,
):
    candidate = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    counts = row < n
    mask = counts[:, None] & (column < width)[None, :]
    inside = row[:, None] * width + column[None, :]  # (ROWS, WIDTH)
    work = tl.load(columns_ptr + inside, mask=mask, other=0.0)
    codes = tl.zeros((ROWS, WIDTH), tl.float32)
    errors = tl.zeros((ROWS, WIDTH), tl.float32)
    loss = tl.zeros((ROWS,), tl.float32)
    scales = scale_ptr + (candidate * n + row) * groups
    for j in range(width):
        chosen = (column == j)[None, :]
        scale = tl.load(scales + j // group_size, mask=counts, other=1.0)
        factor = tl.load(factor_ptr + j * width + column, mask=(column > j) & (column < width), other=0.0)
        w = _taken_out(work, chosen)
        code = _to_grid(tl.div_rn(w, scale), LARGEST, SMALLEST_NORMAL, TO_LAST_BIT)
        error = tl.div_rn(w - code * scale, tl.load(factor_ptr + j * width + j))
        codes = tl.where(chosen, code[:, None], codes)
        errors = tl.where(chosen, error[:, None], errors)
        loss += error * error
        work -= error[:, None] * factor[None, :]
    target = candidate * n * width + inside
    tl.store(codes_ptr + target, codes, mask=mask)
    tl.store(errors_ptr + target, errors, mask=mask)
    tl.store(loss_ptr + candidate * n + row, loss, mask=counts)


@quick
@triton.jit
def _descend_columns_kernel(
    slope_ptr,
    codes_ptr,
    norm_ptr,
    scale_ptr,
    result_ptr,
    n,
    width,
    groups,
    group_size,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_NORMAL: tl.constexpr,
    TO_LAST_BIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    counts = row < n
    mask = counts[:, None] & (column < width)[None, :]
    inside = row[:, None] * width + column[None, :]  # (ROWS, WIDTH)
    work = tl.load(slope_ptr + inside, mask=mask, other=0.0)
    codes = tl.load(codes_ptr + inside, mask=mask, other=0.0)
    for j in range(width):
        chosen = (column == j)[None, :]
        scale = tl.load(scale_ptr + row * groups + j // group_size, mask=counts, other=1.0)
        norm = tl.load(norm_ptr + j * width + column, mask=(column > j) & (column < width), other=0.0)
        before = _taken_out(codes, chosen) * scale
        step = tl.div_rn(_taken_out(work, chosen), tl.load(norm_ptr + j * width + j))
        code = _to_grid(tl.div_rn(before + step, scale), LARGEST, SMALLEST_NORMAL, TO_LAST_BIT)
        codes = tl.where(chosen, code[:, None], codes)
        work -= (code * scale - before)[:, None] * norm[None, :]
    tl.store(result_ptr + inside, codes, mask=mask)


def round_columns(
    columns: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, group_size: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes (F, N, B), errors (F, N, B), loss (F, N)), as the reference; at least one row and column."""
    n, width = columns.shape
    candidates, _, groups = scale.shape
    codes, errors = (columns.new_empty(candidates, n, width) for _ in range(2))
    loss = columns.new_empty(candidates, n)
    rows, across = _tile(width)
    with current(columns.device):
        _round_columns_kernel[(cdiv(n, rows), candidates)](
            columns.contiguous(),
            factor.contiguous(),
            scale.contiguous(),
            codes,
            errors,
            loss,
            n,
            width,
            groups,
            group_size,
            ROWS=rows,
            WIDTH=across,
            **_constants(grid),
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return codes, errors, loss


def descend_columns(
    slope: torch.Tensor,
    codes: torch.Tensor,
    norm: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    grid: Grid,
) -> torch.Tensor:
    """Codes (N, B), as the reference; at least one row and column."""
    n, width = slope.shape
    result = torch.empty_like(slope, memory_format=torch.contiguous_format)
    rows, across = _tile(width)
    with current(slope.device):
        _descend_columns_kernel[(cdiv(n, rows),)](
            slope.contiguous(),
            codes.contiguous(),
            norm.contiguous(),
            scale.contiguous(),
            result,
            n,
            width,
            scale.shape[1],
            group_size,
            ROWS=rows,
            WIDTH=across,
            **_constants(grid),
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return result


def fits(width: int) -> bool:
    """Whether a row of a block of columns fits the registers of a program."""
    return width <= LARGEST_WIDTH


def _constants(grid: Grid) -> dict[str, int | float]:
    """Of a grid, as the kernels take it."""
    largest, smallest = struct.unpack("<2i", struct.pack("<2f", grid.largest, grid.smallest_normal))
    return {"LARGEST": largest, "SMALLEST_NORMAL": smallest, "TO_LAST_BIT": grid.to_last_bit}


def _tile(width: int) -> tuple[int, int]:
    """Rows of a program, and columns it has room for."""
    across = next_power_of_2(width)
    return min(_MOST_ROWS, max(1, _VALUES // across)), across
