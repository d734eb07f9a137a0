"""DeepSeek-V3 of transformers with its multi-token prediction layer, which transformers leaves out.

The module tree is then that of the checkpoint and of `blockscale.model`, to the name: the layer is
`model.layers.N`, N = num_hidden_layers, a decoder layer and what `blockscale.model.mtp` says of it. Embedding
and head are the model's; the copies of them in a checkpoint are not read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm
from transformers.utils import ModelOutput

from blockscale.checkpoint.families import mtp_prefixes
from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.model_config import read_config
from blockscale.checkpoint.source import Source
from blockscale.errors import BlockscaleError

_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


@dataclass
class Predicted(ModelOutput):
    """What a model with such a layer predicts of (B, T) tokens.

    Attributes:
        logits: (B, T, V), of the token after each.
        drafts: (B, T - 1, V), of the token after the next of each.
    """

    logits: torch.Tensor | None = None
    drafts: torch.Tensor | None = None


class MTPLayer(DeepseekV3DecoderLayer):
    """See `blockscale.model.mtp`, which has the equations and their sources."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = DeepseekV3RMSNorm(size, eps=eps)
        self.hnorm = DeepseekV3RMSNorm(size, eps=eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(size, eps=eps)})

    def forward(self, hidden_states: torch.Tensor, embedded: torch.Tensor, **options: Any) -> torch.Tensor:
        """What the head makes drafts of, (B, T, hidden).

        Args:
            hidden_states: (B, T, hidden), of the model, after its last norm.
            embedded: (B, T, hidden), embeddings of the tokens that follow.
            options: of every decoder layer.
        """
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden_states)], -1))
        drafted: torch.Tensor = self.shared_head["norm"](super().forward(x, **options))
        return drafted


class DeepseekV3ForCausalLM(transformers.DeepseekV3ForCausalLM):
    """The model of transformers, under its name, with the layer as the last of `model.layers`.

    It does what it does without, unless it is asked for drafts.
    """

    _no_split_modules = (*transformers.DeepseekV3ForCausalLM._no_split_modules, MTPLayer.__name__)
    _keys_to_ignore_on_load_unexpected = tuple(
        rf"model\.layers\.\d+\.{name}".replace(".weight", r"\.weight") for name in _COPIES
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers.append(MTPLayer(config, config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids: torch.Tensor | None = None, *, drafts: bool = False, **options: Any) -> Any:
        """As in transformers; with `drafts`, `Predicted` of int64 (B, T) `input_ids`, T > 2."""
        if not drafts:
            return super().forward(input_ids=input_ids, **options)
        assert input_ids is not None
        hidden = self.model(input_ids=input_ids, **options).last_hidden_state
        return Predicted(logits=self.lm_head(hidden), drafts=self.lm_head(self._drafted(input_ids, hidden)))

    def _drafted(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens and (B, T, hidden) -> (B, T - 1, hidden); position i has token i + 1."""
        known, embedded = hidden[:, :-1], self.model.embed_tokens(input_ids[:, 1:])
        positions = torch.arange(known.shape[1], device=known.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=known,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        drafted: torch.Tensor = self.model.layers[-1](
            known,
            embedded,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self.model.rotary_emb(known, positions),
        )
        return drafted

    def copies(self, state: Mapping[str, torch.Tensor], rounded: Collection[str]) -> dict[str, torch.Tensor]:
        """The copies of embedding and head that a checkpoint has in the layer.

        Args:
            state: the model's tensors, tied ones once.
            rounded: those that are stored as codes, of which there is to be no copy.
        """
        prefix, tied = f"model.layers.{self.config.num_hidden_layers}.", state["model.embed_tokens.weight"]
        own = {name: state.get(of, tied) for name, of in _COPIES.items() if of not in rounded}
        return {prefix + name: each.clone() for name, each in own.items()}


def has_mtp(source: Source) -> bool:
    """Whether a checkpoint has the layer, and transformers the rest of it.

    Raises:
        BlockscaleError: it has several.
    """
    config = read_config(source)
    prefixes = mtp_prefixes(config) if config.get("model_type") == "deepseek_v3" else ()
    found = bool(prefixes) and f"{prefixes[0]}eh_proj.weight" in read_index(source).tensors
    if found and len(prefixes) > 1:
        raise BlockscaleError(
            "has several multi-token prediction layers", where=source.spec, expected="one", got=len(prefixes)
        )
    return found
