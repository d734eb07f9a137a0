"""What a training has seen: a line of JSON for every step and every check, on disk as it goes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from blockscale.checkpoint.journal import read_records
from blockscale.checkpoint.writer import io_errors, write_synced
from blockscale.evaluate.windows import exponential


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


def recovered(reference: float, plain: float, trained: float) -> float:
    """Share of the gap of perplexity between a reference and plain rounding that training closed, or NaN."""
    gap = plain - reference
    return (plain - trained) / gap if gap > 0 else math.nan
