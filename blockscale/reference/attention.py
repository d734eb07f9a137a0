"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) around its cache.

A token is cached as one latent c (C values, normalized) and one rotary key r (R values) that all heads share;
the latent may be kept in E4M3 with one scale, max|c| / 448.
What follows the projections is `mla_prologue`, which fills the cache and turns queries, and one of two forms
of attention. `mla_prefill` is for many queries, and takes keys and values that the caller has expanded of all
cached tokens, [k_nope_h ; v_h] = W_kv_b,h c:

    scores_h = (q_nope_h . k_nope_h + q_rope_h . r) * scale        out_h = softmax(scores_h) v_h

`mla_decode` attends to the cache directly:

    scores_h = (q_latent_h . c + q_rope_h . r) * scale        out_h = softmax(scores_h) c

with q_latent_h = W_uk,h^T q_nope,h; the caller multiplies out_h by W_uv,h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from blockscale.errors import BlockscaleError
from blockscale.reference import checks
from blockscale.reference.fp8 import quantize_activation
from blockscale.reference.fused import rms_norm

QUERY_BLOCK = 128  # of one sequence, that a program of `mla_prefill` takes


@dataclass(frozen=True)
class RotaryTable:
    """Rotary embedding of every position.

    Attributes:
        cos, sin: float32 (positions, R/2).
        interleaved: pairs are neighbours; otherwise halves of the R values.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


@dataclass(frozen=True)
class CacheSlots:
    """A cache of latents and rotary keys, and which tokens of it a call is about.

    Attributes:
        latents: (rows, positions, C); a row belongs to a sequence. float8_e4m3fn if there are scales.
        keys: (rows, positions, R).
        scales: float32 (rows, positions), one for the latent of a token, or None.
        rows: int64 (T,), row of the cache of each token's sequence.
        positions: int64 (T,), place of each token in its sequence.
    """

    latents: torch.Tensor
    keys: torch.Tensor
    scales: torch.Tensor | None
    rows: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class Spans:
    """New tokens of several sequences, those of a sequence together and in order, behind cached ones.

    Attributes:
        each: of each sequence, (row of the cache, tokens cached before, new tokens).
        device: where `blocks` is wanted.
    """

    each: Sequence[tuple[int, int, int]]
    device: torch.device

    @cached_property
    def begin(self) -> bool:
        """Whether nothing of the sequences is cached before."""
        return not any(before for _, before, _ in self.each)

    @cached_property
    def blocks(self) -> torch.Tensor:
        """int32 (B, 5): the new tokens in blocks of up to QUERY_BLOCK, those that see the most tokens first.

        Of each its first query, how many it has, the first expanded token of its sequence, how many tokens
        are before its first query, and the row of the cache.
        """
        found, query, key = [], 0, 0
        for row, before, new in self.each:
            for first in range(0, new, QUERY_BLOCK):
                found.append((query + first, min(QUERY_BLOCK, new - first), key, before + first, row))
            query, key = query + new, key + before + new
        found.sort(key=lambda block: -block[3])
        return torch.tensor(found, dtype=torch.int32).to(self.device, non_blocking=True)


def rotate(x: torch.Tensor, positions: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Turn x (T, H, R) by its positions (T,), in float32 and rounded once.

    First members of all pairs come first in the result, then the second ones. Queries and keys get the same
    order, and only their products matter.
    """
    cos, sin = table.cos[positions, None], table.sin[positions, None]
    wide = x.float()
    first, second = (wide[..., 0::2], wide[..., 1::2]) if table.interleaved else wide.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def mla_prologue(
    query: torch.Tensor,
    compressed: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    table: RotaryTable,
    slots: CacheSlots,
) -> torch.Tensor:
    """Turn the rotary part of queries in place and put latents and rotary keys into the cache.

    Args:
        query: (T, H, D), the last R of D rotary; any strides with unit stride along D.
        compressed: (T, C + R), latent before its norm and rotary key before its turn.
        norm: (C,), weight of the latent's RMSNorm.
        eps: of this norm.
        table: of the rotary embedding.
        slots: where the tokens are put.

    Returns:
        (T, C), the normalized latents, of the dtype of compressed.
    """
    check_prologue("mla_prologue", query, compressed, norm, slots)
    positions = slots.positions
    rope = 2 * table.cos.shape[1]
    query[..., -rope:] = rotate(query[..., -rope:], positions, table)
    latent, key = compressed.split([norm.shape[0], rope], -1)
    key = rotate(key[:, None], positions, table)[:, 0]
    latent, at = rms_norm(latent, norm, eps), (slots.rows, positions)
    slots.keys[at] = key.to(slots.keys.dtype)
    if slots.scales is None:
        slots.latents[at] = latent.to(slots.latents.dtype)
    else:
        codes, scale = quantize_activation(latent, latent.shape[-1])
        slots.latents.view(torch.uint8)[at] = codes.view(torch.uint8)  # FP8 cannot be put everywhere
        slots.scales[at] = scale[:, 0]
    return latent


