"""The best choice of one option for every unit under a limit, where few choices are left to look at.

Units are taken one by one, and of all choices so far those are kept that no other beats in both size and cost
(Nemhauser and Ullmann, "Discrete Dynamic Programming and Capital Allocation", Management Science 15, 1969). A
choice that cannot become better than a known assignment is dropped: its cost, and the least that the units to
come can cost in what it leaves of the limit, by the convex hull of their assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_MOST = 1 << 17  # choices that are kept; memory is 16 bytes a unit for each
_ROUNDING = 1e-9  # relative; an assignment better by less is none

Curve = tuple[Sequence[float], Sequence[float]]  # sizes, rising, and the least cost at each


def best(
    units: Sequence[Sequence[tuple[float, float]]],
    limit: float,
    known: float,
    curve: Callable[[int], Curve],
) -> tuple[int, ...] | None:
    """Number of the option of each unit that costs the least.

    Args:
        units: (size, cost) of the options of each.
        limit: on the sum of sizes.
        known: cost of an assignment within it.
        curve: the convex hull of the assignments of all units from this number on.

    Returns:
        The assignment; empty if none is better than the known one, None if there are too many to look at.
    """
    sizes, costs = np.zeros(1), np.zeros(1)
    taken: list[tuple[np.ndarray, np.ndarray]] = []  # by unit: the choice before, and the option
    for number, options in enumerate(units):
        table = np.asarray(options, dtype=np.float64)  # (O, 2)
        sizes, costs = (
            (before[:, None] + table[:, column]).ravel() for column, before in enumerate((sizes, costs))
        )
        rest_sizes, rest_costs = curve(number + 1)
        left = limit - sizes
        reach = costs + np.interp(left, rest_sizes, rest_costs)
        kept = np.flatnonzero((left >= rest_sizes[0]) & (reach < known * (1 - _ROUNDING)))
        kept = kept[np.lexsort((costs[kept], sizes[kept]))]
        least = np.minimum.accumulate(costs[kept])
        kept = kept[np.append(True, costs[kept][1:] < least[:-1])[: len(kept)]]
        if len(kept) > _MOST:
            return None
        if len(kept) == 0:
            return ()
        taken.append((kept // len(options), kept % len(options)))
        sizes, costs = sizes[kept], costs[kept]
    place = int(costs.argmin())
    chosen = []
    for parents, numbers in reversed(taken):
        chosen.append(int(numbers[place]))
        place = int(parents[place])
    return tuple(reversed(chosen))
