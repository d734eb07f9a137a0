"""What each linear layer's quantization alone does to a model's predictions.

One module of the reference at a time is replaced by its quantized form, all others stay exact, and the KL
divergence of the next token's distribution from the reference's is averaged over tokens. Decoder layers
before the replaced module compute what they did without it, so that they are not run again: their output is
kept, and half of the work is saved on average. The last token of a sequence has no successor there, and does
not count: figures are those of `compare` on the same windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from blockscale.calibrate.stations import decoder_layers
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


@dataclass(frozen=True)
class Change:
    """What other modules do to a model's predictions, in sums over the counted tokens of each sequence.

    Attributes:
        kl: KL divergence from the exact model, nats.
        agreed: tokens with the same likeliest next one.
        tokens: how many count.
    """

    kl: tuple[float, ...]
    agreed: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return math.fsum(self.kl) / sum(self.tokens)


class Exact:
    """A model on some tokens: its logits, and what every decoder layer returned."""

    @torch.inference_mode()
    def __init__(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        """Run the model once.

        Args:
            model: a causal language model of transformers; it is left as it was.
            ids: int64 (B, T), T at least 2.

        Raises:
            BlockscaleError: no decoder layers in it, or sequences without a next token.
        """
        if ids.ndim != 2 or ids.shape[1] < 2:
            got = f"shape {tuple(ids.shape)}"
            raise BlockscaleError("not enough text", where="ids", expected="(B, T), T >= 2", got=got)
        self.model = model
        self._ids = ids.to(next(model.parameters()).device)
        listed, prefix = decoder_layers(model)
        self._layers = {f"{prefix}.{number}": layer for number, layer in enumerate(listed)}
        self._outputs: list[Any] = []
        hooks = [layer.register_forward_hook(lambda *call: self._outputs.append(call[2])) for layer in listed]
        try:
            self._logits = self._run()
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def changed_by(self, modules: Mapping[str, torch.nn.Module]) -> Change:
        """What the model predicts with these modules, by their full names, in the place of its own.

        Raises:
            BlockscaleError: a name that the model does not have.
        """
        known = dict(self.model.named_modules())
        for name in modules:
            if name not in known:
                remedy = "compare with the checkpoint that the model was made from"
                raise BlockscaleError("module is not in the reference", where=name, remedy=remedy)
        first = min(map(self._layer_of, modules), default=len(self._layers))
        with _given(list(self._layers.values())[:first], self._outputs), _replaced(self.model, modules):
            logits = self._run()
        return _change(self._logits, logits)

    def _layer_of(self, name: str) -> int:
        """What is in no layer comes behind all of them, as the head does."""
        found = (i for i, path in enumerate(self._layers) if name.startswith(f"{path}."))
        return next(found, len(self._layers))

    def _run(self) -> torch.Tensor:
        """(B, T - 1, V), of the tokens that have a successor."""
        logits: torch.Tensor = self.model(input_ids=self._ids, use_cache=False).logits
        return logits[:, :-1]


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
        BlockscaleError: a name that the reference does not have, no decoder layers in it, or no text.
    """
    exact = Exact(reference, ids)
    results = []
    for name, module in quantized.items():
        change, noise = changed_with_noise(exact, {name: module})
        result = Sensitivity(name, change.mean_kl, noise[name])
        on_module(result)
        results.append(result)
    return results


def changed_with_noise(
    exact: Exact, modules: Mapping[str, torch.nn.Module]
) -> tuple[Change, dict[str, float]]:
    """`Exact.changed_by`, and each module's output SQNR in decibels on the inputs it then has.

    A module's inputs are exact if no other one of `modules` comes before it.

    Raises:
        BlockscaleError: a name that the model does not have.
    """
    known = dict(exact.model.named_modules())
    watches = {name: _Watch(known.get(name, module), module) for name, module in modules.items()}
    change = exact.changed_by(watches)
    return change, {name: watch.sqnr_db for name, watch in watches.items()}


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
def _replaced(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Have modules in the model under these names."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            _put(model, name, module)
        yield
    finally:
        for name, module in originals.items():
            _put(model, name, module)


def _put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)


def _change(exact: torch.Tensor, logits: torch.Tensor) -> Change:
    """Of (B, T, V) logits."""
    kl, agreed = [], []
    for one, other in zip(exact, logits, strict=True):
        pieces = list(zip(one.split(_ROWS), other.split(_ROWS), strict=True))
        kl.append(math.fsum(kl_divergence(*piece).double().sum().item() for piece in pieces))
        agreed.append(sum(int((own.argmax(-1) == new.argmax(-1)).sum()) for own, new in pieces))
    return Change(tuple(kl), tuple(agreed), (exact.shape[1],) * len(kl))
