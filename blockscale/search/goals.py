"""What is asked of an assignment, and the one that meets it.

    target size     at most so many bytes, for the whole checkpoint's tensors: predicted KL is minimized
    max_kl          predicted KL, nats a token
    min_accuracy    share of the text's tokens whose likeliest next token is the original's, measured

Without a target size, the size is minimized under the other two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockscale.errors import BlockscaleError
from blockscale.search.assign import Assignment, Option, assign, hull, smallest

_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+) ?(x|[kKMGT]?i?B)")


@dataclass(frozen=True)
class Goal:
    """What an assignment has to be; None where nothing is asked.

    Attributes:
        target_size: `"0.6x"` of the source or an absolute size: `"350GB"`, `"4.5 GiB"`.
        max_kl: predicted, nats a token.
        min_accuracy: agreement with the source on the likeliest token, of 1.

    Raises:
        BlockscaleError: nothing is asked, or a value out of range.
    """

    target_size: str | None = None
    max_kl: float | None = None
    min_accuracy: float | None = None

    def __post_init__(self) -> None:
        if self.target_size is None and self.max_kl is None and self.min_accuracy is None:
            remedy = "give --target-size, --max-kl or --min-accuracy"
            raise BlockscaleError("nothing is asked of the result", remedy=remedy)
        if self.max_kl is not None and not self.max_kl > 0:
            raise BlockscaleError("bad bound", where="max-kl", expected="more than 0 nats", got=self.max_kl)
        if self.min_accuracy is not None and not 0 < self.min_accuracy < 1:
            expected = "a share of tokens, between 0 and 1"
            raise BlockscaleError("bad bound", where="min-accuracy", expected=expected, got=self.min_accuracy)


def parse_size(text: str, source_bytes: int) -> int:
    """Bytes of `"0.6x"` (of the source), `"350GB"`, `"512MiB"` or `"1000 B"`.

    Raises:
        BlockscaleError: anything else, or nothing.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = found and found[2]
    if not found or (unit != "x" and unit not in _UNITS) or not float(found[1]):
        expected = "a share of the source, as 0.6x, or a size, as 350GB or 4.5GiB"
        raise BlockscaleError("bad size", where="target-size", expected=expected, got=repr(text))
    return int(float(found[1]) * (source_bytes if unit == "x" else _UNITS[str(unit)]))


def target_bytes(goal: Goal, source_bytes: int, smallest_bytes: int) -> int | None:
    """The most that the result may take, or None.

    Raises:
        BlockscaleError: a size that cannot be read, that no assignment reaches, or that the source has.
    """
    if goal.target_size is None:
        return None
    target = parse_size(goal.target_size, source_bytes)
    if target < smallest_bytes:
        raise BlockscaleError(
            "no assignment of these formats is that small",
            where=f"target size {goal.target_size}",
            expected=f"at least {_spelled(smallest_bytes, source_bytes)}",
            got=f"{target:,} bytes",
        )
    if target >= source_bytes:
        raise BlockscaleError(
            "the source is that small: nothing needs quantizing",
            where=f"target size {goal.target_size}",
            expected=f"less than {source_bytes:,} bytes",
            got=f"{target:,} bytes",
        )
    return target


def choose(
    units: Sequence[Sequence[Option]],
    goal: Goal,
    limit: float | None,
    agreement: Callable[[Assignment], float],
) -> Assignment:
    """The assignment that meets a goal.

    Args:
        units: the options of each, sizes without what no unit has.
        goal: what is asked.
        limit: on the sum of sizes, if there is a target size.
        agreement: measures an assignment, for `min_accuracy`.

    Raises:
        BlockscaleError: no assignment meets all that is asked.
    """
    if limit is None:
        return _smallest(units, goal, agreement)
    found = assign(units, limit)
    if goal.max_kl is not None and found.cost > goal.max_kl:
        raise _not_met("max-kl", f"at most {goal.max_kl:g} nats", f"{found.cost:.3g} predicted")
    if goal.min_accuracy is not None:
        reached = agreement(found)
        if reached < goal.min_accuracy:
            raise _not_met("min-accuracy", f"at least {goal.min_accuracy:g}", f"{reached:.4f} measured")
    return found


def _smallest(
    units: Sequence[Sequence[Option]], goal: Goal, agreement: Callable[[Assignment], float]
) -> Assignment:
    """With size and cost in each other's places under `max_kl`; then the hull, until agreement is enough."""
    found = None
    if goal.max_kl is not None:
        turned = [[Option(option.cost, option.size) for option in options] for options in units]
        swapped = assign(turned, goal.max_kl)
        found = Assignment(swapped.chosen, swapped.cost, swapped.size, swapped.size)
    if goal.min_accuracy is None:
        assert found is not None
        return found
    points = [point for point in hull(units) if found is None or point.size > found.size]
    points = points if found is None else [found, *points]
    first, last = 0, len(points) - 1  # the last one predicts as the source does
    while first < last:
        middle = (first + last) // 2
        if agreement(points[middle]) >= goal.min_accuracy:
            last = middle
        else:
            first = middle + 1
    return points[last]


def smallest_bytes(units: Sequence[Sequence[Option]], rest: int) -> int:
    """Bytes of the smallest assignment, with those that no unit has."""
    return int(smallest(units)) + rest


def _spelled(nbytes: int, source_bytes: int) -> str:
    # Rounded up: what is printed can be asked for.
    return f"{nbytes:,} bytes, {-(-nbytes * 10_000 // source_bytes) / 10_000:.4f}x of the source"


def _not_met(what: str, expected: str, got: str) -> BlockscaleError:
    return BlockscaleError(
        "is not met at the target size", where=what, expected=expected, got=got, remedy="allow a larger one"
    )
