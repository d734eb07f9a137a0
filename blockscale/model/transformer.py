"""DeepSeek-V2, V3 and V3.1 for inference, built straight from a checkpoint's tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from blockscale import ops
from blockscale.model.architecture import ModelConfig
from blockscale.model.attention import MLA, Batch, KVCache
from blockscale.model.moe import MLP, MoE
from blockscale.model.rotary import rotary_table
from blockscale.model.weights import Weights
from blockscale.reference.attention import RotaryTable


class Layer:
    """Attention and feed-forward, each on the normalized stream and added to it."""

    def __init__(self, config: ModelConfig, weights: Weights, table: RotaryTable, layer: int) -> None:
        self._eps = config.rms_norm_eps
        self._attention_norm = weights.tensor("input_layernorm.weight", config.hidden_size)
        self._attention = MLA(config, weights.at("self_attn"), table, layer)
        self._mlp_norm = weights.tensor("post_attention_layernorm.weight", config.hidden_size)
        mlp, hidden, width = weights.at("mlp"), config.hidden_size, config.intermediate_size
        self.mlp = MoE(config, mlp) if config.is_moe(layer) else MLP(*mlp.gate_up_down(hidden, width))

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, batch: Batch, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is to be added to the stream, and the stream, (T, hidden), to the same after this layer."""
        fmt = self._attention.quantizes
        normed = ops.rms_norm(x, self._attention_norm, self._eps, residual, fmt, plain=fmt is None)
        x = self._attention(normed, batch, cache)
        fmt, plain = self.mlp.reads
        normed = ops.rms_norm(x, self._mlp_norm, self._eps, normed.hidden, fmt, plain=plain)
        return self.mlp(normed), normed.hidden


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
        table = rotary_table(config, weights.device)
        self._embedding = body.tensor("embed_tokens.weight", config.vocab_size, config.hidden_size)
        self._layers = [
            Layer(config, body.at(f"layers.{layer}"), table, layer)
            for layer in range(config.num_hidden_layers)
        ]
        self._norm = body.tensor("norm.weight", config.hidden_size)
        tied = config.tie_word_embeddings and not weights.has("lm_head.weight")
        self._head = None if tied else weights.linear("lm_head", config.vocab_size, config.hidden_size)

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device in a call, which no CUDA graph can hold."""
        return any(isinstance(layer.mlp, MoE) and layer.mlp.waits for layer in self._layers)

    def cache(self, rows: int, positions: int) -> KVCache:
        """An empty cache for `rows` sequences of up to `positions` tokens each."""
        return KVCache(self.config, rows, positions, self.dtype, self.device)

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Hidden states (T, hidden) of the new tokens before the last norm, as `logits` takes them."""
        x, residual = F.embedding(batch.tokens, self._embedding), None
        for layer in self._layers:
            x, residual = layer(x, residual, batch, cache)
        assert residual is not None
        return x + residual

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> float32 (T, vocab_size)."""
        y = ops.rms_norm(hidden, self._norm, self.config.rms_norm_eps).y
        assert y is not None
        return (F.linear(y, self._embedding) if self._head is None else self._head(y)).float()
