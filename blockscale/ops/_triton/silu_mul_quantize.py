"""SwiGLU and its quantization on the GPU, in one pass over memory.

    y = dtype(silu(gate) * up)        codes, scale = E4M3 of y in 1 x G groups

x (M, 2I) holds gate, then up, in every row; BF16, F16 or F32, rows at any stride. Outputs, tiles and rounding
of the quantizer as in `quantize_activation.py`; silu as `blockscale/reference/fused.py` defines it, operation
by operation, so that the bits are the same everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import cdiv, current, next_power_of_2, overlap, wait_for_previous_kernel
from blockscale.ops._triton.e4m3 import (
    INTERPRETED,
    activation_scale,
    converts_to_e4m3,
    exact_quotient,
    fma,
    magnitude,
    narrow,
    scaled_codes,
    through,
    widen,
)
from blockscale.ops._triton.launch import quick
from blockscale.ops._triton.quantize_activation import LARGEST_GROUP, tile_offsets, tiling

__all__ = ["LARGEST_GROUP", "silu_mul_quantize"]


@triton.jit
def _exp(x):
    """float32 exp of |x| <= 87 within about an ulp: the constants and the operations of the reference."""
    shifted = fma(x, 1.4426950216293335, 12582912.0)
    n = shifted - 12582912.0
    r = fma(n, -0.693359375, x)
    r = fma(n, 0.00021219444170128554, r)
    q = fma(r, 0.001381453825160861, 0.00836874544620514)
    q = fma(q, r, 0.04166838899254799)
    q = fma(q, r, 0.1666652113199234)
    q = fma(q, r, 0.4999999403953552)
    p = fma(fma(q, r, 1.0), r, 1.0)
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def silu(x, BF16: tl.constexpr):
    """float32 x / (1 + exp(-x)); past |x| = 87 the limits: x above, -0 below, NaN for -Inf."""
    divisor = _exp(x * -1.0) + 1.0
    if BF16 and not INTERPRETED:
        # Every BF16 x was tried, with estimates up to 3 ulps off: all quotients round correctly but that of
        # 2**-23, which may be 2**-24 (the ulp it lacks is lost when the product is rounded).
        estimate = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
        reciprocal = fma(fma(divisor * -1.0, estimate, 1.0), estimate, estimate)
        value = exact_quotient(x, divisor, reciprocal, 1)
    else:
        value = tl.div_rn(x, divisor)
    return tl.where(tl.abs(x) > 87.0, tl.where(x > 0, x, x * 0.0), value)


@quick
@triton.jit(do_not_specialize=["rows", "scale_row_stride", "scale_group_stride"])
def _silu_mul_quantize_kernel(
    x_ptr,
    chosen_ptr,
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
    CHOSEN: tl.constexpr,
    QUANTIZES: tl.constexpr,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous_kernel(OVERLAPS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    CORRECTIONS: tl.constexpr = 2 if dtype == tl.float32 else 1
    row, group = tile_offsets(tiles_across, ROWS, GROUPS)
    counts = row < rows
    if CHOSEN:
        row = tl.load(chosen_ptr + row, mask=counts, other=-1).to(tl.int64)
        counts = row >= 0
    inside = tl.arange(0, WIDTH)
    column = group[:, None] * GROUP_SIZE + inside[None, :]  # (ROWS * GROUPS, WIDTH)
    mask = counts[:, None] & (column < columns) & (inside < GROUP_SIZE)[None, :]
    source = x_ptr + row[:, None] * x_stride + column
    gate = widen(tl.load(source, mask=mask, other=0.0))
    up = widen(tl.load(source + columns, mask=mask, other=0.0))
    y = through(silu(gate, dtype == tl.bfloat16) * up, dtype)
    target = codes_ptr + row[:, None] * columns + column
    if QUANTIZES:
        scale = activation_scale(tl.max(magnitude(y), axis=1), POW2)
        tl.store(target, scaled_codes(y, scale[:, None], CORRECTIONS, POW2, NATIVE), mask=mask)
        tl.store(scale_ptr + row * scale_row_stride + group * scale_group_stride, scale, mask=counts)
    else:
        tl.store(target, narrow(y, dtype), mask=mask)


def silu_mul_quantize(
    x: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    group_size: int,
    pow2: bool,
    chosen: torch.Tensor | None,
) -> None:
    """Fill `out` (M, I), contiguous, and `scale` (M, ceil(I/G)) from x (M, 2I), unit stride along 2I.

    scale: None leaves the values as they are, and out is of the dtype of x. chosen: int32, contiguous, the
    only rows to fill, or None for all.
    """
    rows, columns = out.shape[0] if chosen is None else chosen.numel(), out.shape[1]
    tiles = tiling(rows, cdiv(columns, group_size), group_size)
    strides = (0, 0) if scale is None else scale.stride()
    with current(x.device):
        _silu_mul_quantize_kernel[(tiles.programs,)](
            x,
            x if chosen is None else chosen,
            out if scale is None else out.view(torch.uint8),
            x if scale is None else scale,
            rows,
            columns,
            x.stride(0),
            *strides,
            tiles.across,
            GROUP_SIZE=group_size,
            WIDTH=next_power_of_2(group_size),
            ROWS=tiles.rows,
            GROUPS=tiles.groups,
            CHOSEN=chosen is not None,
            QUANTIZES=scale is not None,
            POW2=pow2,
            NATIVE=converts_to_e4m3(x.device),
            num_warps=tiles.warps,
            enable_fp_fusion=False,
            **overlap(x.device),
        )
