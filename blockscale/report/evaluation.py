"""Sections of an evaluation: figures with intervals, windows along the text, the audit of GEMMs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from blockscale.evaluate.compare import Scores, WindowScore
from blockscale.evaluate.run import Evaluation
from blockscale.evaluate.tasks.answers import TaskScore
from blockscale.evaluate.windows import Estimate
from blockscale.ops import GemmRecord
from blockscale.report import figures
from blockscale.report.content import Chart, Facts, Note, Section, Table, View
from blockscale.report.wording import interval, number, percent

_TASKS = 8  # that are summed up at the top
_POINTS = 1000  # of a chart; beyond that neighbours are put together


def summary(result: Evaluation) -> Facts:
    """The figures that matter most, with what they are compared with."""
    entries = []
    if result.scores is not None:
        against = result.scores.against
        entries.append(_fact("perplexity", result.scores.perplexity, 3))
        if against is not None:
            entries += [
                _fact("of the reference", against.perplexity, 3),
                _fact("ratio", against.ratio, 4),
                _fact("KL divergence, nats", against.kl, 5),
                _fact("same likeliest token", against.top1, 4),
            ]
    entries += [_fact(f"{each.task}, {each.metric}", each.score, 4) for each in result.tasks[:_TASKS]]
    return Facts(tuple(entries))


def text_section(result: Evaluation, windows: Sequence[WindowScore]) -> Section | None:
    """Figures of a text, if there is one, and of each of its windows."""
    text, scores = result.text, result.scores
    if text is None or scores is None:
        return None
    against = scores.against
    note = (
        f"{scores.tokens:,} tokens of {text.data} in {scores.windows} windows of {text.context}, a new one "
        f"every {text.stride}. Intervals are 95 % confidence intervals over windows; the ratio is paired by "
        "windows."
    )
    figures_of = [("perplexity", scores.perplexity, 3)]
    if against is not None:
        figures_of += [
            ("perplexity of the reference", against.perplexity, 3),
            ("ratio of the two", against.ratio, 4),
            ("KL divergence, nats a token", against.kl, 5),
            ("tokens with the same likeliest", against.top1, 4),
        ]
    rows = tuple(
        (name, f"{each.value:.{digits}f}", interval(each, digits)) for name, each, digits in figures_of
    )
    columns = ("figure", "value", "95 % interval")
    return Section(
        "Figures", (Note(note), Table("Of the whole text", columns, rows), *_along(scores, windows))
    )


def task_section(tasks: Sequence[TaskScore]) -> Section:
    """Figures of tasks."""
    note = (
        "Each figure is a mean over questions, with its 95 % interval; differences are paired by questions."
    )
    compared = any(each.reference is not None for each in tasks)
    columns: tuple[str, ...] = ("task", "metric", "questions", "examples", "model", "95 % interval")
    columns += ("reference", "difference", "95 % interval") if compared else ()
    rows = tuple(_task(each, compared) for each in tasks)
    borrowed = dict.fromkeys(each.task for each in tasks if each.shots_from_questions)
    if borrowed:
        note += f" Examples in prompts are other questions of the same set for {', '.join(borrowed)}."
    return Section("Tasks", (Note(note), Table("Scores", columns, rows, (0, 1))))


def gemm_section(records: Sequence[GemmRecord]) -> Section:
    """What an audit saw of every FP8 GEMM."""
    note = (
        "Every FP8 GEMM is held against float32 products. Accumulation is the result against the product of "
        "the dequantized operands, beyond rounding; activations, weight and both are what quantizing these "
        "costs. Figures are the largest calc_diff of a call, 1 - 2 <x, y> / (|x|^2 + |y|^2). Saturated, "
        "clipped and flushed are shares of the activations' codes."
    )
    columns = (
        *(
            "site",
            "operator",
            "weight",
            "calls",
            "rows",
            "accumulation",
            "worst value",
            "activations",
            "weight",
        ),
        *("both", "saturated", "clipped", "flushed", "not finite", "largest"),
    )
    rows = tuple(_gemm(record) for record in records)
    return Section("GEMMs", (Note(note), Table("Audit of FP8 GEMMs", columns, rows, (0, 1))))


def _fact(name: str, estimate: Estimate, digits: int) -> tuple[str, str, str]:
    return name, f"{estimate.value:.{digits}f}", interval(estimate, digits)


def _task(task: TaskScore, compared: bool) -> tuple[str, ...]:
    shown = (task.task, task.metric, f"{task.questions:,}", str(task.shots), *_cells(task.score))
    if not compared:
        return shown
    return (*shown, _cells(task.reference)[0], *_cells(task.difference))


def _cells(estimate: Estimate | None) -> tuple[str, str]:
    """A figure and its interval."""
    return (number(None),) * 2 if estimate is None else (f"{estimate.value:.4f}", interval(estimate, 4))


def _along(scores: Scores, windows: Sequence[WindowScore]) -> tuple[Chart | Table, ...]:
    """The KL divergence along the text, or without a reference the likelihood, as chart and table."""
    if not windows:
        return ()
    against = scores.against
    kl = against is not None
    title = "KL divergence of each window" if kl else "Likelihood of each window"
    unit = "nats a token" if kl else "negative log-likelihood, nats a token"
    if against is not None:
        mean = (against.kl.value, against.kl.low, against.kl.high)
    else:
        found = scores.perplexity
        mean = (math.log(found.value), _log(found.low), _log(found.high))
    places, values = _thinned([each.begin for each in windows], [_value(each, kl) for each in windows])
    chart = Chart(
        title,
        "The line is the mean over all tokens, the band its 95 % interval.",
        (View(title, figures.course(places, values, mean, ("first token of the window", unit))),),
    )
    columns = ("first token", "tokens", "nats of the model") + (
        ("of the reference", "KL", "same likeliest") * kl
    )
    return chart, Table(
        "Windows, per token", columns, tuple(_row(each, kl) for each in windows), (), folded=True
    )


def _value(score: WindowScore, kl: bool) -> float:
    return ((score.kl or 0.0) if kl else score.nll) / score.tokens


def _row(score: WindowScore, kl: bool) -> tuple[str, ...]:
    cells = (str(score.begin), str(score.tokens), f"{score.nll / score.tokens:.4f}")
    if not kl:
        return cells
    of_reference = (score.reference_nll or 0.0) / score.tokens
    shown = (
        f"{of_reference:.4f}",
        number(_value(score, kl), 4),
        percent((score.agreed or 0) / score.tokens, 1),
    )
    return (*cells, *shown)


def _thinned(places: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    """Means of neighbours, so that there are not too many points."""
    step = -(-len(values) // _POINTS)
    starts = range(0, len(values), step)
    means = [math.fsum(values[at : at + step]) / len(values[at : at + step]) for at in starts]
    return [float(places[at]) for at in starts], means


def _log(value: float) -> float:
    return math.nan if math.isnan(value) else math.log(value)


def _gemm(record: GemmRecord) -> tuple[str, ...]:
    codes, accumulation = record.codes, record.accumulation
    sizes = (record.n, record.k) if record.experts is None else (record.experts, record.n, record.k)
    parts = (record.activations, record.weight, record.quantization)
    lost = accumulation.nonfinite + codes.nan + codes.bad_scales + codes.nonfinite
    return (
        *(record.site, record.op, " x ".join(map(str, sizes)), f"{record.calls:,}", f"{record.rows:,}"),
        *(number(accumulation.calc_diff, 2), number(accumulation.peak.relative_error, 2)),
        *(number(None if part is None else part.calc_diff, 2) for part in parts),
        percent(codes.saturated / codes.values, 2) if codes.values else number(None),
        *(
            percent(each / codes.known, 2) if codes.known else number(None)
            for each in (codes.clipped, codes.flushed)
        ),
        *(str(lost), number(codes.amax)),
    )
