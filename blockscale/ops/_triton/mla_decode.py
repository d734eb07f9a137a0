"""Attention of single queries to a latent cache: split along the sequence, then put together.

    scores[h, n] = (latent[h] . c[n] + rope[h] . r[n]) * scale      out[h] = softmax(scores[h]) . c

latent (T, H, C), rope (T, H, R), c (rows, positions, C), r (rows, positions, R), out (T, H, C); where c are
E4M3 codes, their scales (rows, positions) go into scores and weights. A program takes up to 64 heads of one
query and a share of its sequence; a tile of the cache is read once and used as keys and as values. Shares
leave their mean and the logarithm (base 2) of their sum of weights in float32, and a second kernel puts them
together in order. Products of 16-bit numbers on tensor cores, sums in float32, weights rounded to the dtype
of latent.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import (
    cdiv,
    current,
    next_power_of_2,
    overlap,
    processors,
    wait_for_previous_kernel,
)
from blockscale.ops._triton.e4m3 import converts_to_e4m3, e4m3_value, narrow, operand
from blockscale.ops._triton.launch import quick
from blockscale.reference.attention import CacheSlots

_TOKENS = 64  # of a tile of the cache; 32 took a quarter longer with many long sequences
_LEAST_HEADS, _MOST_HEADS = 16, 64  # the least are those of a tensor core product
_LEAST_SHARE = 64  # tokens for which a program of its own pays
_PROGRAMS_PER_PROCESSOR = 2
_LOWEST = tl.constexpr(-1e30)  # below every score, and finite, so that differences are numbers
_GATHERED = 128  # columns of a program that puts shares together


@quick
@triton.jit(
    do_not_specialize=["scales_row_stride", "shares", "share"],
    do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"],
)
def _mla_decode_kernel(
    latent_ptr,
    rope_ptr,
    latents_ptr,
    keys_ptr,
    scales_ptr,
    rows_ptr,
    positions_ptr,
    mean_ptr,
    sum_ptr,
    latent_token_stride,
    latent_head_stride,
    rope_token_stride,
    rope_head_stride,
    latents_row_stride,
    latents_position_stride,
    keys_row_stride,
    keys_position_stride,
    scales_row_stride,
    heads,
    latent_width,
    rope_width,
    shares,
    share,
    scale,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIVIDED: tl.constexpr,
    SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous_kernel(OVERLAPS)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    here = (head < heads)[:, None]
    column, pair = tl.arange(0, LATENT), tl.arange(0, ROPE)
    in_latent, in_rope = (column < latent_width)[None, :], (pair < rope_width)[None, :]
    first = part * share
    last = tl.minimum(first + share, tl.load(positions_ptr + token).to(tl.int32) + 1)
    at = latent_ptr + token * latent_token_stride + head[:, None] * latent_head_stride + column[None, :]
    dtype: tl.constexpr = latent_ptr.dtype.element_ty
    query = operand(tl.load(at, mask=here & in_latent, other=0.0), dtype)  # (HEADS, LATENT)
    at = rope_ptr + token * rope_token_stride + head[:, None] * rope_head_stride + pair[None, :]
    turned = operand(tl.load(at, mask=here & in_rope, other=0.0), dtype)
    row = tl.load(rows_ptr + token)
    top = tl.full((HEADS,), _LOWEST, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mean = tl.zeros((HEADS, LATENT), tl.float32)
    for start in range(first, last, TOKENS):
        place = start + tl.arange(0, TOKENS)
        seen = (place < last)[:, None]
        line = latents_ptr + row * latents_row_stride + place.to(tl.int64)[:, None] * latents_position_stride
        latents = tl.load(line + column[None, :], mask=seen & in_latent, other=0)
        if SCALED:
            latents = e4m3_value(latents, NATIVE)
        latents = operand(latents, dtype)
        key = keys_ptr + row * keys_row_stride + place.to(tl.int64)[:, None] * keys_position_stride
        keys = operand(tl.load(key + pair[None, :], mask=seen & in_rope, other=0.0), dtype)
        scores = tl.dot(query, tl.trans(latents))
        if SCALED:
            factor = tl.load(scales_ptr + row * scales_row_stride + place, mask=place < last, other=0.0)
            scores *= factor[None, :]
        scores = tl.dot(turned, tl.trans(keys), scores) * scale  # (HEADS, TOKENS), of base 2
        scores = tl.where((place < last)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * fade + tl.sum(weights, axis=1)
        if SCALED:
            weights *= factor[None, :]
        mean = tl.dot(operand(weights, dtype), latents, mean * fade[:, None])
        top = higher
    full = (token * heads + head) * shares + part
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    at = mean_ptr + full[:, None] * latent_width + column[None, :]
    # Nothing of a share past the sequence's end counts, so it need not be written.
    some = (head < tl.where(first < last, heads, 0))[:, None] & in_latent
    tl.store(at, narrow(mean, mean_ptr.dtype.element_ty), mask=some)
    if DIVIDED:
        tl.store(sum_ptr + full, top + tl.log2(total), mask=head < heads)


@quick
@triton.jit(do_not_specialize=["shares"])
def _gather_kernel(
    mean_ptr,
    sum_ptr,
    out_ptr,
    width,
    shares,
    WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The shares' means, weighted by their sums: of one head of a query, WIDTH columns a program."""
    wait_for_previous_kernel(OVERLAPS)
    head = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, SHARES), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sums = tl.load(sum_ptr + head * shares + part, mask=part < shares, other=float("-inf"))
    weights = tl.exp2(sums - tl.max(sums, axis=0))
    counts = (weights > 0)[:, None] & (column < width)[None, :]
    at = mean_ptr + (head * shares + part)[:, None] * width + column[None, :]
    means = tl.load(at, mask=counts, other=0.0)  # (SHARES, WIDTH)
    out = tl.sum(means * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + head * width + column, narrow(out, out_ptr.dtype.element_ty), mask=column < width)


