"""Quantization-aware training: a model trains through the rounding with which its checkpoint will be stored.

    from blockscale.qat import export, prepare

    prepare(model, recipe)              # a transformers causal LM, in place
    ...                                 # any training loop
    export(model, "trained-fp8")        # a checkpoint as `blockscale quantize` writes it

or all of it, `train(Training("my-model", Path("text"), recipe), Path("trained"))`: `blockscale train`.

Rooms of the rounding: `fake_quant` (with its gradients), `modules` (layers that take the place of those of
transformers), `preparation`, `initial` (codes and scales to begin with), `exporting`. Rooms of the trainer:
`request` (what a user asks), `workplace`, `loading`, `reading` (text), `losses`, `gradients` (of a step,
replayed on a GPU), `optimizer`, `arithmetic`, `sharding`, `checking` (perplexity), `history`, `saved`, and
`training`, which puts them together.

The names are loaded on first use: transformers is an optional dependency.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockscale.errors import BlockscaleError

if TYPE_CHECKING:
    from blockscale.qat.exporting import export
    from blockscale.qat.history import Check, Step, TrainingResult, recovered
    from blockscale.qat.modules import QatOptions, fake_quantized_weights
    from blockscale.qat.preparation import prepare
    from blockscale.qat.request import RunLimits, Training
    from blockscale.qat.training import train

_MODULES = {
    "Check": "history",
    "QatOptions": "modules",
    "RunLimits": "request",
    "Step": "history",
    "TrainingResult": "history",
    "Training": "request",
    "export": "exporting",
    "fake_quantized_weights": "modules",
    "prepare": "preparation",
    "recovered": "history",
    "train": "training",
}

__all__ = [
    "Check",
    "QatOptions",
    "RunLimits",
    "Step",
    "Training",
    "TrainingResult",
    "export",
    "fake_quantized_weights",
    "prepare",
    "recovered",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'blockscale.qat' has no attribute {name!r}")
    try:
        return getattr(import_module(f"blockscale.qat.{_MODULES[name]}"), name)
    except ImportError as error:
        raise BlockscaleError(
            "cannot train models of transformers",
            where="blockscale.qat",
            expected="transformers 5",
            got=error,
            remedy="pip install 'blockscale[eval]'",
        ) from error
