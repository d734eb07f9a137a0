"""DeepSeek-V2, V3 and V3.1 for inference, built straight from a checkpoint's tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from blockscale import ops
from blockscale.model.architecture import ModelConfig
from blockscale.model.attention import Batch, KVCache
from blockscale.model.layer import Layer
from blockscale.model.mtp import MTP
from blockscale.model.rotary import rotary_table
from blockscale.model.weights import Weights


class Transformer:
    """Token ids to logits.

    Attributes:
        config: the architecture.
        dtype: of activations.
        device: of everything.
        layers: in order.
        mtp: the layer that drafts tokens for `generate`, or None.
    """

    def __init__(self, config: ModelConfig, weights: Weights, *, mtp: bool = False) -> None:
        """Read all weights, with `mtp` those of the first multi-token prediction layer too.

        Raises:
            BlockscaleError: there is none; or the model does not share out over the ranks.
        """
        config.check_ranks(weights.ranks.world)
        self.config, self.dtype, self.device = config, weights.dtype, weights.device
        self._ranks, self._vocabulary = weights.ranks, weights.share(config.vocab_size)
        body = weights.at("model")
        table = rotary_table(config, weights.device)
        self.mtp = MTP(config, body.at(f"layers.{config.num_hidden_layers}"), table) if mtp else None
        self._embedding = body.tensor("embed_tokens.weight", self._vocabulary, config.hidden_size)
        self.layers = [
            Layer(config, body.at(f"layers.{layer}"), table, layer)
            for layer in range(config.num_hidden_layers)
        ]
        self._norm = body.tensor("norm.weight", config.hidden_size)
        tied = config.tie_word_embeddings and not weights.has("lm_head.weight")
        self._head = None if tied else weights.linear("lm_head", self._vocabulary, config.hidden_size)

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device in a call, which no CUDA graph can hold."""
        drafting = self.mtp is not None and self.mtp.waits
        return drafting or any(layer.waits for layer in self.layers)

    def cache(self, rows: int, positions: int, *, fp8: bool = False) -> KVCache:
        """An empty cache for `rows` sequences of up to `positions` tokens each; fp8: of latents in E4M3."""
        layers = self.config.num_hidden_layers + (self.mtp is not None)
        return KVCache(self.config, layers, rows, positions, self.dtype, self.device, fp8=fp8)

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Hidden states (T, hidden) of the new tokens before the last norm, as `logits` takes them."""
        x, residual = self.embed(batch.tokens), None
        for layer in self.layers:
            x, residual = layer(x, residual, batch, cache)
        assert residual is not None
        return x + residual

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> float32 (T, vocab_size)."""
        return self.head(self.normed(hidden))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) -> (T, hidden)."""
        if self._ranks.world == 1:
            return F.embedding(tokens, self._embedding)
        own = tokens - self._vocabulary.start
        here = (own >= 0) & (own < len(self._vocabulary))
        embedded = F.embedding(own * here, self._embedding)
        return self._ranks.all_reduce(embedded.masked_fill_(~here[:, None], 0))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (T, hidden) of a call after the last norm, as `head` and `mtp` take them."""
        y = ops.rms_norm(hidden, self._norm, self.config.rms_norm_eps).y
        assert y is not None
        return y

    def head(self, y: torch.Tensor) -> torch.Tensor:
        """Normalized (T, hidden) -> float32 logits (T, vocab_size)."""
        logits = F.linear(y, self._embedding) if self._head is None else self._head(y)
        return self._ranks.all_gather(logits, self._vocabulary.widths).float()
