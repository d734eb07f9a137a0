"""Attention of new tokens to their sequences, several sequences of any lengths in one launch.

    scores[h] = (q_nope[h] . k_nope[h] + q_rope[h] . r) * scale        out[h] = softmax(scores[h]) . v[h]

query (T, H, N + R), expanded [k_nope ; v] (S, H, N + V), rotary keys r (rows, positions, R) in the cache, out
(T, H, V). A program takes one head of up to QUERY_BLOCK queries of a sequence, which follow each other, so
that they all see what is up to the first of them: only what is behind it is masked. Programs that have the
most to do start first. Products of 16-bit numbers on tensor cores, sums in float32, weights rounded to the
dtype of query before they meet the values. Heads of 128 values can be quantized on the way out, each with a
scale: E4M3 codes (T, H V), scales (T, H) at any strides.
"""

from __future__ import annotations

import math

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
    operand,
    scaled_codes,
    through,
)
from blockscale.ops._triton.launch import quick
from blockscale.reference.attention import QUERY_BLOCK, Spans

_KEYS = 128  # of a tile; 64 took up to a tenth longer
_GROUP = 128  # values of a scale
_LOWEST = tl.constexpr(-1e30)  # below every score, and finite, so that differences are numbers


@triton.jit
def _tile(at, rows, columns, MASKED: tl.constexpr, EVEN: tl.constexpr, dtype: tl.constexpr):
    """What is at (R, C) pointers: of `rows` (R, 1) only if MASKED, of all `columns` (1, C) if EVEN."""
    if MASKED and EVEN:
        return operand(tl.load(at, mask=rows, other=0.0), dtype)
    elif MASKED:
        return operand(tl.load(at, mask=rows & columns, other=0.0), dtype)
    elif EVEN:
        return operand(tl.load(at), dtype)
    else:
        return operand(tl.load(at, mask=columns, other=0.0), dtype)


