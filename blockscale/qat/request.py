"""What a user asks of a training: what decides its result, and how it runs here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import BlockscaleError
from blockscale.qat.modules import QatOptions


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and how; all of it decides the result.

    Attributes:
        model: checkpoint that is not quantized.
        data: text file, .xz and .bz2 too.
        recipe: what is quantized in training; None trains the model as it is, to compare with.
        qat: how weights are rounded in training.
        distill: checkpoint whose predictions are the aim; None for the next token of the text.
        initial: quantized checkpoint whose codes and scales are the beginning.
        steps: updates of the weights.
        batch: sequences of a step, on all processes together.
        context: tokens of a sequence.
        lr, scale_lr: peak rates of weights and of learned scales.
        warmup: share of the steps in which rates rise.
        weight_decay: of matrices.
        clip: largest norm of the gradient.
        train_router: routers of experts train too; the biases that balance them never do.
        freeze: patterns of further parameters that do not.
        check_data: text for perplexity; None for no checks.
        check_windows: of it, spread evenly.
    """

    model: str
    data: Path
    recipe: Recipe | None
    qat: QatOptions = field(default_factory=QatOptions)
    distill: str | None = None
    initial: str | None = None
    steps: int = 1000
    batch: int = 16
    context: int = 1024
    lr: float = 2e-5
    scale_lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    train_router: bool = False
    freeze: tuple[str, ...] = ()
    check_data: str | None = None
    check_windows: int = 64

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("context", 2), ("check_windows", 1)):
            value = getattr(self, name)
            if value < least:
                raise BlockscaleError("too small", where=name, expected=f"at least {least}", got=value)
        for name, most in (("lr", math.inf), ("scale_lr", math.inf), ("clip", math.inf), ("warmup", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= most or not math.isfinite(value):
                raise BlockscaleError("out of range", where=name, expected=f"0 to {most:g}", got=value)

    def spelled(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            **vars(self),
            "data": str(self.data),
            "recipe": self.recipe and self.recipe.spelled(),
            "qat": {name: str(value) for name, value in vars(self.qat).items()},
            "freeze": list(self.freeze),
        }


@dataclass(frozen=True)
class RunLimits:
    """How a training runs on this machine; up to the order of sums nothing here changes the result.

    Attributes:
        micro_batch: sequences at a time on a device; None for all of a step.
        checkpointing: activations of layers are computed again instead of kept.
        save_every, check_every: steps.
        resume: go on with an interrupted run.
        overwrite: throw one away, and replace what is at the destination.
        masters: folder for the trained weights in float32, for `verify --against`.
    """

    micro_batch: int | None = None
    checkpointing: bool = False
    save_every: int = 200
    check_every: int = 100
    resume: bool = False
    overwrite: bool = False
    masters: Path | None = None
