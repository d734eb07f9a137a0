"""The models of a training: the one that trains, and the one it learns from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from blockscale.checkpoint.model_config import read_config
from blockscale.checkpoint.names import check_patterns, matches, role_of
from blockscale.checkpoint.source import Source, open_source
from blockscale.errors import BlockscaleError
from blockscale.evaluate.loading import is_quantized
from blockscale.huggingface.load import load_as_stored
from blockscale.huggingface.mtp import DeepseekV3ForCausalLM, has_mtp
from blockscale.huggingface.partial import no_bars
from blockscale.model.ranks import Ranks
from blockscale.qat.request import Training
from blockscale.qat.sharding import shard

_SHORTEST_DRAFTED = 3  # tokens: two that are known, and one to predict


def load(source: Source, dtype: torch.dtype, ranks: Ranks) -> Any:
    """A model of transformers on this process's device, with its multi-token prediction layer.

    Raises:
        BlockscaleError: it is quantized, transformers does not read it, or it has several such layers.
    """
    if is_quantized(source):
        raise BlockscaleError(
            "is quantized already",
            where=source.spec,
            expected="unquantized weights",
            remedy="run blockscale dequantize, and name this one with --initial",
        )
    auto_class = DeepseekV3ForCausalLM if has_mtp(source) else AutoModelForCausalLM
    with no_bars():
        return load_as_stored(source, dtype, auto_class=auto_class).to(ranks.device)


def load_teacher(training: Training, ranks: Ranks) -> nn.Module:
    """The model to distill from, sharded as the other is.

    Raises:
        BlockscaleError: it is quantized, or has other tokens.
    """
    assert training.distill is not None
    source = open_source(training.distill)
    wide = training.qat.compute == torch.float32
    dtype = torch.float32 if wide else torch.bfloat16
    teacher = load(source, dtype, ranks).requires_grad_(False)
    vocabulary, own = (read_config(each).get("vocab_size") for each in (source, open_source(training.model)))
    if vocabulary != own:
        raise BlockscaleError("has another vocabulary", where=training.distill, expected=own, got=vocabulary)
    shard(teacher, ranks)
    checked: nn.Module = teacher.eval()
    return checked


def check_context(model: Any, training: Training) -> None:
    """Refuse sequences that are longer than the model was made for, or too short to draft for.

    Raises:
        BlockscaleError: as said.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and training.context > most:
        raise BlockscaleError(
            "longer than the model's context",
            where="context",
            expected=f"at most {most}",
            got=training.context,
        )
    if isinstance(model, DeepseekV3ForCausalLM) and training.context < _SHORTEST_DRAFTED:
        raise BlockscaleError(
            "too short for a multi-token prediction layer",
            where="context",
            expected=f"at least {_SHORTEST_DRAFTED}",
            got=training.context,
        )


def freeze(model: nn.Module, training: Training) -> None:
    """Parameters that do not train: routers unless they are to, and what the user names.

    Raises:
        BlockscaleError: a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    check_patterns(training.freeze, names)
    for name, each in model.named_parameters():
        router = role_of(name) == "router" and not training.train_router
        if router or any(matches(name, pattern) for pattern in training.freeze):
            each.requires_grad_(False)
