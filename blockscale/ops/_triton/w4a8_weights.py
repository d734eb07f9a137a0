"""The product of tokens and a tile of four-bit weights, unpacked to E4M3 in registers.

    total[n, m] = sum_g a_scale[m, g] * w_scale[n, g] * (sum_{k in g} w[n, k] * a[m, k])

Weights are the left operand, which tensor cores take from registers: words come through shared memory as they
are stored, `ldmatrix` hands every thread those of its rows, and what three instructions make of a word *is*
two registers of the operand (`reference/w4.py` tells why). No unpacked weight is ever written anywhere.
Scales take the same pipeline of asynchronous copies, which `tl.range` with a number of stages asks for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def tokens_times_w4(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    tokens,
    rows,
    N,
    K,
    stride_scale_m,
    stride_scale_g,
    first,
    last,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MXFP4: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """total (BLOCK_N, BLOCK_M) over the groups [first, last) of K.

    Pointers are those of the tile's first token and first weight row, in the first group of all; `tokens` is
    how many rows of a there are (others count as zeros), `rows` how many weights (the last is read again in
    place of others). WHOLE says that all rows of the tile are there to be read and that scales are aligned:
    loads without masks are wider, which for scales of many tokens saves half of them.
    """
    if WHOLE:
        stride_scale_g = tl.multiple_of(stride_scale_g.to(tl.int64), 4)
    m = tl.arange(0, BLOCK_M)
    n = tl.minimum(tl.arange(0, BLOCK_N), rows - 1)
    k = tl.arange(0, 128)[None, :]
    present = m < tokens
    step = N.to(tl.int64)
    a_ptrs = a_ptr + (m[:, None] * K + (first * 128 + k))  # (BLOCK_M, 128)
    a_scale_ptrs = a_scale_ptr + m * stride_scale_m + first * stride_scale_g.to(tl.int64)  # (BLOCK_M,)
    w_ptrs = w_ptr + first * step * 16 + (n[:, None] * 16 + tl.arange(0, 16)[None, :])  # (BLOCK_N, 16)
    w_scale_ptrs = w_scale_ptr + first * step + n  # (BLOCK_N,)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in tl.range(first, last, num_stages=STAGES):
        words = tl.load(w_ptrs).to(tl.uint32, bitcast=True)
        w_scale = tl.load(w_scale_ptrs)
        if EVEN_K and WHOLE:
            a = tl.load(a_ptrs)
        elif EVEN_K:
            a = tl.load(a_ptrs, mask=present[:, None], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=present[:, None] & (k < K - group * 128), other=0.0)
        if WHOLE:
            a_scale = tl.load(a_scale_ptrs)
        else:
            a_scale = tl.load(a_scale_ptrs, mask=present, other=0.0)
        a_ptrs += 128
        a_scale_ptrs += stride_scale_g
        w_ptrs += step * 16
        w_scale_ptrs += step
        if MXFP4:
            folded = w_scale.to(tl.uint32, bitcast=True)
            product = tl.dot(_from_mxfp4(words, folded, BLOCK_N), a.T)
            w_scale = (folded & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            product = tl.dot(_from_int4(words, BLOCK_N), a.T)
        total += product * (w_scale[:, None] * a_scale[None, :])
    return total


@triton.jit
def _from_int4(words, ROWS: tl.constexpr):
    """(ROWS, 16) words of 8 codes as (ROWS, 128) E4M3 numbers, sign and magnitude * 2**-9."""
    return _as_e4m3(words & 0x87878787, _turned(words) & 0x87878787, ROWS)


@triton.jit
def _from_mxfp4(words, folded, ROWS: tl.constexpr):
    """The same of E2M1 codes; the lower half of `folded` (ROWS,) is what each block adds to exponents."""
    second = tl.arange(0, 16)[None, :] >= 8  # words of the second block of 32 in a half
    shift = tl.where(second, 4, 0).to(tl.uint32)
    exponents = folded[:, None] >> shift
    low = _moved(words, exponents & 15)
    high = _moved(_turned(words), (exponents >> 8) & 15)
    return _as_e4m3(low, high, ROWS)


@triton.jit
def _turned(words):
    """Words with the codes of the high half bytes in the low ones."""
    return (words >> 4) | (words << 28)


@triton.jit
def _moved(words, exponent):
    """Four E4M3 bytes: magnitudes (1 for zero) at bits 0 to 2, signs at bit 7, `exponent` added to all."""
    bits = (words << 2) & 0x1C1C1C1C
    other = ((bits ^ 0x04040404) + 0x7C7C7C7C) & 0x80808080  # bit 7 of bytes that are not zero
    return ((bits + exponent * 0x08080808) & (other - (other >> 7))) | (words & 0x80808080)


@triton.jit
def _as_e4m3(low, high, ROWS: tl.constexpr):
    """Words (ROWS, 16) of either half as (ROWS, 128) codes; nothing moves, a thread's bytes stay in place."""
    words = tl.join(low, high).permute(0, 2, 1).reshape(ROWS, 32)
    even = tl.join((words & 0xFF).to(tl.uint8), ((words >> 16) & 0xFF).to(tl.uint8))
    odd = tl.join(((words >> 8) & 0xFF).to(tl.uint8), ((words >> 24) & 0xFF).to(tl.uint8))
    return tl.join(even, odd).reshape(ROWS, 128).to(tl.float8e4nv, bitcast=True)


def reads_whole_tiles(rows: int, block_m: int, scale: torch.Tensor) -> bool:
    """WHOLE for activations of that many rows (of an expert) and their scales."""
    *outer, row, group = scale.stride()
    return rows % block_m == 0 and row == 1 and all(stride % 4 == 0 for stride in (*outer, group))
