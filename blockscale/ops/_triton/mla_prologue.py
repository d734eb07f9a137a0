"""Rotary embedding of queries and keys, RMSNorm of latents, and the write to the cache, in one kernel.

    query[t, h, -R:] = turn(query[t, h, -R:], position[t])                 in place
    latents[row[t], position[t]] = rms_norm(latent[t]) * norm              or E4M3 codes of it and a scale
    keys[row[t], position[t]] = turn(key[t], position[t])

query (T, H, D), compressed (T, C + R) = [latent, key], latents (rows, positions, C), keys (rows, positions,
R). Two programs a token: one for its queries, one for what is cached. Turns in float32, rounded once; the
norm and codes as `rms_norm_quantize` makes them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.formats import ScaleFmt
from blockscale.ops._triton.device import current, next_power_of_2, overlap, wait_for_previous_kernel
from blockscale.ops._triton.e4m3 import (
    activation_scale,
    converts_to_e4m3,
    magnitude,
    narrow,
    scaled_codes,
    through,
    widen,
)
from blockscale.ops._triton.launch import quick
from blockscale.reference.attention import CacheSlots, RotaryTable

_GROUP = 128  # values of a scale of latents that are quantized for a product


@triton.jit
def _turned(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@quick
@triton.jit(
    do_not_specialize=["scales_row_stride", "codes_scale_token_stride", "codes_scale_group_stride"],
    do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"],
)
def _mla_prologue_kernel(
    query_ptr,
    compressed_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    rows_ptr,
    latents_ptr,
    keys_ptr,
    scales_ptr,
    codes_ptr,
    codes_scale_ptr,
    query_token_stride,
    query_head_stride,
    compressed_stride,
    latents_row_stride,
    latents_position_stride,
    keys_row_stride,
    keys_position_stride,
    scales_row_stride,
    codes_scale_token_stride,
    codes_scale_group_stride,
    heads,
    nope,
    latent_width,
    eps,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZES: tl.constexpr,
    POW2: tl.constexpr,
    GROUP: tl.constexpr,
    NATIVE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous_kernel(OVERLAPS)
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
        latents = latents_ptr + row * latents_row_stride + position * latents_position_stride
        keys = keys_ptr + row * keys_row_stride + position * keys_position_stride
        stored: tl.constexpr = keys_ptr.dtype.element_ty
        column = tl.arange(0, LATENT)
        filled = column < latent_width
        latent = widen(tl.load(source + column, mask=filled, other=0.0))
        wide = latent.to(tl.float64)
        variance = tl.div_rn(tl.sum(wide * wide, axis=0).to(tl.float32), latent_width.to(tl.float32))
        normalized = through(latent * tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), dtype)
        weight = widen(tl.load(norm_ptr + column, mask=filled, other=0.0))
        y = through(normalized * weight, dtype)
        CORRECTIONS: tl.constexpr = 2 if dtype == tl.float32 else 1
        if QUANTIZES:
            groups = tl.reshape(y, (LATENT // GROUP, GROUP))
            group = tl.arange(0, LATENT // GROUP)
            scale = activation_scale(tl.max(magnitude(groups), axis=1), POW2)
            at = codes_scale_ptr + token * codes_scale_token_stride + group * codes_scale_group_stride
            tl.store(at, scale, mask=group * GROUP < latent_width)
            at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            codes = scaled_codes(groups, scale[:, None], CORRECTIONS, POW2, NATIVE)
            tl.store(codes_ptr + token * latent_width + at, codes, mask=at < latent_width)
        if SCALED:
            scale = activation_scale(tl.max(magnitude(y), axis=0), False)
            tl.store(latents + column, scaled_codes(y, scale, CORRECTIONS, False, NATIVE), mask=filled)
            tl.store(scales_ptr + row * scales_row_stride + position, scale)
        else:
            tl.store(latents + column, narrow(y, stored), mask=filled)
        key = source + latent_width
        left = widen(tl.load(key + first_at, mask=inside, other=0.0))
        right = widen(tl.load(key + second_at, mask=inside, other=0.0))
        left, right = _turned(left, right, cos, sin)
        tl.store(keys + pair, narrow(through(left, dtype), stored), mask=inside)
        tl.store(keys + pair + HALF, narrow(through(right, dtype), stored), mask=inside)


def mla_prologue(
    query: torch.Tensor,
    compressed: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    table: RotaryTable,
    slots: CacheSlots,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale_fmt: ScaleFmt | None = None,
) -> None:
    """As `ops.mla_prologue`; unit strides along the last dimension of everything.

    quantized: codes (T, C), contiguous, and their scales at any strides, to fill with the latents.
    """
    codes, codes_scale = quantized or (compressed, compressed)
    half, latents, keys = table.cos.shape[1], slots.latents, slots.keys
    scales = slots.scales
    with current(query.device):
        _mla_prologue_kernel[(query.shape[0], 2)](
            query,
            compressed,
            norm,
            table.cos,
            table.sin,
            slots.positions,
            slots.rows,
            latents if scales is None else latents.view(torch.uint8),
            keys,
            keys if scales is None else scales,
            codes if quantized is None else codes.view(torch.uint8),
            codes_scale,
            query.stride(0),
            query.stride(1),
            compressed.stride(0),
            latents.stride(0),
            latents.stride(1),
            keys.stride(0),
            keys.stride(1),
            0 if scales is None else scales.stride(0),
            *codes_scale.stride(),
            query.shape[1],
            query.shape[2] - 2 * half,
            norm.shape[0],
            eps,
            HALF=half,
            HALF_PADDED=next_power_of_2(half),
            HEADS=next_power_of_2(query.shape[1]),
            LATENT=max(_GROUP, next_power_of_2(norm.shape[0])),
            INTERLEAVED=table.interleaved,
            SCALED=scales is not None,
            QUANTIZES=quantized is not None,
            POW2=scale_fmt == "ue8m0",
            GROUP=_GROUP,
            NATIVE=converts_to_e4m3(query.device),
            num_warps=4,
            enable_fp_fusion=False,
            **overlap(query.device),
        )
