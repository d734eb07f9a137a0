"""Sections of a training: loss, perplexity and gradient over its steps, and with what options."""

from __future__ import annotations

import math
from collections.abc import Sequence

from blockscale.qat.history import MORE_THAN_ALL, Step, TrainingResult
from blockscale.report import figures
from blockscale.report.content import Chart, Facts, Section, Table, View
from blockscale.report.figures import Axis
from blockscale.report.wording import number, percent

_POINTS = 1000  # of a chart; beyond that neighbours are put together
_STEPS = "step"


def summary(result: TrainingResult) -> Facts:
    """The figures that matter most."""
    steps, checks = result.steps, result.checks
    objective = "next token" if result.training["distill"] is None else "KL from the teacher"
    entries = [
        ("steps", f"{len(steps):,}", f"{result.seconds:,.0f} s in the last run"),
        (
            "loss, nats",
            number(_mean(steps[-20:]), 4),
            f"{objective}; {number(_mean(steps[:20]), 4)} at first",
        ),
    ]
    if result.reference is not None and checks:
        before, after, exact = checks[0].perplexity, checks[-1].perplexity, result.reference.perplexity
        entries.append(("perplexity", f"{after:.3f}", f"{before:.3f} before training"))
        entries.append(("of the source", f"{exact:.3f}", result.training["model"]))
        if not math.isnan(result.recovered):
            note = MORE_THAN_ALL if result.recovered > 1 else "between the source and plain rounding"
            entries.append(("of the gap closed", percent(min(result.recovered, 1.0), 0), note))
    return Facts(tuple(entries))


def course_section(result: TrainingResult) -> Section:
    """Loss, perplexity, and what moved the weights, over the steps."""
    steps = result.steps
    loss = figures.lines(
        {"loss": _thinned(steps, [each.loss for each in steps])}, Axis(_STEPS), Axis("nats a token"), {}
    )
    parts = [Chart("Loss", "Of each step's batch, before the step.", (View("loss", loss),))]
    if result.checks and result.reference is not None:
        measured = [(float(each.step), each.perplexity) for each in result.checks]
        levels = {"source": result.reference.perplexity}
        drawn = figures.lines({"in training": measured}, Axis(_STEPS), Axis("perplexity"), levels)
        data, windows = result.training["check_data"], result.training["check_windows"]
        note = (
            f"Of at most {windows} windows of {data}, rounded as the checkpoint is. Step 0 is plain rounding."
        )
        parts.append(Chart("Perplexity", note, (View("perplexity", drawn),)))
    views = [("gradient norm", [each.gradient_norm for each in steps], "before clipping")]
    views.append(("learning rate", [each.learning_rate for each in steps], "of weights"))
    moved = tuple(
        View(name, figures.lines({name: _thinned(steps, values)}, Axis(_STEPS), Axis(unit), {}))
        for name, values, unit in views
    )
    parts.append(Chart("Gradient and rate", "", moved))
    return Section("Course", tuple(parts))


def options_section(result: TrainingResult) -> Section:
    """What the result depends on."""
    rows = tuple((name, _spelled(value)) for name, value in result.training.items() if value is not None)
    return Section("Options", (Table("Of the training", ("option", "value"), rows, (0, 1), folded=True),))


def _thinned(steps: Sequence[Step], values: Sequence[float]) -> list[tuple[float, float]]:
    """(step, value), as means of neighbours where there are many."""
    width = math.ceil(len(values) / _POINTS)
    return [
        (float(steps[min(start + width, len(values)) - 1].step), math.fsum(some) / len(some))
        for start in range(0, len(values), width)
        if (some := values[start : start + width])
    ]


def _mean(steps: Sequence[Step]) -> float:
    return math.fsum(each.loss for each in steps) / len(steps)


def _spelled(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items() if each)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