def shares_of(queries: int, head_blocks: int, longest: int, device: torch.device) -> int:
    """Programs that divide a sequence: enough to fill the device, each with tokens enough to be worth it."""
    wanted = math.ceil(_PROGRAMS_PER_PROCESSOR * processors(device) / (queries * head_blocks))
    return max(1, min(wanted, longest // _LEAST_SHARE))


def mla_decode(
    latent: torch.Tensor,
    rope: torch.Tensor,
    slots: CacheSlots,
    scale: float,
    longest: int,
    out: torch.Tensor,
) -> None:
    """Fill out (T, H, C), contiguous."""
    tokens, heads, width = latent.shape
    latents, keys, scales = slots.latents, slots.keys, slots.scales
    block = min(_MOST_HEADS, max(_LEAST_HEADS, next_power_of_2(heads)))
    blocks = cdiv(heads, block)
    shares = shares_of(tokens, blocks, longest, latent.device)
    share = cdiv(cdiv(longest, shares), _TOKENS) * _TOKENS
    means, sums = out, out
    if shares > 1:
        means = torch.empty((tokens, heads, shares, width), dtype=torch.float32, device=latent.device)
        sums = torch.empty((tokens, heads, shares), dtype=torch.float32, device=latent.device)
    with current(latent.device):
        _mla_decode_kernel[(tokens, shares, blocks)](
            latent,
            rope,
            latents if scales is None else latents.view(torch.uint8),
            keys,
            keys if scales is None else scales,
            slots.rows,
            slots.positions,
            means,
            sums,
            latent.stride(0),
            latent.stride(1),
            rope.stride(0),
            rope.stride(1),
            latents.stride(0),
            latents.stride(1),
            keys.stride(0),
            keys.stride(1),
            0 if scales is None else scales.stride(0),
            heads,
            width,
            rope.shape[2],
            shares,
            share,
            scale * math.log2(math.e),
            LATENT=max(16, next_power_of_2(width)),
            ROPE=max(16, next_power_of_2(rope.shape[2])),
            HEADS=block,
            TOKENS=_TOKENS,
            DIVIDED=shares > 1,
            SCALED=scales is not None,
            NATIVE=converts_to_e4m3(latent.device),
            num_warps=4 if block == _LEAST_HEADS and scales is None else 8,  # codes are widened in registers
            num_stages=2,
            **overlap(latent.device),
        )
        if shares > 1:
            _gather_kernel[(tokens * heads, cdiv(width, _GATHERED))](
                means,
                sums,
                out,
                width,
                shares,
                WIDTH=_GATHERED,
                SHARES=next_power_of_2(shares),
                num_warps=4,
                **overlap(latent.device),
            )
