"""RMSNorm, optionally after a residual addition, and its quantization on the GPU, in one pass over memory.

    h = x + residual        y = dtype(h * rsqrt(mean(h**2) + eps)) * weight        codes, scale = E4M3 of y

x and residual (M, K), rows at any stride; weight (K,); h, y and codes (M, K) contiguous; scale (M, ceil(K/G))
at any strides; what nobody asks for is not written. A program holds one row in registers. The squares are
summed in float64, so the order of summation does not show in the float32 sum; every other rounding as in
`blockscale/reference/fused.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from blockscale.formats import BlockFP8
from blockscale.ops._triton.device import cdiv, current, next_power_of_2, overlap, wait_for_previous_kernel
from blockscale.ops._triton.e4m3 import (
    activation_scale,
    converts_to_e4m3,
    magnitude,
    narrow,
    narrow_canonical,
    scaled_codes,
    through,
    widen,
)
from blockscale.ops._triton.launch import quick
from blockscale.ops.dispatch import as_rows

# 32 values a thread, 8 warps for a row of 7168 or 8192: four or more rows in flight on a multiprocessor.
# Where rows are few, 8 values a thread and more threads take less time for each.
_VALUES_PER_WARP, _VALUES_IF_FEW, _FEW_ROWS = 1024, 256, 264
_MOST_WARPS = 16
# A row has to fit the registers of one program.
LARGEST_ROW = 1 << 15


@quick
@triton.jit(do_not_specialize=["scale_row_stride", "scale_group_stride"])
def _rms_norm_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    hidden_ptr,
    y_ptr,
    codes_ptr,
    scale_ptr,
    columns,
    groups,
    x_stride,
    residual_stride,
    scale_row_stride,
    scale_group_stride,
    eps,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_Y: tl.constexpr,
    QUANTIZES: tl.constexpr,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous_kernel(OVERLAPS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    CORRECTIONS: tl.constexpr = 2 if dtype == tl.float32 else 1
    row = tl.program_id(0).to(tl.int64)
    group, inside = tl.arange(0, GROUPS), tl.arange(0, WIDTH)
    column = group[:, None] * GROUP_SIZE + inside[None, :]  # (GROUPS, WIDTH)
    mask = (column < columns) & (inside < GROUP_SIZE)[None, :]
    hidden = widen(tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0))
    if HAS_RESIDUAL:
        residual = widen(tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0))
        added = narrow_canonical(hidden + residual, dtype)
        tl.store(hidden_ptr + row * columns + column, added, mask=mask)
        hidden = widen(added)
    wide = hidden.to(tl.float64)
    total = tl.sum(tl.sum(wide * wide, axis=1), axis=0).to(tl.float32)
    variance = tl.div_rn(total, columns.to(tl.float32))
    factor = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    normalized = through(hidden * factor, dtype)
    weight = widen(tl.load(weight_ptr + column, mask=mask, other=0.0))
    y = through(normalized * weight, dtype)
    if HAS_Y:
        tl.store(y_ptr + row * columns + column, narrow(y, dtype), mask=mask)
    if QUANTIZES:
        scale = activation_scale(tl.max(magnitude(y), axis=1), POW2)
        codes = scaled_codes(y, scale[:, None], CORRECTIONS, POW2, NATIVE)
        tl.store(codes_ptr + row * columns + column, codes, mask=mask)
        scale_target = scale_ptr + row * scale_row_stride + group.to(tl.int64) * scale_group_stride
        tl.store(scale_target, scale, mask=group < groups)


def fits(columns: int, group_size: int) -> bool:
    """Whether a row of groups fits the registers of a program."""
    groups = cdiv(max(1, columns), group_size)
    return next_power_of_2(groups) * next_power_of_2(group_size) <= LARGEST_ROW


class Outputs(NamedTuple):
    """What to fill: codes and scale, y, and hidden if there is a residual; None for what nobody asks for."""

    codes: torch.Tensor | None
    scale: torch.Tensor | None
    y: torch.Tensor | None
    hidden: torch.Tensor | None


def rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    outputs: Outputs,
    group_size: int,
    fmt: BlockFP8 | None,
) -> None:
    """Fill outputs from x and residual (..., K) in groups of G; fmt: of the codes, if there are to be any."""
    x = as_rows(x)
    residual = None if residual is None else as_rows(residual)
    codes, scale, y, hidden = outputs
    rows, columns = x.shape
    groups, width = cdiv(columns, group_size), next_power_of_2(group_size)
    groups_held = next_power_of_2(groups)
    strides = (0, 0) if scale is None else scale.stride()
    values = _VALUES_IF_FEW if rows <= _FEW_ROWS else _VALUES_PER_WARP
    with current(x.device):
        _rms_norm_quantize_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight.detach().contiguous(),
            x if hidden is None else hidden,
            x if y is None else y,
            x if codes is None else codes.view(torch.uint8),
            x if scale is None else scale,
            columns,
            groups,
            x.stride(0),
            x.stride(0) if residual is None else residual.stride(0),
            *strides,
            eps,
            GROUP_SIZE=group_size,
            WIDTH=width,
            GROUPS=groups_held,
            HAS_RESIDUAL=residual is not None,
            HAS_Y=y is not None,
            QUANTIZES=codes is not None,
            POW2=fmt is not None and fmt.scale_fmt == "ue8m0",
            NATIVE=converts_to_e4m3(x.device),
            num_warps=min(_MOST_WARPS, max(1, groups_held * width // values)),
            **overlap(x.device),
        )
