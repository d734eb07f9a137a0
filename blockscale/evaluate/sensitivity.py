"""What each linear layer's quantization alone does to a model's predictions.

One module of the reference at a time is replaced by its quantized form, all others stay exact, and the KL
divergence of the next token's distribution from the reference's is averaged over tokens. Decoder layers
before the replaced module compute what they did without it, so that they are not run again: their output is
kept, and half of the work is saved on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from blockscale.calibrate.layerwise import decoder_layers
from blockscale.errors import BlockscaleError
from blockscale.metrics import kl_divergence, sqnr_db

_ROWS = 512  # tokens whose logits are widened at a time


@dataclass(frozen=True)
class Sensitivity:
    """One quantized module in an otherwise exact model.

    Attributes:
        name: full name of the module.
        kl: mean KL divergence from the exact model, nats a token.
        output_sqnr_db: of the module's output on exact inputs, decibels.
    """

    name: str
    kl: float
    output_sqnr_db: float


@torch.inference_mode()
def sensitivities(
    reference: torch.nn.Module,
    quantized: Mapping[str, torch.nn.Module],
    ids: torch.Tensor,
    on_module: Callable[[Sensitivity], None] = lambda _: None,
) -> list[Sensitivity]:
    """Sensitivity of every quantized module, in their order.

    Args:
        reference: a causal language model of transformers; it is left as it was.
        quantized: full name of a module -> what it is replaced by.
        ids: int64 (B, T), what the model reads.
        on_module: is told every result as it comes.

    Raises:
        BlockscaleError: a name that the reference does not have, or no decoder layers in it.
    """
    known = dict(reference.named_modules())
    for name in quantized:
        if name not in known:
            remedy = "compare with the checkpoint that the model was made from"
            raise BlockscaleError("module is not in the reference", where=name, remedy=remedy)
    listed, prefix = decoder_layers(reference)
    layers = {f"{prefix}.{number}": layer for number, layer in enumerate(listed)}
    outputs: list[Any] = []
    hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[2])) for layer in layers.values()]
    try:
        exact = reference(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    results = []
    for name, module in quantized.items():
        # What is in no layer comes behind all of them, as the head does.
        first = next((i for i, path in enumerate(layers) if name.startswith(f"{path}.")), len(layers))
        with _given(list(layers.values())[:first], outputs), _replaced(reference, name, module) as watch:
            logits = reference(input_ids=ids, use_cache=False).logits
        result = Sensitivity(name, _mean_kl(exact, logits), watch.sqnr_db)
        on_module(result)
        results.append(result)
    return results


@contextmanager
def _given(layers: list[torch.nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Have layers return what they returned before."""
    for layer, output in zip(layers, outputs, strict=False):
        layer.forward = lambda *_, _output=output, **__: _output
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the one of its class is behind it


class _Watch(torch.nn.Module):
    """Calls a module in place of another, and compares what both make of the same input."""

    def __init__(self, original: torch.nn.Module, module: torch.nn.Module) -> None:
        super().__init__()
        self.original, self.module = original, module
        self.sqnr_db = math.inf

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The output of the module."""
        output = self.module(*arguments, **options)
        self.sqnr_db = sqnr_db(output, self.original(*arguments, **options))
        return output


@contextmanager
def _replaced(model: torch.nn.Module, name: str, module: torch.nn.Module) -> Iterator[_Watch]:
    """Have `module` in the model under this name."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    original = model.get_submodule(name)
    watch = _Watch(original, module)
    setattr(parent, leaf, watch)
    try:
        yield watch
    finally:
        setattr(parent, leaf, original)


def _mean_kl(exact: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL divergence over all tokens of (B, T, V) logits."""
    pieces = zip(exact.flatten(0, 1).split(_ROWS), logits.flatten(0, 1).split(_ROWS), strict=True)
    total = sum(kl_divergence(one, other).double().sum().item() for one, other in pieces)
    return total / (exact.shape[0] * exact.shape[1])
