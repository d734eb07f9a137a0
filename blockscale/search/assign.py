"""The cheapest choice of one option for every unit under a limit on size.

    minimize  sum_u cost[u, o_u]   subject to   sum_u size[u, o_u] <= limit

This is the multiple-choice knapsack problem. Of every unit the options on the lower convex hull of (size,
cost) are put in order; the step from one to the next saves some cost a byte, and the steps of all units are
taken together, from the one that saves the most (Lagrangian relaxation: a point on the way is the optimum of
cost + lambda * size). The points on the way are the convex hull of all assignments. At the first step that
does not fit, its fitting part bounds what any assignment can reach:

    bound = cost - (saved cost a byte) * (bytes left)  <=  optimum  <=  result  <=  bound + that step's saving

Later steps are taken as far as they fit, and bytes that are left then go to whatever saves the most. Where
this is not at the bound, `exact.py` looks for the optimum.
Source: Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from blockscale.search.exact import best


class Option(NamedTuple):
    """One way for a unit to be: what it takes of the limit, and what it costs."""

    size: float
    cost: float


@dataclass(frozen=True)
class Assignment:
    """An option for every unit.

    Attributes:
        chosen: number of the option, by unit.
        size: of all of them.
        cost: of all of them.
        bound: no assignment within the limit costs less; the cost itself where it is known to be the least.
    """

    chosen: tuple[int, ...]
    size: float
    cost: float
    bound: float


class _Step(NamedTuple):
    saved: float  # cost saved for each unit of size
    unit: int
    option: int  # that the unit gets


def smallest(units: Sequence[Sequence[Option]]) -> float:
    """What no assignment can be smaller than."""
    return sum(min(option.size for option in options) for options in units)


def assign(units: Sequence[Sequence[Option]], limit: float) -> Assignment:
    """The cheapest assignment found of a size of at most `limit`, and how much cheaper any could be.

    Raises:
        ValueError: the smallest assignment is larger.
    """
    if smallest(units) > limit:
        raise ValueError("no assignment is that small")
    chosen = _start(units)
    size, cost = _total(units, chosen)
    bound = None
    for step in _steps(units):
        now, new = units[step.unit][chosen[step.unit]], units[step.unit][step.option]
        if size + new.size - now.size <= limit:
            chosen[step.unit] = step.option
            size, cost = size + new.size - now.size, cost + new.cost - now.cost
        elif bound is None:
            bound = cost - step.saved * (limit - size)
    _fill(units, chosen, limit)
    _, cost = _total(units, chosen)
    if bound is None or bound >= cost:
        return _assignment(units, chosen)
    better = best(units, limit, cost, lambda number: _curve(units[number:]))
    if better is None:
        return replace(_assignment(units, chosen), bound=bound)
    return _assignment(units, better or chosen)


def hull(units: Sequence[Sequence[Option]]) -> list[Assignment]:
    """The assignments that are the cheapest of their size, on the convex hull of all: smallest first."""
    chosen = _start(units)
    found = [_assignment(units, chosen)]
    for step in _steps(units):
        chosen[step.unit] = step.option
        found.append(_assignment(units, chosen))
    return found


def _curve(units: Sequence[Sequence[Option]]) -> tuple[list[float], list[float]]:
    """Sizes and costs of the points of `hull`."""
    chosen = _start(units)
    size, cost = _total(units, chosen)
    sizes, costs = [size], [cost]
    for step in _steps(units):
        now, new = units[step.unit][chosen[step.unit]], units[step.unit][step.option]
        sizes.append(sizes[-1] + new.size - now.size)
        costs.append(costs[-1] + new.cost - now.cost)
        chosen[step.unit] = step.option
    return sizes, costs


def _start(units: Sequence[Sequence[Option]]) -> list[int]:
    """The smallest option of every unit; of equal ones the cheapest."""
    return [min(range(len(options)), key=lambda number: options[number]) for options in units]


def _steps(units: Sequence[Sequence[Option]]) -> list[_Step]:
    """All units' steps along their hulls, the most saving first; those of a unit stay in order."""
    steps = []
    for unit, options in enumerate(units):
        saved = math.inf
        for one, two in pairwise(_hull_of(options)):
            cheaper, larger = options[one].cost - options[two].cost, options[two].size - options[one].size
            saved = min(saved, cheaper / larger)  # a rounded quotient must not change the order
            steps.append(_Step(saved, unit, two))
    return sorted(steps, key=lambda step: -step.saved)


def _hull_of(options: Sequence[Option]) -> list[int]:
    """Options on the lower convex hull, larger and cheaper from one to the next."""
    found: list[int] = []
    for number in sorted(range(len(options)), key=lambda number: options[number]):
        if found and options[number].cost >= options[found[-1]].cost:
            continue
        while len(found) > 1 and _above(options[found[-2]], options[found[-1]], options[number]):
            found.pop()
        found.append(number)
    return found


def _above(first: Option, middle: Option, last: Option) -> bool:
    """Whether the middle one lies on or above the line between the others."""
    return (first.cost - middle.cost) * (last.size - first.size) <= (first.cost - last.cost) * (
        middle.size - first.size
    )


def _fill(units: Sequence[Sequence[Option]], chosen: list[int], limit: float) -> None:
    """Change single units, the largest saving first, as long as that fits."""
    size, _ = _total(units, chosen)
    while True:
        best = max(
            (
                (units[unit][chosen[unit]].cost - option.cost, unit, number)
                for unit, options in enumerate(units)
                for number, option in enumerate(options)
                if size + option.size - units[unit][chosen[unit]].size <= limit
            ),
            default=(0.0, 0, 0),
        )
        if best[0] <= 0:
            return
        size += units[best[1]][best[2]].size - units[best[1]][chosen[best[1]]].size
        chosen[best[1]] = best[2]


def _assignment(units: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Assignment:
    """With its cost for the bound."""
    size, cost = _total(units, chosen)
    return Assignment(tuple(chosen), size, cost, cost)


def _total(units: Sequence[Sequence[Option]], chosen: Sequence[int]) -> tuple[float, float]:
    taken = [options[number] for options, number in zip(units, chosen, strict=True)]
    return sum(option.size for option in taken), math.fsum(option.cost for option in taken)
