"""What a training has seen: a line of JSON for every step and every check, on disk as it goes; its result."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blockscale.checkpoint.journal import read_records
from blockscale.checkpoint.writer import io_errors, write_synced
from blockscale.evaluate.windows import exponential

# What to say where training won more than rounding had cost, which is then no share of anything.
MORE_THAN_ALL = "better than the source; compare with --recipe none, trained as long"


@dataclass(frozen=True)
class Step:
    """An update of the weights.

    Attributes:
        step: its number, from 1.
        loss: before it, nats a token.
        learning_rate: of weights.
        gradient_norm: before it was clipped.
        seconds: since this run began.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float


@dataclass(frozen=True)
class Check:
    """The mean cross entropy of held-out text, nats a token, after a step; 0 is before the first.

    Attributes:
        step: after which.
        nll: the mean.
        standard_error: of it, from windows.
    """

    step: int
    nll: float
    standard_error: float

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return exponential(self.nll)


@dataclass
class History:
    """Steps and checks so far; with a file, all of them are there too.

    Attributes:
        file: where lines are appended, if anywhere.
        steps, checks: in order.
    """

    file: Path | None = None
    steps: list[Step] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path, until: int) -> History:
        """Of an interrupted run, up to a step; later lines, which are to come again, are removed."""
        found = cls()
        for entry in read_records(file):
            if entry["step"] <= until:
                found.add(Step(**entry) if "loss" in entry else Check(**entry))
        kept = "".join([*map(_line, found.checks), *map(_line, found.steps)])
        unfinished = file.with_name(f".{file.name}.part")
        write_synced(unfinished, kept.encode())
        unfinished.replace(file)
        found.file = file
        return found

    def add(self, entry: Step | Check) -> None:
        """Remember it, and write it down."""
        if isinstance(entry, Step):
            self.steps.append(entry)
        else:
            self.checks.append(entry)
        if self.file is not None:
            with io_errors(self.file), self.file.open("a") as stream:
                stream.write(_line(entry))


def _line(entry: Step | Check) -> str:
    return json.dumps(asdict(entry)) + "\n"


@dataclass(frozen=True)
class TrainingResult:
    """A training that is done.

    Attributes:
        training: what was asked.
        out: where the checkpoint is.
        steps, checks: see `History`.
        reference: the model on the text of the checks, before its layers were replaced; None without checks.
        seconds: that the last run took.
    """

    training: dict[str, Any]
    out: str
    steps: tuple[Step, ...]
    checks: tuple[Check, ...]
    reference: Check | None
    seconds: float

    @property
    def recovered(self) -> float:
        """Share of the gap of perplexity between the source and plain rounding that is closed.

        NaN without a recipe, checks or a gap; more than 1 where the model got better than the source.
        """
        if self.training["recipe"] is None or self.reference is None or not self.checks:
            return math.nan
        before, after = self.checks[0].perplexity, self.checks[-1].perplexity
        return recovered(self.reference.perplexity, before, after)


def recovered(reference: float, plain: float, trained: float) -> float:
    """Share of the gap of perplexity between a reference and plain rounding that training closed, or NaN."""
    gap = plain - reference
    return (plain - trained) / gap if gap > 0 else math.nan
