"""Measure the candidates of every case on this GPU, and write what beats the heuristics to a tuning table.

A candidate is checked before it is timed (`tuning_problem`). All are timed once, then the fastest few and the
heuristics' own choice in turns, several rounds. An entry is made only where the median of the fastest beats
that of the heuristics by more than 2 %.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from blockscale.errors import BlockscaleError
from blockscale.ops.timing import interleave
from blockscale.ops.tuning import Case, candidates
from blockscale.ops.tuning_problem import Timer, compile_tiles, make_problem
from blockscale.ops.tuning_table import (
    SHIPPED,
    Choice,
    Entry,
    Key,
    Table,
    file_name,
    read_table,
    write_table,
)
from blockscale.version import __version__

_WORTH_IT = 1.02
_FINALISTS, _ROUNDS = 3, 5


@dataclass(frozen=True)
class Outcome:
    """The fastest choice of a case beside the heuristics', and how many candidates there were."""

    case: Case
    best: Choice
    microseconds: float
    heuristic: Choice
    heuristic_microseconds: float
    candidates: int

    @property
    def gain(self) -> float:
        """How many times faster the best is than what the heuristics choose."""
        return self.heuristic_microseconds / self.microseconds

    @property
    def worth_it(self) -> bool:
        """Whether that is more than repeated timings of one kernel differ by."""
        return self.gain > _WORTH_IT


def find_gpu() -> tuple[torch.device, str]:
    """The current GPU and its name.

    Raises:
        BlockscaleError: there is none.
    """
    if not torch.cuda.is_available():
        raise BlockscaleError(
            "no CUDA GPU here", where="blockscale tune", remedy="run it where the model runs"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.get_device_name(device)


def tune(
    cases: Sequence[Case], device: torch.device, path: Path, show: Callable[[Outcome], None]
) -> tuple[Outcome, ...]:
    """Measure cases and bring the table at `path` up to date after each.

    Args:
        cases: what to measure.
        device: the GPU, as `find_gpu` gives it.
        path: the table; entries of other cases stay.
        show: is told every outcome.

    Raises:
        BlockscaleError: a damaged table, a GPU with nothing to choose from, or too little memory on it.
    """
    gpu = torch.cuda.get_device_name(device)
    table, shipped = read_table(path, gpu), read_table(SHIPPED / file_name(gpu), gpu)
    choices = {}
    for case in cases:
        known = [shipped[case.key].choice] if case.key in shipped else []
        choices[case] = tuple(dict.fromkeys((*candidates(case, device), *known)))
    if all(len(each) < 2 for each in choices.values()):
        raise BlockscaleError(
            "nothing to choose from on this GPU", where=gpu, got=next(iter(choices.values()))
        )
    compile_tiles((case, choice) for case in cases for choice in choices[case])
    outcomes: list[Outcome] = []
    for case in cases:
        try:
            outcomes.append(best_of(case, choices[case], make_problem(case, device).timer))
        except torch.OutOfMemoryError as error:
            remedy = "leave out the largest --rows or --shape; what was measured is kept"
            raise BlockscaleError("not enough memory on the GPU", where=case, remedy=remedy) from error
        table = updated(table, outcomes[-1:], shipped, versions())
        write_table(path, gpu, table)
        show(outcomes[-1])
    return tuple(outcomes)


def best_of(case: Case, choices: Sequence[Choice], prepare: Callable[[Choice], Timer | None]) -> Outcome:
    """Measure the choices of a case, the heuristics' first.

    Args:
        case: what to measure.
        choices: as `candidates` gives them.
        prepare: checks the result of a choice and gives its timer, or None if it cannot run this case.

    Raises:
        BlockscaleError: what the heuristics choose cannot run.
    """
    prepared = {choice: prepare(choice) for choice in choices}
    timers = {choice: timer for choice, timer in prepared.items() if timer is not None}
    heuristic = choices[0]
    if heuristic not in timers:
        raise BlockscaleError("the heuristics' own choice does not work", where=case, got=heuristic)
    screened = {choice: timer() for choice, timer in timers.items()}
    finalists = sorted(screened, key=screened.__getitem__)[:_FINALISTS]
    final = {choice: timers[choice] for choice in dict.fromkeys((heuristic, *finalists))}
    medians = {choice: statistics.median(each) for choice, each in interleave(final, _ROUNDS).items()}
    best = min(medians, key=medians.__getitem__)
    return Outcome(case, best, medians[best], heuristic, medians[heuristic], len(timers))


def updated(table: Table, outcomes: Iterable[Outcome], shipped: Mapping[Key, Entry], versions: str) -> Table:
    """A table with what was measured: new entries where they are worth it, none left where they are not.

    Where the shipped table has an entry that did not prove worth it here, the user's says what the heuristics
    do, or the shipped entry would go on to be used.
    """
    found, today = dict(table), datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    for outcome in outcomes:
        key, best, us = outcome.case.key, outcome.best, outcome.microseconds
        if not outcome.worth_it:
            best, us = outcome.heuristic, outcome.heuristic_microseconds
        found.pop(key, None)
        if outcome.worth_it or key in shipped:
            found[key] = Entry(best, us, outcome.heuristic_microseconds, today, versions)
    return found


def versions() -> str:
    """What a measurement depends on besides the GPU, in words."""
    named = [f"blockscale {__version__}", f"torch {torch.__version__}"]
    with suppress(metadata.PackageNotFoundError):
        named.append(f"triton {metadata.version('triton')}")
    return ", ".join(named)
