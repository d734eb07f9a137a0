"""From a checkpoint, a text and a goal to an assignment of formats, its recipe, and what it is held to.

The assumption: what units do to predictions adds up,

    KL(assignment) = sum_u kl[u, format of u]

which holds where every unit's noise is small and independent of the others'. Measuring the chosen assignment
as a whole, and some points of the trade-off beside it, tells how far that is true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from blockscale.errors import BlockscaleError
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.sensitivity import Change
from blockscale.evaluate.windows import Estimate, mean_of
from blockscale.search.assign import Assignment, Option, hull
from blockscale.search.candidates import BF16
from blockscale.search.costs import Cost
from blockscale.search.goals import Goal, choose, smallest_bytes, target_bytes
from blockscale.search.recipes import compact
from blockscale.search.space import Bench, Space
from blockscale.version import __version__

_MEASURED = 4  # points of the trade-off that are measured beside the chosen one


@dataclass(frozen=True)
class Point:
    """An assignment on the trade-off.

    Attributes:
        label: its size as a share of the source, `0.750x`.
        nbytes: of all tensors of the checkpoint, those that stay as they are and scales included.
        predicted_kl: sum over units, nats a token.
        measured_kl: of all units together, or None if that was not measured.
        top1: share of tokens with the source's likeliest next one, or None.
    """

    label: str
    nbytes: int
    predicted_kl: float
    measured_kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class UnitChoice:
    """A unit, the format it gets, and what each format would cost.

    Attributes:
        name: of its module; of several, joined.
        role: as in recipes.
        tensors: how many.
        format: that it gets.
        source_bytes: as it is.
        costs: in every format but "bf16", which costs nothing.
    """

    name: str
    role: str
    tensors: int
    format: str
    source_bytes: int
    costs: tuple[Cost, ...]


@dataclass(frozen=True)
class Measurement:
    """The chosen assignment as a whole, against the source.

    Attributes:
        kl: nats a token.
        top1: share of tokens with the same likeliest next one.
        calibration: measured over predicted KL.
    """

    kl: Estimate
    top1: Estimate
    calibration: float


@dataclass(frozen=True)
class SearchResult:
    """What was found, and on what it rests.

    Attributes:
        model: as it was named.
        source_bytes: of its tensors.
        target_bytes: that were asked for, or None.
        sequences, tokens: that units were measured on: how many, and tokens in each.
        chosen: the assignment.
        bound_kl: no assignment of that size has less predicted KL; None where size was minimized.
        measured: None if only units were measured.
        points: the trade-off, smallest first; the last one predicts as the source does.
        units: every unit.
        recipe: for `quantize`, as JSON has it.
        warnings: what the user should know.
        version: of blockscale.
    """

    model: str
    source_bytes: int
    target_bytes: int | None
    sequences: int
    tokens: int
    chosen: Point
    bound_kl: float | None
    measured: Measurement | None
    points: tuple[Point, ...]
    units: tuple[UnitChoice, ...]
    recipe: dict[str, Any]
    warnings: tuple[str, ...] = ()
    version: str = __version__


def search(
    space: Space,
    goal: Goal,
    ids: torch.Tensor,
    *,
    loading: Loading | None = None,
    measured: bool = False,
    on_format: Callable[[int], None] = lambda total: None,
) -> SearchResult:
    """Give every unit of a checkpoint a format.

    Args:
        space: units and formats, of `space.open_space`.
        goal: what is asked of the result.
        ids: int64 (B, T), what the model reads.
        loading: device and dtype; float32 by default.
        measured: measure the chosen assignment as a whole, and some points beside it.
        on_format: is told, after every measurement of a unit in a format, how many there are.

    Raises:
        BlockscaleError: a goal that cannot be met, or a model that transformers cannot run.
    """
    rest = space.source_bytes - sum(unit.source_bytes for unit in space.units)
    limit = target_bytes(goal, space.source_bytes, smallest_bytes(_options(space, None), rest))
    bench = Bench(space, ids, loading or Loading("transformers", dtype=torch.float32))
    table = bench.costs(on_format)
    options = _options(space, table)
    known: dict[tuple[int, ...], Change] = {}

    def change(assignment: Assignment) -> Change:
        if assignment.chosen not in known:
            known[assignment.chosen] = bench.joint(assignment.chosen)
        return known[assignment.chosen]

    def agreement(assignment: Assignment) -> float:
        return _top1(change(assignment))

    found = choose(options, goal, None if limit is None else limit - rest, agreement)
    formats = [space.formats[number] for number in found.chosen]
    if set(formats) == {BF16}:
        raise BlockscaleError("only the source itself meets that", remedy="ask for less")

    trade_off = hull(options)
    if measured:
        for assignment in (found, *_spread(trade_off)):
            change(assignment)

    def point(assignment: Assignment) -> Point:
        nbytes = int(assignment.size) + rest
        label = f"{nbytes / space.source_bytes:.3f}x"
        plain = Point(label, nbytes, assignment.cost)
        seen = known.get(assignment.chosen)
        return plain if seen is None else replace(plain, measured_kl=seen.mean_kl, top1=_top1(seen))

    seen = known.get(found.chosen)
    return SearchResult(
        model=space.model,
        source_bytes=space.source_bytes,
        target_bytes=limit,
        sequences=ids.shape[0],
        tokens=ids.shape[1],
        chosen=point(found),
        bound_kl=None if limit is None else found.bound,
        measured=None if seen is None else _measurement(seen, found.cost),
        points=tuple(map(point, trade_off)),
        units=tuple(
            UnitChoice(unit.name, unit.role, len(unit.tensors), fmt, unit.source_bytes, tuple(row))
            for unit, fmt, row in zip(space.units, formats, table, strict=True)
        ),
        recipe=space.recipe(compact(space.units, formats)),
        warnings=space.warnings,
    )


def _options(space: Space, table: Sequence[Sequence[Cost]] | None) -> list[list[Option]]:
    """By unit, in the order of `space.formats`; without costs where they are not known yet."""
    rows = table or [[Cost("", nbytes, 0.0) for nbytes in sizes] for sizes in space.nbytes]
    return [
        [Option(unit.source_bytes, 0.0), *(Option(cost.nbytes, cost.kl) for cost in row)]
        for unit, row in zip(space.units, rows, strict=True)
    ]


def _spread(points: Sequence[Assignment]) -> list[Assignment]:
    """A few points evenly apart in size, from the smallest to before the source."""
    first, last = points[0].size, points[-1].size
    sizes = [first + (last - first) * number / _MEASURED for number in range(_MEASURED)]
    nearest = (min(points[:-1], key=lambda each: abs(each.size - size)) for size in sizes)
    return list({each.chosen: each for each in nearest}.values())


def _top1(change: Change) -> float:
    return sum(change.agreed) / sum(change.tokens)


def _measurement(change: Change, predicted: float) -> Measurement:
    calibration = change.mean_kl / predicted if predicted > 0 else math.nan
    return Measurement(mean_of(change.kl, change.tokens), mean_of(change.agreed, change.tokens), calibration)
