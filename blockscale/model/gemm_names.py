"""What the products of a model are called in an audit of its GEMMs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from blockscale.model.linear import Linear, W4Experts
from blockscale.model.transformer import Transformer


def gemm_names(model: Transformer) -> dict[torch.Tensor, str]:
    """Weight of every linear layer -> where it is, as `layers.3.attention.o`; for `ops.audit_gemms`.

    Of 4-bit experts their words, by which an audit knows them.
    """
    return {weight: path for path, weight in _weights(model, "")}


def _weights(part: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights that an object of the model holds, with the names of attributes on the way to their layers."""
    if isinstance(part, Linear):
        yield path, part.weight
    elif isinstance(part, W4Experts):
        yield path, part.weight.words
    elif isinstance(part, (list, tuple)):
        for number, each in enumerate(part):
            yield from _weights(each, f"{path}.{number}")
    elif type(part).__module__.startswith("blockscale.model."):
        for name, each in vars(part).items():
            yield from _weights(each, f"{path}.{name.lstrip('_')}".lstrip("."))
