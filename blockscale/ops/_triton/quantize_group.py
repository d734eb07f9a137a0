"""Quantize a weight to 3 or 4 bits on the GPU, in one pass over memory.

    scale = max |x| / LARGEST over a group, at least 2**-126, rounded to bf16 or up to a power of two
    code  = x / scale, rounded to the nearest integer or E2M1 number

x (E, N, K) BF16, F16 or F32 at any strides along E and N, values of a row adjacent; packed uint8 (E, N,
bytes) and scale (E, N, ceil(K/G)) contiguous. Rules and layout: `blockscale/group_formats.py`. A program
takes whole groups of some rows. A group with NaN or Inf raises a flag on the device, and its codes mean
nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.group_formats import MXFP4, GroupInt
from blockscale.ops._triton.device import cdiv, current, next_power_of_2
from blockscale.ops._triton.e4m3 import magnitude, widen
from blockscale.ops._triton.launch import quick

# 32 values a thread, rows of 2 KB: narrower ones take up to three times as long for 3 bits on an H100.
_TILE_VALUES = 4096
_TILE_WIDTH = 1024
_NUM_WARPS = 4
_INF = tl.constexpr(0x7F800000)
_MIN_SCALE = tl.constexpr(0x00800000)  # 2**-126
_ONE = tl.constexpr(0x3F800000)
# Added to a float32 below 2**22, it leaves the nearest integer, ties to even, in the lowest bits of the sum.
_TO_INTEGER = tl.constexpr(12582912.0)
_BITS_OF = {torch.bfloat16: torch.int16, torch.float8_e8m0fnu: torch.uint8}


@triton.jit
def group_scale(amax, LARGEST: tl.constexpr, POW2: tl.constexpr):
    """Float32 bits of the scale, of the bits of a finite amax."""
    bits = tl.div_rn(amax.to(tl.float32, bitcast=True), LARGEST).to(tl.int32, bitcast=True)
    bits = tl.where(amax == 0, _ONE, tl.maximum(bits, _MIN_SCALE))
    if POW2:
        return (bits + 0x7FFFFF) & _INF
    else:
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16


@triton.jit
def e2m1_field(x):
    """Four bits of the E2M1 number nearest to float32 x, |x| at most 7: ties to the even mantissa."""
    m = tl.abs(x)
    count = (m > 0.25).to(tl.int32) + (m >= 0.75).to(tl.int32) + (m > 1.25).to(tl.int32)
    count += (m >= 1.75).to(tl.int32) + (m > 2.5).to(tl.int32) + (m >= 3.5).to(tl.int32)
    count += (m > 5.0).to(tl.int32)
    return count | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@quick
@triton.jit
def _quantize_group_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    bad_ptr,
    n,
    k,
    x_stride_e,
    x_stride_n,
    packed_width,
    groups,
    tiles_k,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    INTEGER: tl.constexpr,
    LARGEST: tl.constexpr,
    POW2: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    tile_n, tile_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    row = tile_n.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile_k * WIDTH + tl.arange(0, WIDTH)
    inside = (row < n)[:, None]
    source = x_ptr + expert * x_stride_e + row[:, None] * x_stride_n + column[None, :]  # (ROWS, WIDTH)
    x = widen(tl.load(source, mask=inside & (column < k)[None, :], other=0.0))
    x = tl.reshape(x, (ROWS, WIDTH // GROUP, GROUP))
    amax = tl.max(magnitude(x), axis=2)
    scale = group_scale(amax, LARGEST, POW2)  # (ROWS, WIDTH // GROUP)
    quotient = tl.div_rn(x, tl.broadcast_to(scale.to(tl.float32, bitcast=True)[:, :, None], x.shape))
    if INTEGER:
        fields = (quotient + _TO_INTEGER).to(tl.int32, bitcast=True) & ((1 << BITS) - 1)
    else:
        fields = e2m1_field(quotient)

    line = expert * n + row[:, None]
    group = tile_k * (WIDTH // GROUP) + tl.arange(0, WIDTH // GROUP)
    stored = scale >> (23 if POW2 else 16)
    target = scale_ptr + line * groups + group[None, :]
    tl.store(target, stored.to(scale_ptr.dtype.element_ty), mask=inside & (group < groups)[None, :])
    tl.store(bad_ptr + tl.zeros_like(amax), 1, mask=amax >= _INF)
    if BITS == 4:
        low, high = tl.split(tl.reshape(fields, (ROWS, WIDTH // 2, 2)))
        byte = tile_k * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
        mask = inside & (byte < packed_width)[None, :]
        tl.store(
            packed_ptr + line * packed_width + byte[None, :], (low | (high << 4)).to(tl.uint8), mask=mask
        )
    else:
        eights = tl.reshape(fields, (ROWS, WIDTH // 8, 8))
        word = tl.sum(eights << (3 * tl.arange(0, 8))[None, None, :], axis=2)
        byte = 3 * (tile_k * (WIDTH // 8) + tl.arange(0, WIDTH // 8))
        mask = inside & (byte < packed_width)[None, :]
        target = packed_ptr + line * packed_width + byte[None, :]
        for number in tl.static_range(3):
            tl.store(target + number, ((word >> (8 * number)) & 0xFF).to(tl.uint8), mask=mask)


def quantize_group(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    fmt: GroupInt | MXFP4,
    bad: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill `packed` and `scale`, contiguous, from x (E, N, K); the host waits for nothing.

    Returns:
        int32 (1,) on the device, `bad` if it was given (as zero): 1 if x holds NaN or Inf, else 0.
    """
    experts, n, k = x.shape
    width = max(fmt.group_size, min(next_power_of_2(k), _TILE_WIDTH))
    rows = min(next_power_of_2(n), _TILE_VALUES // width)
    tiles_k = cdiv(k, width)
    bad = torch.zeros(1, dtype=torch.int32, device=x.device) if bad is None else bad
    with current(x.device):
        _quantize_group_kernel[(cdiv(n, rows) * tiles_k, experts)](
            x,
            packed,
            scale.view(_BITS_OF[scale.dtype]),
            bad,
            n,
            k,
            x.stride(0),
            x.stride(1),
            packed.shape[-1],
            scale.shape[-1],
            tiles_k,
            GROUP=fmt.group_size,
            BITS=fmt.bits,
            INTEGER=isinstance(fmt, GroupInt),
            LARGEST=float(fmt.largest),
            POW2=fmt.scale_fmt == "ue8m0",
            ROWS=rows,
            WIDTH=width,
            num_warps=max(1, _NUM_WARPS * rows * width // _TILE_VALUES),
        )
    return bad
