"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), naive and absorbed.

A token is cached as one latent c (kv_lora_rank, normalized) and one rotary key r that all heads share:

    k_h = [W_uk,h c ; r],  v_h = W_uv,h c,  with W_uk and W_uv the rows of kv_b_proj
    naive:     softmax(q_h . k_h * s) v_h
    absorbed:  softmax((W_uk,h^T q_nope,h) . c * s + q_rope,h . r * s), the mean of c, then W_uv,h

Both are the same numbers up to rounding. Naive expands every cached token once a call, which pays for many
queries; absorbed reads the cache alone, which is what decoding wants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from blockscale.model.architecture import ModelConfig
from blockscale.model.rotary import Rotary
from blockscale.model.weights import Weights
from blockscale.reference.fused import rms_norm

_LATENT_EPS = 1e-6  # of the norms of latents, whatever the config says of the others


@dataclass(frozen=True)
class Batch:
    """New tokens of several sequences, those of a sequence together and in order.

    Attributes:
        tokens: int64 (T,), token ids.
        positions: int64 (T,), place of each in its sequence.
        rows: int64 (T,), row of the cache of each one's sequence.
        spans: of each sequence, (row of the cache, tokens cached before, new tokens); None where every
            sequence has one new token and attention is to run absorbed.
        longest: cached tokens that absorbed attention looks at, at least those of the longest sequence.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    spans: tuple[tuple[int, int, int], ...] | None
    longest: int


class KVCache:
    """Latent and rotary key of every token: (layers, rows, positions, kv_lora_rank + qk_rope_head_dim)."""

    def __init__(
        self, config: ModelConfig, rows: int, positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.tokens = torch.zeros(
            config.num_hidden_layers, rows, positions, width, dtype=dtype, device=device
        )

    @property
    def positions(self) -> int:
        """Tokens of a sequence that fit."""
        return self.tokens.shape[2]


class MLA:
    """One layer's attention, from the checkpoint's tensors under `self_attn`."""

    def __init__(self, config: ModelConfig, weights: Weights, rotary: Rotary, layer: int) -> None:
        self._config, self._rotary, self._layer = config, rotary, layer
        self._heads = config.num_attention_heads
        hidden, latent = config.hidden_size, config.kv_lora_rank
        query_rows = self._heads * config.qk_head_dim
        into = {"kv_a_proj_with_mqa": latent + config.qk_rope_head_dim}
        if config.q_lora_rank is None:
            self._into = weights.beside({"q_proj": query_rows, **into}, hidden)
        else:
            self._into = weights.beside({"q_a_proj": config.q_lora_rank, **into}, hidden)
            self._q_norm = weights.tensor("q_a_layernorm.weight", config.q_lora_rank)
            self._q_b = weights.linear("q_b_proj", query_rows, config.q_lora_rank)
        self._kv_norm = weights.tensor("kv_a_layernorm.weight", latent)
        expanded = self._heads * (config.qk_nope_head_dim + config.v_head_dim)
        self._kv_b = weights.linear("kv_b_proj", expanded, latent)
        self._o = weights.linear("o_proj", hidden, self._heads * config.v_head_dim)
        # Of absorbed attention, prepared once: (H, qk_nope, kv_lora_rank) and (H, v, kv_lora_rank).
        expand = self._kv_b.dequantized(weights.dtype).view(self._heads, -1, config.kv_lora_rank)
        self._w_uk, self._w_uv = expand.split([config.qk_nope_head_dim, config.v_head_dim], 1)

    def __call__(self, x: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """(T, hidden) -> (T, hidden); the new tokens are put into the cache."""
        config = self._config
        query_width = config.q_lora_rank or self._heads * config.qk_head_dim
        query, latent, key = self._into(x).split(
            [query_width, config.kv_lora_rank, config.qk_rope_head_dim], -1
        )
        if config.q_lora_rank is not None:
            query = self._q_b(rms_norm(query, self._q_norm, _LATENT_EPS))
        query = query.view(-1, self._heads, config.qk_head_dim)
        nope, rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        rope = self._rotary(rope, batch.positions)
        latent = rms_norm(latent, self._kv_norm, _LATENT_EPS)
        key = self._rotary(key[:, None], batch.positions)[:, 0]
        tokens = cache.tokens[self._layer]
        tokens[batch.rows, batch.positions] = torch.cat([latent, key], -1).to(tokens.dtype)
        if batch.spans is None:
            out = self._absorbed(nope, rope, batch, tokens)
        else:
            out = self._naive(torch.cat([nope, rope], -1), batch.spans, tokens)
        return self._o(out.flatten(1))

    def _naive(
        self, query: torch.Tensor, spans: tuple[tuple[int, int, int], ...], tokens: torch.Tensor
    ) -> torch.Tensor:
        """Query (T, H, qk_head_dim) -> (T, H, v_head_dim), sequence by sequence."""
        config, out, first = self._config, [], 0
        for row, before, new in spans:
            latent, rope = (
                tokens[row, : before + new]
                .to(query.dtype)
                .split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
            )
            expanded = self._kv_b(latent).view(-1, self._heads, config.qk_nope_head_dim + config.v_head_dim)
            nope, value = expanded.split([config.qk_nope_head_dim, config.v_head_dim], -1)
            key = torch.cat([nope, rope[:, None].expand(-1, self._heads, -1)], -1)
            # A token sees those up to its own: the mask is that of the last rows of a square.
            mask = None
            if before:
                mask = torch.ones(new, before + new, dtype=torch.bool, device=query.device).tril(before)
            queries, key, value = (
                each.transpose(0, 1)[None] for each in (query[first : first + new], key, value)
            )
            attended = F.scaled_dot_product_attention(
                queries, key, value, mask, is_causal=mask is None, scale=config.softmax_scale
            )
            out.append(attended[0].transpose(0, 1))
            first += new
        return torch.cat(out)

    def _absorbed(
        self, nope: torch.Tensor, rope: torch.Tensor, batch: Batch, tokens: torch.Tensor
    ) -> torch.Tensor:
        """One query a sequence, (B, H, qk_nope) and (B, H, qk_rope), -> (B, H, v_head_dim)."""
        config = self._config
        seen = tokens[batch.rows, : batch.longest].to(nope.dtype)
        query = torch.cat([torch.einsum("bhn,hnc->bhc", nope, self._w_uk), rope], -1)
        scores = torch.einsum("bhc,btc->bht", query, seen).float() * config.softmax_scale
        place = torch.arange(batch.longest, device=scores.device)
        scores = scores.masked_fill(place > batch.positions[:, None, None], -torch.inf)
        weights = scores.softmax(-1).to(nope.dtype)
        mean = torch.einsum("bht,btc->bhc", weights, seen[..., : config.kv_lora_rank])
        return torch.einsum("bhc,hvc->bhv", mean, self._w_uv)
