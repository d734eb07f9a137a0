"""A model on a text, alone or against a reference: perplexity, KL divergence, agreement on likeliest tokens.

Windows and errors as in `windows.py`. Of every scored token, with p the reference's distribution of the next
token and q the model's, from a float32 softmax over the logits:

    perplexity     exp(mean of -log q(target))
    ratio          perplexity of the model over that of the reference, paired by windows
    KL divergence  sum_v p_v (log p_v - log q_v), nats
    top-1          whether both find the same token likeliest
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from blockscale.errors import BlockscaleError
from blockscale.evaluate.subjects import Subject
from blockscale.evaluate.windows import Estimate, Window, batches, mean_of
from blockscale.metrics import kl_divergence

_ROWS = 512  # tokens whose logits are widened at a time


@dataclass(frozen=True)
class WindowScore:
    """Sums over the scored tokens of a window.

    Attributes:
        begin: first token of the window.
        tokens: how many are scored.
        nll: negative log-likelihood, nats.
        reference_nll: that of the reference; this and the next are None without one.
        kl: KL divergence, nats.
        agreed: tokens with the same likeliest one.
    """

    begin: int
    tokens: int
    nll: float
    reference_nll: float | None = None
    kl: float | None = None
    agreed: int | None = None


@dataclass(frozen=True)
class Against:
    """A model compared with a reference.

    Attributes:
        perplexity: of the reference.
        ratio: of the model's perplexity to it.
        kl: mean KL divergence from the reference, nats.
        top1: share of tokens with the same likeliest one.
    """

    perplexity: Estimate
    ratio: Estimate
    kl: Estimate
    top1: Estimate


@dataclass(frozen=True)
class Scores:
    """Figures of a model on a text.

    Attributes:
        perplexity: of the model.
        tokens: scored ones.
        windows: how many the text was cut into.
        against: what the comparison with a reference gave, or None without one.
    """

    perplexity: Estimate
    tokens: int
    windows: int
    against: Against | None


def score_windows(
    model: Subject,
    reference: Subject | None,
    tokens: torch.Tensor,
    windows: Sequence[Window],
    batch_size: int = 1,
) -> Iterator[WindowScore]:
    """Scores of windows, in order.

    Args:
        model: what is evaluated.
        reference: what it is compared with, or None.
        tokens: int64 (T,), the text.
        windows: of the text, of `windows.cut`.
        batch_size: windows of one length that go through the models together.

    Raises:
        BlockscaleError: models of different vocabularies, or logits with NaN or Inf.
    """
    for batch in batches(windows, batch_size):
        ids = torch.stack([tokens[window.begin : window.end] for window in batch])
        logits = _checked(model, ids)
        others = None if reference is None else _checked(reference, ids).to(logits.device)
        if others is not None and reference is not None and others.shape[-1] != logits.shape[-1]:
            raise BlockscaleError(
                "vocabularies differ",
                where=model.name,
                expected=f"{others.shape[-1]} tokens, as {reference.name}",
                got=logits.shape[-1],
            )
        for row, window in enumerate(batch):
            place = slice(-1 - window.scored, -1)
            targets = ids[row, -window.scored :].to(logits.device)
            yield _score(window, logits[row, place], None if others is None else others[row, place], targets)


def summarize(scores: Iterable[WindowScore]) -> Scores:
    """The figures of all windows."""
    scores = list(scores)
    counts = [score.tokens for score in scores]

    def mean(sums: Callable[[WindowScore], float]) -> Estimate:
        return mean_of([sums(score) for score in scores], counts)

    against = None
    if all(score.reference_nll is not None for score in scores):
        against = Against(
            perplexity=mean(lambda score: score.reference_nll or 0.0).exp(),
            ratio=mean(lambda score: score.nll - (score.reference_nll or 0.0)).exp(),
            kl=mean(lambda score: score.kl or 0.0),
            top1=mean(lambda score: score.agreed or 0),
        )
    return Scores(mean(lambda score: score.nll).exp(), sum(counts), len(scores), against)


def _checked(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    logits = subject.logits(ids)
    # A sum is not finite as soon as one value is not, and costs no tensor of this size.
    if not logits.sum(dtype=torch.float64).isfinite() and not logits.isfinite().all():
        where = subject.first_nonfinite(ids) or "lm_head"
        raise BlockscaleError("NaN or Inf in the logits", where=subject.name, got=f"first in {where}")
    return logits


def _score(
    window: Window, logits: torch.Tensor, others: torch.Tensor | None, targets: torch.Tensor
) -> WindowScore:
    """Of (scored, V) logits of the model and the reference."""
    nll = _nll(logits, targets)
    if others is None:
        return WindowScore(window.begin, window.scored, nll)
    pieces = zip(others.split(_ROWS), logits.split(_ROWS), strict=True)
    kl = sum(kl_divergence(other, own).double().sum().item() for other, own in pieces)
    agreed = int((others.argmax(-1) == logits.argmax(-1)).sum())
    return WindowScore(window.begin, window.scored, nll, _nll(others, targets), kl, agreed)


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed negative log-likelihood of (T,) targets."""
    pieces = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    return sum(
        torch.nn.functional.cross_entropy(own.float(), target, reduction="none").double().sum().item()
        for own, target in pieces
    )
