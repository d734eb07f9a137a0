"""The product of a few tokens and a tile of weights, for kernels whose time is that of reading the weights.

    total[n, m] = sum_g a_scale[m, g] * b_scale[g] * (sum_{k in g} b[n, k] * a[m, k])

The weight tile is the left operand: the tensor cores' 64-row side is full of weights, the side that holds
tokens is as narrow as 16. Memory is fast only with many bytes in flight, and there are two ways to have them:

- through registers: weights are loaded DEPTH steps ahead with plain loads, which can say that a line is to
  leave L2 first. It is read once: without that it pushes out lines others still need, and the dirty ones
  among those have to be written to memory first, on the bandwidth that the weights need. Tokens take the
  compiler's pipeline of asynchronous copies: stored to shared memory by hand they would need a fence every
  step, which waits for the loads in flight.
- through shared memory: weights take that pipeline too. Triton 3.6 drops the hint there, but it costs no
  registers, of which sums of 128 tokens leave none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_times_weights(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    tokens,
    rows,
    K,
    stride_scale_m,
    stride_scale_g,
    first,
    last,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """total (BLOCK_N, BLOCK_M) over the groups [first, last) of K; DEPTH 0: through shared memory.

    Pointers are those of the tile's first row and column; `tokens` is how many rows of a there are (others
    count as zeros), `rows` how many of b (the last is read again in place of others).
    """
    if DEPTH > 0:
        total = _weights_through_registers(
            a_ptr,
            a_scale_ptr,
            b_ptr,
            b_scale_ptr,
            tokens,
            rows,
            K,
            stride_scale_m,
            stride_scale_g,
            first,
            last,
            BLOCK_M,
            BLOCK_N,
            EVEN_K,
            DEPTH,
        )
    else:
        total = _weights_through_shared(
            a_ptr,
            a_scale_ptr,
            b_ptr,
            b_scale_ptr,
            tokens,
            rows,
            K,
            stride_scale_m,
            stride_scale_g,
            first,
            last,
            BLOCK_M,
            BLOCK_N,
            EVEN_K,
        )
    return total


@triton.jit
def _weights_through_registers(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    tokens,
    rows,
    K,
    stride_scale_m,
    stride_scale_g,
    first,
    last,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Codes are carried from step to step as words: single bytes would take a register each."""
    m = tl.arange(0, BLOCK_M)
    n = tl.minimum(tl.arange(0, BLOCK_N), rows - 1)
    k = tl.arange(0, 128)[None, :]
    words = K // 4
    word = tl.arange(0, 32)[None, :]
    a_ptrs = a_ptr + (m[:, None] * K + first * 128 + k)  # (BLOCK_M, 128)
    b_ptrs = b_ptr.to(tl.pointer_type(tl.int32)) + (n[:, None] * words + first * 32 + word)  # (BLOCK_N, 32)
    a_scale_ptrs = a_scale_ptr + m * stride_scale_m + first * stride_scale_g.to(tl.int64)  # (BLOCK_M,)
    b_scale_ptr += first

    ahead = ()  # one entry a step; mypy holds it to its first length
    for i in tl.static_range(DEPTH):
        ahead += (_weights(b_ptrs + i * 32, first + i, last, words, EVEN_K),)  # type: ignore[assignment]
    a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptr, tokens, first < last, BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for base in range(first, last, DEPTH):
        for i in tl.static_range(DEPTH):  # past `last` everything is zero
            step = base + i
            left = tl.where(step < last, 128 if EVEN_K else K - step * 128, 0)
            codes = tl.load(a_ptrs + i * 128, mask=(m < tokens)[:, None] & (k < left), other=0.0)
            a_scale_ptrs += stride_scale_g
            next_a, next_b = _scales(a_scale_ptrs, b_scale_ptr + i + 1, tokens, step + 1 < last, BLOCK_M)
            product = tl.dot(_as_codes(ahead[i], BLOCK_N), codes.T)
            # A tile takes the registers of the one just used: moving it to others would wait for its arrival.
            far = _weights(b_ptrs + (i + DEPTH) * 32, step + DEPTH, last, words, EVEN_K)
            ahead = ahead[:i] + (far,) + ahead[i + 1 :]  # noqa: RUF005 (no stars in kernels)
            total += product * (a_scale * b_scale)[None, :]
            a_scale, b_scale = next_a, next_b
        a_ptrs += DEPTH * 128
        b_ptrs += DEPTH * 32
        b_scale_ptr += DEPTH
    return total


@triton.jit
def _weights_through_shared(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    tokens,
    rows,
    K,
    stride_scale_m,
    stride_scale_g,
    first,
    last,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """How many steps are in flight is the pipeline's number of stages."""
    m = tl.arange(0, BLOCK_M)
    n = tl.minimum(tl.arange(0, BLOCK_N), rows - 1)
    k = tl.arange(0, 128)[None, :]
    a_ptrs = a_ptr + (m[:, None] * K + k)  # (BLOCK_M, 128)
    b_ptrs = b_ptr + (n[:, None] * K + k)  # (BLOCK_N, 128)
    a_scale_ptrs = a_scale_ptr + m * stride_scale_m  # (BLOCK_M,)
    present = m < tokens

    # The pipeline leaves scales alone: they are loaded one step ahead by hand.
    a_scale_ptrs += first * stride_scale_g.to(tl.int64)
    a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptr + first, tokens, first < last, BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first, last):
        if EVEN_K:
            b = tl.load(b_ptrs + step * 128, eviction_policy="evict_first")
            a = tl.load(a_ptrs + step * 128, mask=present[:, None], other=0.0)
        else:
            inside = k < K - step * 128
            b = tl.load(b_ptrs + step * 128, mask=inside, other=0.0, eviction_policy="evict_first")
            a = tl.load(a_ptrs + step * 128, mask=present[:, None] & inside, other=0.0)
        a_scale_ptrs += stride_scale_g
        next_a, next_b = _scales(a_scale_ptrs, b_scale_ptr + step + 1, tokens, step + 1 < last, BLOCK_M)
        total += tl.dot(b, a.T) * (a_scale * b_scale)[None, :]
        a_scale, b_scale = next_a, next_b
    return total


@triton.jit
def _weights(ptrs, step, last, words, EVEN_K: tl.constexpr):
    """Words (BLOCK_N, 32) of one group, zeros past the end; lines that leave L2 first."""
    left = tl.where(step < last, 32 if EVEN_K else words - step * 32, 0)
    return tl.load(ptrs, mask=tl.arange(0, 32)[None, :] < left, other=0, eviction_policy="evict_first")


@triton.jit
def _scales(a_scale_ptrs, b_scale_ptr, tokens, wanted, BLOCK_M: tl.constexpr):
    """Scales of one group: (BLOCK_M,) of the tokens and the one of the weights, zeros unless wanted."""
    present = tl.arange(0, BLOCK_M) < tl.where(wanted, tokens, 0)
    return tl.load(a_scale_ptrs, mask=present, other=0.0), tl.load(b_scale_ptr, mask=wanted, other=0.0)


@triton.jit
def _as_codes(words, ROWS: tl.constexpr):
    """(ROWS, 32) words as (ROWS, 128) E4M3 codes; nothing moves, a thread's bytes stay where they are."""
    even = tl.join((words & 0xFF).to(tl.uint8), ((words >> 16) & 0xFF).to(tl.uint8))
    odd = tl.join(((words >> 8) & 0xFF).to(tl.uint8), ((words >> 24) & 0xFF).to(tl.uint8))
    return tl.join(even, odd).reshape(ROWS, 128).to(tl.float8e4nv, bitcast=True)
