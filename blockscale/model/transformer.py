"""DeepSeek-V2, V3 and V3.1 for inference, built straight from a checkpoint's tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from blockscale.model.architecture import ModelConfig
from blockscale.model.attention import MLA, Batch, KVCache
from blockscale.model.moe import MLP, MoE
from blockscale.model.rotary import Rotary
from blockscale.model.weights import Weights
from blockscale.reference.fused import rms_norm


class Layer:
    """Attention and feed-forward, each on the normalized stream and added to it."""

    def __init__(self, config: ModelConfig, weights: Weights, rotary: Rotary, layer: int) -> None:
        self._eps = config.rms_norm_eps
        self._attention_norm = weights.tensor("input_layernorm.weight", config.hidden_size)
        self._attention = MLA(config, weights.at("self_attn"), rotary, layer)
        self._mlp_norm = weights.tensor("post_attention_layernorm.weight", config.hidden_size)
        mlp, hidden, width = weights.at("mlp"), config.hidden_size, config.intermediate_size
        self._mlp: MLP | MoE = MoE(config, mlp) if config.is_moe(layer) else MLP(mlp, hidden, width)

    def __call__(self, x: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        x = x + self._attention(rms_norm(x, self._attention_norm, self._eps), batch, cache)
        return x + self._mlp(rms_norm(x, self._mlp_norm, self._eps))


class Transformer:
    """Token ids to logits.

    Attributes:
        config: the architecture.
        dtype: of activations.
        device: of everything.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        """Read all weights."""
        self.config, self.dtype, self.device = config, weights.dtype, weights.device
        body = weights.at("model")
        rotary = Rotary(config, weights.device)
        self._embedding = body.tensor("embed_tokens.weight", config.vocab_size, config.hidden_size)
        self._layers = [
            Layer(config, body.at(f"layers.{layer}"), rotary, layer)
            for layer in range(config.num_hidden_layers)
        ]
        self._norm = body.tensor("norm.weight", config.hidden_size)
        tied = config.tie_word_embeddings and not weights.has("lm_head.weight")
        self._head = None if tied else weights.linear("lm_head", config.vocab_size, config.hidden_size)

    def cache(self, rows: int, positions: int) -> KVCache:
        """An empty cache for `rows` sequences of up to `positions` tokens each."""
        return KVCache(self.config, rows, positions, self.dtype, self.device)

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Hidden states (T, hidden) of the new tokens, normalized, as `logits` takes them."""
        x = F.embedding(batch.tokens, self._embedding)
        for layer in self._layers:
            x = layer(x, batch, cache)
        return rms_norm(x, self._norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> float32 (T, vocab_size)."""
        if self._head is None:
            return F.linear(hidden, self._embedding).float()
        return self._head(hidden).float()