def mla_prefill(
    query: torch.Tensor, expanded: torch.Tensor, slots: CacheSlots, spans: Spans, scale: float
) -> torch.Tensor:
    """Attention of new tokens to their sequences, up to and with their own position.

    Args:
        query: (T, H, N + R), the last R turned.
        expanded: (S, H, N + V), keys without their rotary part, then values, of all tokens of the sequences,
            cached ones and new ones.
        slots: of the new tokens; rotary keys of all of them are in its cache.
        spans: of the new tokens.
        scale: factor of the scores.

    Returns:
        (T, H, V), of the dtype of query.
    """
    check_prefill("mla_prefill", query, expanded, slots, spans)
    nope = query.shape[-1] - slots.keys.shape[-1]
    out, first, first_key = [], 0, 0
    for row, before, new in spans.each:
        length = before + new
        key, value = expanded[first_key : first_key + length].split([nope, expanded.shape[-1] - nope], -1)
        turned = slots.keys[row, :length, None].to(key.dtype).expand(-1, key.shape[1], -1)
        queries, keys, values = (
            each.transpose(0, 1) for each in (query[first : first + new], torch.cat([key, turned], -1), value)
        )
        # A token sees those up to its own: the mask is that of the last rows of a square.
        mask = None
        if before:
            mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(before)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=mask is None, scale=scale
        )
        out.append(attended.transpose(0, 1))
        first, first_key = first + new, first_key + length
    return torch.cat(out)


def mla_decode(
    latent: torch.Tensor, rope: torch.Tensor, slots: CacheSlots, scale: float, longest: int
) -> torch.Tensor:
    """Attention of single queries to what their sequences have cached, up to and with their own position.

    Args:
        latent: (T, H, C), queries in the space of the latents.
        rope: (T, H, R), turned.
        slots: of the queries' own tokens.
        scale: factor of the scores.
        longest: cached tokens to look at, more than any position.

    Returns:
        (T, H, C), of the dtype of latent.
    """
    check_decode("mla_decode", latent, rope, slots)
    seen = stored_latents(slots, (slots.rows, slice(longest)), latent.dtype)
    keys = slots.keys[slots.rows, :longest].to(latent.dtype)
    query, key = torch.cat([latent, rope], -1), torch.cat([seen, keys], -1)
    scores = torch.einsum("thc,tnc->thn", query, key).float() * scale
    place = torch.arange(seen.shape[1], device=scores.device)
    scores = scores.masked_fill(place > slots.positions[:, None, None], -torch.inf)
    return torch.einsum("thn,tnc->thc", scores.softmax(-1).to(latent.dtype), seen)


def stored_latents(slots: CacheSlots, at: tuple[Any, ...], dtype: torch.dtype) -> torch.Tensor:
    """The latents at an index of (rows, positions), in `dtype`."""
    if slots.scales is None:
        return slots.latents[at].to(dtype)
    codes = slots.latents.view(torch.uint8)[at].view(slots.latents.dtype)
    return (codes.float() * slots.scales[at][..., None]).to(dtype)


def check_prologue(
    op: str, query: torch.Tensor, compressed: torch.Tensor, norm: torch.Tensor, slots: CacheSlots
) -> None:
    """Shapes and dtypes of mla_prologue's tensors."""
    for name, tensor in (("compressed", compressed), ("norm", norm)):
        checks.check_dtype(f"{op}: {name}", tensor.dtype, (query.dtype,))
    _check_width(op, "compressed", compressed.shape[-1], slots)
    checks.check_shape(f"{op}: compressed", tuple(compressed.shape), (query.shape[0], compressed.shape[1]))


def check_prefill(
    op: str, query: torch.Tensor, expanded: torch.Tensor, slots: CacheSlots, spans: Spans
) -> None:
    """Shapes and dtypes of mla_prefill's tensors."""
    checks.check_dtype(f"{op}: expanded", expanded.dtype, (query.dtype,))
    tokens = sum(new for _, _, new in spans.each), sum(before + new for _, before, new in spans.each)
    checks.check_shape(f"{op}: query", tuple(query.shape), (tokens[0], *query.shape[1:]))
    checks.check_shape(
        f"{op}: expanded", tuple(expanded.shape), (tokens[1], query.shape[1], expanded.shape[2])
    )
    rope = slots.keys.shape[-1]
    for name, tensor in (("query", query), ("expanded", expanded)):
        if tensor.shape[-1] < rope + (tensor is query):
            raise BlockscaleError(
                "wrong width", where=f"{op}: {name}", expected=f"more than {rope}", got=tensor.shape[-1]
            )


def check_decode(op: str, latent: torch.Tensor, rope: torch.Tensor, slots: CacheSlots) -> None:
    """Shapes and dtypes of mla_decode's tensors."""
    checks.check_dtype(f"{op}: rope", rope.dtype, (latent.dtype,))
    checks.check_shape(f"{op}: rope", tuple(rope.shape), (*latent.shape[:2], rope.shape[2]))
    _check_width(op, "latent and rope", latent.shape[-1] + rope.shape[-1], slots)


def _check_width(op: str, name: str, width: int, slots: CacheSlots) -> None:
    cached = slots.latents.shape[-1] + slots.keys.shape[-1]
    if width != cached:
        raise BlockscaleError(
            "wrong width", where=f"{op}: {name}", expected=f"{cached}, as the cache", got=width
        )
