"""Perplexity of a causal language model on one long text, and the paired ratio of two models' perplexities.

The token sequence is cut into windows of `context` tokens that start every `stride` tokens. The first token
of a window has nothing before it and is not scored; where windows overlap (stride < context), a token is
scored once, in the first window that holds it as a target. With S_w and T_w the summed negative
log-likelihood (nats, natural log of a float32 softmax over the logits) and the number of scored tokens of
window w:

    nll        = sum_w S_w / sum_w T_w
    perplexity = exp(nll)

The standard error of `nll` treats windows as the independent draws, since tokens of one window are not (the
linearized variance of a ratio of sums; Cochran, Sampling Techniques, chapter 6):

    se(nll) = sqrt(n / (n - 1) * sum_w (S_w - nll * T_w)^2) / sum_w T_w

Two models scored on the same windows are compared by the ratio of their perplexities, exp(nll_b - nll_a).
Its standard error comes from the differences window by window, where the difficulty of the text cancels: it
is far smaller than the error of either perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from blockscale.errors import BlockscaleError


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one token sequence.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood of a scored token, in nats.
        standard_error: standard error of `nll`; times `perplexity` it is that of the perplexity. NaN where
            there is only one window.
        tokens: number of scored tokens.
        context: window length in tokens.
        stride: distance between the starts of two windows.
        window_nll: summed negative log-likelihood of every window, in order.
        window_tokens: scored tokens of every window.
    """

    perplexity: float
    nll: float
    standard_error: float
    tokens: int
    context: int
    stride: int
    window_nll: tuple[float, ...] = field(repr=False)
    window_tokens: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class PerplexityRatio:
    """Perplexity of a changed model over that of the model it was made from.

    Attributes:
        ratio: above 1 where the changed model predicts the text worse.
        standard_error: standard error of `ratio` from paired windows. NaN for one window.
        windows: number of paired windows.
    """

    ratio: float
    standard_error: float
    windows: int


@dataclass(frozen=True)
class _Window:
    begin: int
    end: int
    scored: int  # how many targets at the window's end count


def perplexity(
    model: torch.nn.Module,
    token_ids: Sequence[int] | torch.Tensor,
    context: int = 512,
    stride: int = 512,
    batch_size: int = 1,
) -> PerplexityResult:
    """Perplexity of a causal language model on a token sequence.

    Args:
        model: a transformers causal LM, or any module whose call with `input_ids` of shape (B, T) returns an
            object with `logits` of shape (B, T, V). It runs in evaluation mode and is left as it was.
        token_ids: the text, at least two tokens (a sequence of ints or an integer tensor of shape (T,)).
        context: window length in tokens, at least 2.
        stride: tokens between the starts of two windows, 1 to `context`; `context` makes windows disjoint.
        batch_size: windows of equal length that go through the model together.

    Returns:
        The perplexity with the sums of every window, so that two results can be paired.

    Raises:
        BlockscaleError: too few tokens, or a context, stride or batch size out of range.
    """
    tokens = torch.as_tensor(token_ids, dtype=torch.int64)
    _check_arguments(tokens, context, stride, batch_size)
    windows = list(_windows(len(tokens), context, stride))
    device = next(model.parameters()).device
    sums: list[float] = []
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(windows, batch_size):
            sums += _window_sums(model, tokens, batch, device)
    finally:
        model.train(was_training)
    counts = [window.scored for window in windows]
    mean, error = _ratio_of_sums(sums, counts)
    return PerplexityResult(
        perplexity=math.exp(mean) if mean < 700 else math.inf,  # beyond that a float overflows
        nll=mean,
        standard_error=error,
        tokens=sum(counts),
        context=context,
        stride=stride,
        window_nll=tuple(sums),
        window_tokens=tuple(counts),
    )


def paired_ratio(a: PerplexityResult, b: PerplexityResult) -> PerplexityRatio:
    """Ratio perplexity(b) / perplexity(a) of two models scored on the same windows of the same text.

    Args:
        a: the original model.
        b: the changed model.

    Returns:
        The ratio and its standard error, from the per-window differences (delta method: se(exp(x)) is
        exp(x) se(x)).

    Raises:
        BlockscaleError: the two were not measured on the same windows.
    """
    if (a.context, a.stride, a.window_tokens) != (b.context, b.stride, b.window_tokens):
        raise BlockscaleError(
            "perplexities of different windows cannot be paired",
            expected=f"context {a.context}, stride {a.stride}, {a.tokens} tokens",
            got=f"context {b.context}, stride {b.stride}, {b.tokens} tokens",
            remedy="measure both models on the same tokens with the same context and stride",
        )
    differences = [after - before for before, after in zip(a.window_nll, b.window_nll, strict=True)]
    mean, error = _ratio_of_sums(differences, a.window_tokens)
    ratio = math.exp(mean)
    return PerplexityRatio(ratio, ratio * error, len(differences))


def _check_arguments(tokens: torch.Tensor, context: int, stride: int, batch_size: int) -> None:
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
    if batch_size < 1:
        raise BlockscaleError("bad batch size", where="batch_size", expected="at least 1", got=batch_size)


def _windows(length: int, context: int, stride: int) -> Iterator[_Window]:
    """Windows that together score every token once, but for the first of each disjoint window."""
    scored_end = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        scored = end - max(begin + 1, scored_end)
        if scored > 0:
            yield _Window(begin, end, scored)
        if end == length:
            return
        scored_end = end


def _batches(windows: list[_Window], batch_size: int) -> Iterator[list[_Window]]:
    """Neighbouring windows of one length; the last, shorter one goes alone, so nothing is ever padded."""
    for _, group in groupby(windows, key=lambda window: window.end - window.begin):
        equal = list(group)
        for start in range(0, len(equal), batch_size):
            yield equal[start : start + batch_size]


@torch.inference_mode()
def _window_sums(
    model: torch.nn.Module, tokens: torch.Tensor, batch: list[_Window], device: torch.device
) -> list[float]:
    input_ids = torch.stack([tokens[window.begin : window.end] for window in batch]).to(device)
    logits = model(input_ids=input_ids, use_cache=False).logits  # (B, T, V)
    sums = []
    for row, window in enumerate(batch):
        # Row by row: a float32 copy of all the logits at once would be the largest buffer of the run.
        scored = logits[row, -1 - window.scored : -1].float()  # (scored, V)
        losses = torch.nn.functional.cross_entropy(scored, input_ids[row, -window.scored :], reduction="none")
        sums.append(losses.double().sum().item())
    return sums


def _ratio_of_sums(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Mean sum(sums) / sum(counts) and its standard error over windows."""
    total = sum(counts)
    mean = math.fsum(sums) / total
    n = len(sums)
    if n < 2:
        return mean, math.nan
    spread = math.fsum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(n / (n - 1) * spread) / total
