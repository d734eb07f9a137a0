"""Rotary embedding of queries and keys, RMSNorm of latents, and the write to the cache, in one kernel.

    query[t, h, -R:] = turn(query[t, h, -R:], position[t])                       in place
    cache[row[t], position[t]] = [rms_norm(latent[t]) * norm, turn(key[t], position[t])]

query (T, H, D), compressed (T, C + R) = [latent, key], cache (rows, positions, C + R). Two programs a token:
one for its queries, one for what is cached. Turns in float32, rounded once; the norm as `rms_norm_quantize`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import current
from blockscale.ops._triton.e4m3 import narrow, through, widen
from blockscale.reference.attention import CacheSlots, RotaryTable


@triton.jit
def _turned(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _mla_prologue_kernel(
    query_ptr,
    compressed_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    rows_ptr,
    cache_ptr,
    query_token_stride,
    query_head_stride,
    compressed_stride,
    cache_row_stride,
    cache_position_stride,
    heads,
    nope,
    latent_width,
    eps,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    pair = tl.arange(0, HALF_PADDED)
    inside = pair < HALF
    cos = tl.load(cos_ptr + position * HALF + pair, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + pair, mask=inside, other=0.0)
    first_at = 2 * pair if INTERLEAVED else pair
    second_at = 2 * pair + 1 if INTERLEAVED else pair + HALF
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    if tl.program_id(1) == 0:
        head = tl.arange(0, HEADS)
        mask = (head < heads)[:, None] & inside[None, :]  # (HEADS, HALF_PADDED)
        base = query_ptr + token * query_token_stride + head[:, None] * query_head_stride + nope
        first = widen(tl.load(base + first_at[None, :], mask=mask, other=0.0))
        second = widen(tl.load(base + second_at[None, :], mask=mask, other=0.0))
        first, second = _turned(first, second, cos[None, :], sin[None, :])
        tl.debug_barrier()  # what one thread writes another may still have to read
        tl.store(base + pair[None, :], narrow(first, dtype), mask=mask)
        tl.store(base + pair[None, :] + HALF, narrow(second, dtype), mask=mask)
    else:
        source = compressed_ptr + token * compressed_stride
        row = tl.load(rows_ptr + token)
        target = cache_ptr + row * cache_row_stride + position * cache_position_stride
        stored: tl.constexpr = cache_ptr.dtype.element_ty
        column = tl.arange(0, LATENT)
        filled = column < latent_width
        latent = widen(tl.load(source + column, mask=filled, other=0.0))
        wide = latent.to(tl.float64)
        variance = tl.div_rn(tl.sum(wide * wide, axis=0).to(tl.float32), latent_width.to(tl.float32))
        normalized = through(latent * tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), dtype)
        weight = widen(tl.load(norm_ptr + column, mask=filled, other=0.0))
        tl.store(target + column, narrow(through(normalized * weight, dtype), stored), mask=filled)
        key = source + latent_width
        left = widen(tl.load(key + first_at, mask=inside, other=0.0))
        right = widen(tl.load(key + second_at, mask=inside, other=0.0))
        left, right = _turned(left, right, cos, sin)
        target += latent_width
        tl.store(target + pair, narrow(through(left, dtype), stored), mask=inside)
        tl.store(target + pair + HALF, narrow(through(right, dtype), stored), mask=inside)


def mla_prologue(
    query: torch.Tensor,
    compressed: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    table: RotaryTable,
    slots: CacheSlots,
) -> None:
    """As `ops.mla_prologue`; unit strides along the last dimension of query, compressed and cache."""
    half, cache = table.cos.shape[1], slots.tokens
    with current(query.device):
        _mla_prologue_kernel[(query.shape[0], 2)](
            query,
            compressed,
            norm,
            table.cos,
            table.sin,
            slots.positions,
            slots.rows,
            cache,
            query.stride(0),
            query.stride(1),
            compressed.stride(0),
            cache.stride(0),
            cache.stride(1),
            query.shape[1],
            query.shape[2] - 2 * half,
            norm.shape[0],
            eps,
            HALF=half,
            HALF_PADDED=triton.next_power_of_2(half),
            HEADS=triton.next_power_of_2(query.shape[1]),
            LATENT=triton.next_power_of_2(norm.shape[0]),
            INTERLEAVED=table.interleaved,
            num_warps=4,
            enable_fp_fusion=False,
        )
