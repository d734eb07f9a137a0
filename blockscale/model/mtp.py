"""The multi-token prediction layer: from what the model knows after token i, and token i + 1, to token i + 2.

    x_i = eh_proj [enorm(embedding of t_{i+1}) ; hnorm(h_i)]
    y_i = shared_head.norm(layer(x_i)),   logits of t_{i+2} = head(y_i)

h_i is the model's hidden state after its last norm, and the embedding comes first. Equation 21 of the report
has the two the other way round and leaves the norm open; vLLM, SGLang and a published modeling file of
DeepSeek-R1 with this layer agree on the form above (see the sources). The layer is an ordinary decoder layer
with a part of the cache of its own, in which x_i has position i.

Embedding and head are the model's. A checkpoint stores copies of them, which are not read: they are the same
parameters (`README_WEIGHTS.md` of DeepSeek-V3), and what a draft is made of changes no result.

Sources: DeepSeek-V3, arXiv:2412.19437, section 2.2; `deepseek_mtp.py` and `deepseek_v2.py` of vLLM,
`deepseek_nextn.py` of SGLang; ROCm/ATOM#1764 on `modeling_deepseek.py`.
"""

from __future__ import annotations

import torch

from blockscale import ops
from blockscale.errors import BlockscaleError
from blockscale.model.architecture import ModelConfig
from blockscale.model.attention import Batch, KVCache
from blockscale.model.layer import Layer
from blockscale.model.weights import Weights
from blockscale.reference.attention import RotaryTable


class MTP:
    """The first such layer of a checkpoint, which follows the decoder layers."""

    def __init__(self, config: ModelConfig, weights: Weights, table: RotaryTable) -> None:
        """Read it.

        Raises:
            BlockscaleError: the checkpoint has none.
        """
        if not weights.has("eh_proj.weight"):
            raise BlockscaleError(
                "checkpoint has no multi-token prediction layer",
                expected=f"{weights.prefix}eh_proj.weight",
                remedy="leave out --mtp",
            )
        hidden = config.hidden_size
        self._eps = config.rms_norm_eps
        self._embedding_norm = weights.tensor("enorm.weight", hidden)
        self._hidden_norm = weights.tensor("hnorm.weight", hidden)
        self._into = weights.linear("eh_proj", hidden, 2 * hidden)
        self._layer = Layer(config, weights, table, config.num_hidden_layers)
        self._last_norm = weights.tensor("shared_head.norm.weight", hidden)

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device in a call."""
        return self._layer.waits

    @torch.inference_mode()
    def __call__(
        self, embedded: torch.Tensor, hidden: torch.Tensor, batch: Batch, cache: KVCache
    ) -> torch.Tensor:
        """What the head makes drafts of, (T, hidden).

        Args:
            embedded: (T, hidden), embeddings of the tokens that follow those of `batch`.
            hidden: (T, hidden), the model's hidden states of `batch`, normalized.
            batch: the tokens that `hidden` was computed from.
            cache: of the model, in which the layer has its own part.
        """
        both = self._normed(embedded, self._embedding_norm), self._normed(hidden, self._hidden_norm)
        x, residual = self._layer(self._into(torch.cat(both, -1)), None, batch, cache)
        return self._normed(x + residual, self._last_norm)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = ops.rms_norm(x, weight, self._eps).y
        assert y is not None
        return y
