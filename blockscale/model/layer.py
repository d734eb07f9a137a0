"""One decoder layer of DeepSeek-V2 or V3: attention, then a dense feed-forward or experts."""

from __future__ import annotations

import torch

from blockscale import ops
from blockscale.model.architecture import ModelConfig
from blockscale.model.attention import MLA, Batch, KVCache
from blockscale.model.moe import MLP, MoE
from blockscale.model.weights import Weights
from blockscale.reference.attention import RotaryTable


class Layer:
    """Attention and feed-forward, each on the normalized stream and added to it.

    Ranks have the same stream; of what is added to it each computes a summand.
    """

    def __init__(self, config: ModelConfig, weights: Weights, table: RotaryTable, layer: int) -> None:
        self._eps, self._ranks = config.rms_norm_eps, weights.ranks
        self._attention_norm = weights.tensor("input_layernorm.weight", config.hidden_size)
        self._attention = MLA(config, weights.at("self_attn"), table, layer)
        self._mlp_norm = weights.tensor("post_attention_layernorm.weight", config.hidden_size)
        mlp, width = weights.at("mlp"), weights.share_width(config.intermediate_size)
        moe = config.is_moe(layer)
        self.mlp = MoE(config, mlp) if moe else MLP(*mlp.gate_up_down(config.hidden_size, width))

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device in a call."""
        return isinstance(self.mlp, MoE) and self.mlp.waits

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, batch: Batch, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is to be added to the stream, and the stream, (T, hidden), to the same after this layer."""
        fmt = self._attention.quantizes
        normed = ops.rms_norm(x, self._attention_norm, self._eps, residual, fmt, plain=fmt is None)
        x = self._ranks.all_reduce(self._attention(normed, batch, cache))
        fmt, plain = self.mlp.reads
        normed = ops.rms_norm(x, self._mlp_norm, self._eps, normed.hidden, fmt, plain=plain)
        return self._ranks.all_reduce(self.mlp(normed)), normed.hidden
