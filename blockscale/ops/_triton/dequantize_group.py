"""Dequantize codes of 3 or 4 bits on the GPU: x = value(code) * scale in float32, rounded once.

packed uint8 (rows, bytes), scale float32 (rows, ceil(K/G)) and x (rows, K) BF16, F16 or F32, all contiguous.
Layout: `blockscale/group_formats.py`: eight codes are a word of BITS bytes. Every NaN of the result is the
canonical one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.group_formats import GroupFormat, GroupInt
from blockscale.ops._triton.device import cdiv, current, next_power_of_2
from blockscale.ops._triton.e4m3 import narrow_canonical
from blockscale.ops._triton.launch import quick

# Two runs of eight values a thread, rows of 1 KB: other tiles took up to four times as long on an H100.
_TILE_VALUES = 2048
_TILE_WIDTH = 512
_NUM_WARPS = 4
_HALF = tl.constexpr(126 << 23)  # exponent bits of 0.5


@triton.jit
def e2m1_value(field):
    """float32 number of the four bits of an E2M1 code."""
    m = field & 7
    # Two exponent bits of bias 1 and a mantissa bit, moved to where float32 has its own.
    value = tl.where(m < 2, m.to(tl.float32) * 0.5, ((m << 22) + _HALF).to(tl.float32, bitcast=True))
    return (value.to(tl.int32, bitcast=True) | ((field & 8) << 28)).to(tl.float32, bitcast=True)


@quick
@triton.jit
def _dequantize_group_kernel(
    packed_ptr,
    scale_ptr,
    x_ptr,
    n,
    k,
    packed_width,
    groups,
    tiles_k,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) // tiles_k).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) % tiles_k
    counts = (row < n)[:, None]
    byte = (tile * (WIDTH // 8) + tl.arange(0, WIDTH // 8)) * BITS  # first one of eight codes
    source = packed_ptr + row[:, None] * packed_width + byte[None, :]  # (ROWS, WIDTH // 8)
    word = tl.zeros((ROWS, WIDTH // 8), tl.int32)
    for number in tl.static_range(BITS):
        mask = counts & (byte + number < packed_width)[None, :]
        word |= tl.load(source + number, mask=mask, other=0).to(tl.int32) << (8 * number)
    field = (word[:, :, None] >> (tl.arange(0, 8) * BITS)[None, None, :]) & ((1 << BITS) - 1)
    field = tl.reshape(field, (ROWS, WIDTH))
    column = tile * WIDTH + tl.arange(0, WIDTH)
    mask = counts & (column < k)[None, :]
    if INTEGER:
        value = ((field ^ (1 << (BITS - 1))) - (1 << (BITS - 1))).to(tl.float32)
    else:
        value = e2m1_value(field)
    scale = tl.load(scale_ptr + row[:, None] * groups + (column // GROUP)[None, :], mask=mask, other=0.0)
    target = x_ptr + row[:, None] * k + column[None, :]
    tl.store(target, narrow_canonical(value * scale, x_ptr.dtype.element_ty), mask=mask)


def dequantize_group(packed: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, fmt: GroupFormat) -> None:
    """Fill x (rows, K) from packed codes (rows, bytes) and float32 scales (rows, groups), all contiguous."""
    n, k = x.shape
    width = max(8, min(next_power_of_2(k), _TILE_WIDTH))
    rows = min(next_power_of_2(n), _TILE_VALUES // width)
    tiles_k = cdiv(k, width)
    with current(x.device):
        _dequantize_group_kernel[(cdiv(n, rows) * tiles_k,)](
            packed,
            scale,
            x,
            n,
            k,
            packed.shape[1],
            scale.shape[1],
            tiles_k,
            GROUP=fmt.group_size,
            BITS=fmt.bits,
            INTEGER=isinstance(fmt, GroupInt),
            ROWS=rows,
            WIDTH=width,
            num_warps=max(1, _NUM_WARPS * rows * width // _TILE_VALUES),
        )
