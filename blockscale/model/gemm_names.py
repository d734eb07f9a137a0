"""What the products of a model are called in an audit of its GEMMs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from blockscale.model.linear import Linear
from blockscale.model.transformer import Transformer


def gemm_names(model: Transformer) -> dict[torch.Tensor, str]:
    """Weight of every linear layer -> where it is, as `layers.3.attention.o`; for `ops.audit_gemms`."""
    return {linear.weight: path for path, linear in _linears(model, "")}


def _linears(part: object, path: str) -> Iterator[tuple[str, Linear]]:
    """Linear layers that an object of the model holds, with the names of attributes on the way to them."""
    if isinstance(part, Linear):
        yield path, part
    elif isinstance(part, (list, tuple)):
        for number, each in enumerate(part):
            yield from _linears(each, f"{path}.{number}")
    elif type(part).__module__.startswith("blockscale.model."):
        for name, each in vars(part).items():
            yield from _linears(each, f"{path}.{name.lstrip('_')}".lstrip("."))
