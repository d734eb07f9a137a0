"""The KL divergence of every unit in every format, each measured with all other units exact.

What is measured is one draw of rounding on a few windows, and formats of nearly the same noise differ by
chance: the best of several would look better than it is. Quantization noise moves logits in proportion to its
size, and the KL divergence is quadratic in that. So with n the noise to signal power of the unit's outputs in
a format (10^(-SQNR/10), mean over its modules), and sums over the formats g that windows do not tell apart
from f, itself included:

    kl[f] = n[f] * sum_g kl_measured[g] / sum_g n[g]

Windows tell two formats apart if 0 lies outside the 95 % interval of their paired difference (Student's t
over windows, as `evaluate` has it; one window tells nothing apart).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from blockscale.errors import NonFiniteError
from blockscale.evaluate.sensitivity import Change, Exact, changed_with_noise
from blockscale.evaluate.windows import mean_of
from blockscale.search.candidates import Candidate


@dataclass(frozen=True)
class Cost:
    """A unit in a format.

    Attributes:
        format: as recipes spell it.
        nbytes: that it takes, scales included.
        kl: what it is taken to cost, nats a token.
        measured_kl: what was measured, all else exact; None for a unit that the model does not have.
        output_sqnr_db: of the module's outputs on exact inputs; of several, from their mean noise power.
    """

    format: str
    nbytes: int
    kl: float
    measured_kl: float | None = None
    output_sqnr_db: float | None = None


@dataclass(frozen=True)
class Measured:
    """One format of a unit, as measured."""

    change: Change
    noise: float  # to signal, power


def make_modules(
    model: nn.Module, candidate: Candidate, parts: Mapping[str, Mapping[str, int]]
) -> dict[str, nn.Module]:
    """The modules of a unit in a format.

    Raises:
        BlockscaleError: a module that cannot have it, or a weight with NaN or Inf.
    """
    made = {}
    for path, weights in parts.items():
        try:
            made[path] = candidate.quantized(model.get_submodule(path), weights)
        except NonFiniteError as error:
            raise NonFiniteError(error.count, error.position, where=path) from error
    return made


def measure(
    exact: Exact,
    candidates: Sequence[Candidate],
    parts: Mapping[str, Mapping[str, int]],
    on_format: Callable[[], None],
) -> list[Measured]:
    """A unit in every format, all else exact; nothing of one that the model does not have."""
    found = []
    for candidate in candidates if parts else ():
        change, sqnr_db = changed_with_noise(exact, make_modules(exact.model, candidate, parts))
        powers = [10 ** (-decibels / 10) for decibels in sqnr_db.values()]
        found.append(Measured(change, math.fsum(powers) / len(powers)))
        on_format()
    return found


def costs(candidates: Sequence[Candidate], nbytes: Sequence[int], measured: Sequence[Measured]) -> list[Cost]:
    """What each format of a unit costs; `nbytes` as `candidates`, `measured` too or empty."""
    if not measured:
        return [Cost(each.name, size, 0.0) for each, size in zip(candidates, nbytes, strict=True)]
    taken = pooled(measured)
    return [
        Cost(each.name, size, kl, found.change.mean_kl, _decibels(found.noise))
        for each, size, kl, found in zip(candidates, nbytes, taken, measured, strict=True)
    ]


def pooled(measured: Sequence[Measured]) -> list[float]:
    """The KL divergence of each format, shared out by noise among those that windows do not tell apart."""
    alike = [
        [other for other in measured if other is each or not _told_apart(each.change, other.change)]
        for each in measured
    ]
    # Rounding of the sums can leave a divergence of nothing slightly below zero.
    return [max(0.0, _shared(each, group)) for each, group in zip(measured, alike, strict=True)]


def _shared(each: Measured, group: Sequence[Measured]) -> float:
    noise = math.fsum(other.noise for other in group)
    if len(group) == 1 or not 0 < noise < math.inf:
        return each.change.mean_kl
    return each.noise / noise * math.fsum(other.change.mean_kl for other in group)


def _told_apart(one: Change, other: Change) -> bool:
    difference = mean_of([a - b for a, b in zip(one.kl, other.kl, strict=True)], one.tokens)
    return difference.low > 0 or difference.high < 0  # neither holds of the NaN of one window


def _decibels(noise: float) -> float:
    return math.inf if noise == 0 else -10 * math.log10(noise)
