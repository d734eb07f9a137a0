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

from blockscale import ops
from blockscale.formats import ScaleFmt
from blockscale.model.architecture import ModelConfig
from blockscale.model.weights import Size, Weights
from blockscale.reference.attention import CacheSlots, RotaryTable, Spans, stored_latents

_LATENT_EPS = 1e-6  # of the norms of latents, whatever the config says of the others


@dataclass(frozen=True)
class Batch:
    """New tokens of several sequences, those of a sequence together and in order.

    Attributes:
        tokens: int64 (T,), token ids.
        positions: int64 (T,), place of each in its sequence.
        rows: int64 (T,), row of the cache of each one's sequence.
        spans: which of them are of which sequence; None where sequences have one new token each, or a few,
            and attention is to run absorbed.
        longest: cached tokens that absorbed attention looks at, at least those of the longest sequence.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    spans: Spans | None
    longest: int


class KVCache:
    """Latent and rotary key of every token, of every layer.

    Attributes:
        latents: (layers, rows, positions, kv_lora_rank), of the model's dtype or float8_e4m3fn.
        keys: (layers, rows, positions, qk_rope_head_dim), of the model's dtype.
        scales: float32 (layers, rows, positions), of FP8 latents, else None.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        rows: int,
        positions: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fp8: bool = False,
    ) -> None:
        """All zeros."""
        shape, latent = (layers, rows, positions), config.kv_lora_rank
        stored = torch.float8_e4m3fn if fp8 else dtype
        self.latents = torch.zeros(*shape, latent, dtype=stored, device=device)
        self.keys = torch.zeros(*shape, config.qk_rope_head_dim, dtype=dtype, device=device)
        self.scales = torch.zeros(shape, device=device) if fp8 else None

    @property
    def positions(self) -> int:
        """Tokens of a sequence that fit."""
        return self.latents.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Memory of a token in all layers."""
        return sum(
            part.nbytes // (part.shape[1] * part.shape[2])
            for part in (self.latents, self.keys, self.scales)
            if part is not None
        )

    def slots(self, layer: int, rows: torch.Tensor, positions: torch.Tensor) -> CacheSlots:
        """Places of tokens in a layer's cache."""
        scales = None if self.scales is None else self.scales[layer]
        return CacheSlots(self.latents[layer], self.keys[layer], scales, rows, positions)


class MLA:
    """One layer's attention, from the checkpoint's tensors under `self_attn`.

    Every rank has its heads, and all of what they share: the cache is the same on all of them.
    """

    def __init__(self, config: ModelConfig, weights: Weights, table: RotaryTable, layer: int) -> None:
        self._config, self._table, self._layer = config, table, layer
        self._heads = config.num_attention_heads // weights.ranks.world
        hidden, latent = config.hidden_size, config.kv_lora_rank
        query_rows = weights.share(config.num_attention_heads * config.qk_head_dim)
        into: dict[str, Size] = {"kv_a_proj_with_mqa": latent + config.qk_rope_head_dim}
        if config.q_lora_rank is None:
            self._into = weights.beside({"q_proj": query_rows, **into}, hidden)
        else:
            self._into = weights.beside({"q_a_proj": config.q_lora_rank, **into}, hidden)
            self._q_norm = weights.tensor("q_a_layernorm.weight", config.q_lora_rank)
            self._q_b = weights.linear("q_b_proj", query_rows, config.q_lora_rank)
        self._kv_norm = weights.tensor("kv_a_layernorm.weight", latent)
        expanded = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self._kv_b = weights.linear("kv_b_proj", weights.share(expanded), latent)
        values = weights.share(config.num_attention_heads * config.v_head_dim)
        self._o = weights.linear("o_proj", hidden, values)
        # Of absorbed attention, prepared once: (H, qk_nope, kv_lora_rank) and (H, kv_lora_rank, v).
        expand = self._kv_b.dequantized(weights.dtype).view(self._heads, -1, config.kv_lora_rank)
        self._w_uk, w_uv = expand.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        self._w_uv = w_uv.transpose(1, 2)

    @property
    def quantizes(self) -> ScaleFmt | None:
        """Scales of the activations it is to be called on; None if it takes them as they are."""
        return self._into.quantizes

    def __call__(self, x: ops.Normed, batch: Batch, cache: KVCache) -> torch.Tensor:
        """(T, hidden) -> this rank's summand of (T, hidden); the new tokens are put into the cache."""
        config = self._config
        query_width = config.q_lora_rank or self._heads * config.qk_head_dim
        query, compressed = self._into.on(x).split(
            [query_width, config.kv_lora_rank + config.qk_rope_head_dim], -1
        )
        if config.q_lora_rank is not None:
            scale_fmt = self._q_b.quantizes
            normed = ops.rms_norm(
                query, self._q_norm, _LATENT_EPS, scale_fmt=scale_fmt, plain=scale_fmt is None
            )
            query = self._q_b.on(normed)
        query = query.view(-1, self._heads, config.qk_head_dim)
        slots = cache.slots(self._layer, batch.rows, batch.positions)
        spans = batch.spans
        # What the cache holds of new tokens is all there is to expand, as long as nothing was before them.
        at_once = spans is not None and spans.begin and slots.scales is None
        quantized = ops.mla_prologue(
            query,
            compressed,
            self._kv_norm,
            _LATENT_EPS,
            self._table,
            slots,
            self._kv_b.quantizes if at_once else None,
        )
        if spans is None:
            return self._o(self._absorbed(query, slots, batch.longest).flatten(1))
        if quantized is None:
            expanded = self._kv_b(self._cached(spans, slots, query.dtype))
        else:
            expanded = self._kv_b.multiply(*quantized, query.dtype)
        return self._naive(query, expanded.unflatten(1, (self._heads, -1)), slots, spans)

    @staticmethod
    def _cached(spans: Spans, slots: CacheSlots, dtype: torch.dtype) -> torch.Tensor:
        """Latents (S, kv_lora_rank) of all tokens of the sequences."""
        seen = [stored_latents(slots, (row, slice(before + new)), dtype) for row, before, new in spans.each]
        return seen[0] if len(seen) == 1 else torch.cat(seen)

    def _naive(
        self, query: torch.Tensor, expanded: torch.Tensor, slots: CacheSlots, spans: Spans
    ) -> torch.Tensor:
        """Query (T, H, qk_head_dim) and what is expanded (S, H, ...) -> (T, hidden)."""
        scale, scale_fmt = self._config.softmax_scale, self._o.quantizes
        if scale_fmt is None:
            return self._o(ops.mla_prefill(query, expanded, slots, spans, scale).flatten(1))
        codes = ops.mla_prefill_quantize(query, expanded, slots, spans, scale, scale_fmt)
        return self._o.multiply(*codes, query.dtype)

    def _absorbed(self, query: torch.Tensor, slots: CacheSlots, longest: int) -> torch.Tensor:
        """Single queries (B, H, qk_head_dim) -> (B, H, v_head_dim)."""
        config = self._config
        nope, rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        latent = torch.bmm(nope.transpose(0, 1), self._w_uk).transpose(0, 1)
        mean = ops.mla_decode(latent, rope, slots, config.softmax_scale, longest)
        out = query.new_empty(*query.shape[:2], config.v_head_dim)
        torch.bmm(mean.transpose(0, 1), self._w_uv, out=out.transpose(0, 1))
        return out