@triton.jit
def _attend(
    state,
    queries,
    first,
    last,
    place,
    sources,
    strides,
    factor,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The state (top, total, mean) with keys from `first` to `last`, which queries see up to `place`."""
    top, total, mean = state
    query, turned = queries
    dtype: tl.constexpr = sources[0].dtype.element_ty
    nope, rope, value = tl.arange(0, PADDED[0]), tl.arange(0, PADDED[1]), tl.arange(0, PADDED[2])
    for start in range(first, last, KEYS):
        key = start + tl.arange(0, KEYS)
        rows = (key < last)[:, None]
        line = sources[0] + key.to(tl.int64)[:, None] * strides[0]
        keys = _tile(
            line + nope[None, :], rows, (nope < WIDTHS[0])[None, :], MASKED, WIDTHS[0] == PADDED[0], dtype
        )
        scores = tl.dot(query, tl.trans(keys))
        other = sources[1] + key.to(tl.int64)[:, None] * strides[1] + rope[None, :]
        keys = _tile(other, rows, (rope < WIDTHS[1])[None, :], MASKED, WIDTHS[1] == PADDED[1], dtype)
        scores = tl.dot(turned, tl.trans(keys), scores) * factor  # (QUERIES, KEYS), of base 2
        if MASKED:
            scores = tl.where(key[None, :] <= place[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * fade + tl.sum(weights, axis=1)
        at = line + WIDTHS[0] + value[None, :]
        values = _tile(at, rows, (value < WIDTHS[2])[None, :], MASKED, WIDTHS[2] == PADDED[2], dtype)
        mean = tl.dot(operand(weights, dtype), values, mean * fade[:, None])
        top = higher
    return top, total, mean


@quick
@triton.jit(do_not_specialize=["keys_row_stride", "scale_token_stride", "scale_head_stride"])
def _mla_prefill_kernel(
    query_ptr,
    expanded_ptr,
    keys_ptr,
    blocks_ptr,
    out_ptr,
    scale_ptr,
    query_token_stride,
    query_head_stride,
    expanded_token_stride,
    expanded_head_stride,
    keys_row_stride,
    keys_position_stride,
    scale_token_stride,
    scale_head_stride,
    heads,
    factor,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    NOPE_PADDED: tl.constexpr,
    ROPE_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous_kernel(OVERLAPS)
    head, block = tl.program_id(0), blocks_ptr + tl.program_id(1) * 5
    first_query, count, first_key = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    before, row = tl.load(block + 3), tl.load(block + 4)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    index = tl.arange(0, QUERIES)
    here = (index < count)[:, None]
    token = (first_query + index).to(tl.int64)[:, None]
    nope, rope, value = tl.arange(0, NOPE_PADDED), tl.arange(0, ROPE_PADDED), tl.arange(0, VALUE_PADDED)
    line = query_ptr + token * query_token_stride + head * query_head_stride
    query = _tile(line + nope[None, :], here, (nope < NOPE)[None, :], True, NOPE == NOPE_PADDED, dtype)
    turned = _tile(
        line + NOPE + rope[None, :], here, (rope < ROPE)[None, :], True, ROPE == ROPE_PADDED, dtype
    )
    expanded = expanded_ptr + first_key.to(tl.int64) * expanded_token_stride + head * expanded_head_stride
    sources = (expanded, keys_ptr + row.to(tl.int64) * keys_row_stride)
    strides = (expanded_token_stride, keys_position_stride)
    widths: tl.constexpr = (NOPE, ROPE, VALUE)
    padded: tl.constexpr = (NOPE_PADDED, ROPE_PADDED, VALUE_PADDED)
    state = (
        tl.full((QUERIES,), _LOWEST, tl.float32),
        tl.zeros((QUERIES,), tl.float32),
        tl.zeros((QUERIES, VALUE_PADDED), tl.float32),
    )
    queries, place = (query, turned), before + index
    seen = (before + 1) // KEYS * KEYS  # by all of these queries
    state = _attend(state, queries, 0, seen, place, sources, strides, factor, widths, padded, KEYS, False)
    last = before + count
    state = _attend(state, queries, seen, last, place, sources, strides, factor, widths, padded, KEYS, True)
    mean = state[2] / state[1][:, None]
    at = out_ptr + (token * heads + head) * VALUE + value[None, :]
    if QUANTIZES:
        y = through(mean, dtype)
        scale = activation_scale(tl.max(magnitude(y), axis=1), POW2)[:, None]
        tl.store(at, scaled_codes(y, scale, 1, POW2, NATIVE), mask=here)
        tl.store(scale_ptr + token * scale_token_stride + head * scale_head_stride, scale, mask=here)
    else:
        tl.store(at, narrow(mean, dtype), mask=here & (value < VALUE)[None, :])


def quantizes(value: int) -> bool:
    """Whether heads of so many values are groups of a quantizer."""
    return value == _GROUP


def mla_prefill(
    query: torch.Tensor,
    expanded: torch.Tensor,
    keys: torch.Tensor,
    spans: Spans,
    scale: float,
    out: torch.Tensor,
    out_scale: torch.Tensor | None = None,
    scale_fmt: ScaleFmt | None = None,
) -> None:
    """Fill out (T, H, V), contiguous; the others with unit stride along their last dimension.

    With `out_scale` (T, H) it is filled with codes in `scale_fmt`.
    """
    heads, rope = query.shape[1], keys.shape[2]
    nope, value = query.shape[2] - rope, out.shape[2]
    blocks = spans.blocks
    with current(query.device):
        _mla_prefill_kernel[(heads, blocks.shape[0])](
            query,
            expanded,
            keys,
            blocks,
            out if out_scale is None else out.view(torch.uint8),
            out if out_scale is None else out_scale,
            query.stride(0),
            query.stride(1),
            expanded.stride(0),
            expanded.stride(1),
            keys.stride(0),
            keys.stride(1),
            *((0, 0) if out_scale is None else out_scale.stride()),
            heads,
            scale * math.log2(math.e),
            NOPE=nope,
            ROPE=rope,
            VALUE=value,
            NOPE_PADDED=max(16, next_power_of_2(nope)),
            ROPE_PADDED=max(16, next_power_of_2(rope)),
            VALUE_PADDED=max(16, next_power_of_2(value)),
            QUERIES=QUERY_BLOCK,
            KEYS=_KEYS,
            QUANTIZES=out_scale is not None,
            POW2=scale_fmt == "ue8m0",
            NATIVE=converts_to_e4m3(query.device),
            num_warps=8,
            num_stages=2,
            **overlap(query.device),
        )
