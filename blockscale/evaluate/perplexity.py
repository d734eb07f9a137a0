"""Perplexity of a causal language model on one long text, and the paired ratio of two models' perplexities.

With nll the mean negative log-likelihood of a scored token (nats, natural log of a float32 softmax over the
logits; windows and standard errors as in `windows.py`):

    perplexity = exp(nll)

Two models scored on the same windows are compared by the ratio of their perplexities, exp(nll_b - nll_a).
Its standard error comes from the differences window by window, where the difficulty of the text cancels: it
is far smaller than the error of either perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from blockscale.errors import BlockscaleError
from blockscale.evaluate.compare import score_windows
from blockscale.evaluate.subjects import TransformersSubject
from blockscale.evaluate.windows import cut, mean_of


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
    windows = cut(tokens, context, stride)
    was_training = model.training
    try:
        subject = TransformersSubject(type(model).__name__, model)
        sums = [score.nll for score in score_windows(subject, None, tokens, windows, batch_size)]
    finally:
        model.train(was_training)
    counts = [window.scored for window in windows]
    nll = mean_of(sums, counts)
    return PerplexityResult(
        perplexity=nll.exp().value,
        nll=nll.value,
        standard_error=nll.standard_error,
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
    ratio = mean_of(differences, a.window_tokens).exp()
    return PerplexityRatio(ratio.value, ratio.standard_error, len(differences))
