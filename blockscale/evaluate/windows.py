"""A long text in windows, and figures with their error from sums over windows.

The token sequence is cut into windows of `context` tokens that start every `stride` tokens. The first token
of a window has nothing before it and is not scored; where windows overlap (stride < context), a token is
scored once, in the first window that holds it as a target. With S_w the sum of some figure over the T_w
scored tokens of window w:

    mean = sum_w S_w / sum_w T_w

Its standard error treats windows as the independent draws, since tokens of one window are not (the linearized
variance of a ratio of sums; Cochran, Sampling Techniques, chapter 6):

    se = sqrt(n / (n - 1) * sum_w (S_w - mean * T_w)^2) / sum_w T_w

Intervals are those of Student's t with n - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import NormalDist

import torch

from blockscale.errors import BlockscaleError

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Window:
    """A piece of a token sequence.

    Attributes:
        begin, end: of its tokens in the sequence.
        scored: how many targets at the window's end count.
    """

    begin: int
    end: int
    scored: int


@dataclass(frozen=True)
class Estimate:
    """A figure of all tokens, from windows.

    Attributes:
        value: the figure.
        standard_error: of it; NaN where there is only one window.
        low, high: its 95 % confidence interval; NaN where there is only one window.
    """

    value: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, standard_error: float, draws: int) -> Estimate:
        """With the interval of Student's t for so many windows."""
        reach = student_t(draws - 1) * standard_error if draws > 1 else math.nan
        return cls(value, standard_error, value - reach, value + reach)

    def exp(self) -> Estimate:
        """Of exp(value): the interval is mapped, the error is exp(value) times this one (delta method)."""
        low, value, high = (exponential(each) for each in (self.low, self.value, self.high))
        return Estimate(value, value * self.standard_error, low, high)


def cut(tokens: torch.Tensor, context: int, stride: int) -> list[Window]:
    """Windows that together score every token once, but for the first of each disjoint window.

    Raises:
        BlockscaleError: fewer than two tokens, or a context or stride out of range.
    """
    if tokens.ndim != 1 or len(tokens) < 2:
        raise BlockscaleError(
            "not enough text",
            where="token_ids",
            expected="(T,) with T >= 2",
            got=f"shape {tuple(tokens.shape)}",
        )
    if context < 2:
        raise BlockscaleError("window too short", where="context", expected="at least 2", got=context)
    if not 1 <= stride <= context:
        raise BlockscaleError("bad stride", where="stride", expected=f"1 to context ({context})", got=stride)
    windows, scored_end = [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        scored = end - max(begin + 1, scored_end)
        if scored > 0:
            windows.append(Window(begin, end, scored))
        if end == len(tokens):
            break
        scored_end = end
    return windows


def spread(windows: Sequence[Window], limit: int | None) -> list[Window]:
    """Up to `limit` whole windows, from all over the text; all of them if it is None.

    Raises:
        BlockscaleError: a limit below 1.
    """
    if limit is None or limit >= len(windows):
        return list(windows)
    if limit < 1:
        raise BlockscaleError("bad limit", where="limit", expected="at least 1", got=limit)
    longest = windows[0].end - windows[0].begin
    whole = [window for window in windows if window.end - window.begin == longest]
    limit = min(limit, len(whole))
    return [whole[number * len(whole) // limit] for number in range(limit)]


def batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Neighbouring windows of one length; the last, shorter one goes alone, so nothing is ever padded.

    Raises:
        BlockscaleError: a batch size below 1.
    """
    if batch_size < 1:
        raise BlockscaleError("bad batch size", where="batch_size", expected="at least 1", got=batch_size)
    for _, group in groupby(windows, key=lambda window: window.end - window.begin):
        equal = list(group)
        for start in range(0, len(equal), batch_size):
            yield equal[start : start + batch_size]


def mean_of(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """sum(sums) / sum(counts), from sums over windows and their numbers of tokens."""
    total = sum(counts)
    mean = math.fsum(sums) / total
    n = len(sums)
    if n < 2:
        return Estimate.around(mean, math.nan, n)
    spread = math.fsum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    return Estimate.around(mean, math.sqrt(n / (n - 1) * spread) / total, n)


def student_t(freedom: int) -> float:
    """Quantile (1 + 0.95) / 2 of Student's t; exact for 1 and 2 degrees of freedom.

    From 3 on the expansion of Abramowitz and Stegun, 26.7.5, which is off by less than 0.5 % there.
    """
    p = (1 + _CONFIDENCE) / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z, v = NormalDist().inv_cdf(p), freedom
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / v**power for power, term in enumerate(terms))


def exponential(value: float) -> float:
    """exp(value), infinite where that is no float."""
    return math.exp(value) if not value >= 700 else math.inf  # beyond that a float overflows
