"""What models make of tasks, and how two of them differ on the same questions.

A metric has a value for each question; its figure is the mean over questions, the independent draws. The
standard error is that of a mean, s / sqrt(n); of a difference between two models, s is that of the
differences question by question, where the difficulty of a question cancels.

Where values are 0 and 1, intervals are those for shares, which hold for few questions and near 0 and 1 too,
with z the quantile of the normal distribution. Of n questions with a share p right (Wilson, 1927):

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

Of n questions, b of which the model alone has right and c the reference alone (Bonett and Price, 2012):

    p - q +- z sqrt((p + q - (p - q)^2) / (n + 2))        p = (b + 1) / (n + 2), q = (c + 1) / (n + 2)

Other values have the interval of Student's t (`windows.mean_of`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

from blockscale.errors import BlockscaleError
from blockscale.evaluate.tasks.questions import Questions, quiet
from blockscale.evaluate.windows import Estimate, mean_of

Who = Literal["model", "reference"]
_Z = NormalDist().inv_cdf(0.975)
_SEED = 1234  # of the examples in prompts: lm-eval's own


@dataclass(frozen=True)
class Answers:
    """What one model made of the questions of one task of lm-eval.

    Attributes:
        who: which of the two models.
        task: of lm-eval.
        values: by metric (`acc`, or `exact_match,strict-match` with its filter), one of each question.
    """

    who: Who
    task: str
    values: dict[str, list[float]]


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task that was named.

    Attributes:
        task: as it was named.
        metric: of lm-eval.
        questions: how many.
        shots: examples in a prompt.
        shots_from_questions: they are other questions of the same set, for want of a set of their own.
        score: mean over questions.
        reference: that of the reference; this and the next are None without one.
        difference: of the model's score from the reference's, paired by questions.
    """

    task: str
    metric: str
    questions: int
    shots: int
    shots_from_questions: bool
    score: Estimate
    reference: Estimate | None = None
    difference: Estimate | None = None


def answer(
    questions: Questions, lm: Any, who: Who, on_question: Callable[[], None] = lambda: None
) -> Answers:
    """Ask a model.

    Args:
        questions: of one task.
        lm: the model, an `adapter.SubjectLM`.
        who: which of the two it is.
        on_question: is called as they are answered.

    Raises:
        BlockscaleError: the task has no metric that is a mean over questions.
    """
    from lm_eval.evaluator import evaluate

    task, name, asked = questions.task, questions.name, len(questions.numbers)
    requests = told = 0

    def on_request(total: int) -> None:
        nonlocal requests, told
        requests += 1
        while told < requests * asked // total:
            told += 1
            on_question()

    lm.on_request = on_request
    task.set_fewshot_seed(_SEED)  # the same examples for both models
    with quiet():
        found = evaluate(
            lm, {"tasks": {name: task}}, samples={name: list(questions.numbers)}, bootstrap_iters=0
        )
    means = {metric for metric, how in task.aggregation().items() if getattr(how, "__name__", "") == "mean"}
    values: dict[str, list[float]] = {}
    for sample in found["samples"][name]:
        for metric in sample["metrics"]:
            if metric in means:
                spelled = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                values.setdefault(spelled, []).append(float(sample[metric]))
    if not values:
        expected = "a metric that is a mean over questions"
        raise BlockscaleError("nothing to measure", where=f"task {name}", expected=expected)
    return Answers(who, name, values)


def task_scores(questions: Sequence[Questions], answers: Sequence[Answers]) -> tuple[TaskScore, ...]:
    """The figures of all tasks, in the order they were named."""
    known = {(each.who, each.task): each.values for each in answers}
    scores = []
    for named in dict.fromkeys(each.named for each in questions):
        members = [each for each in questions if each.named == named]
        shared = [set(known["model", each.name]) for each in members]
        for metric in known["model", members[0].name]:
            if not all(metric in names for names in shared):
                continue
            own, other = (
                [value for each in members for value in known.get((who, each.name), {}).get(metric, ())]
                for who in ("model", "reference")
            )
            scores.append(
                TaskScore(
                    task=named,
                    metric=metric,
                    questions=len(own),
                    shots=members[0].shots,
                    shots_from_questions=members[0].shots_from_questions,
                    score=share_of(own),
                    reference=share_of(other) if other else None,
                    difference=difference_of(own, other) if other else None,
                )
            )
    return tuple(scores)


def share_of(values: Sequence[float]) -> Estimate:
    """The mean of values of questions."""
    mean = _mean(values)
    if not set(values) <= {0.0, 1.0}:
        return mean
    n, p = len(values), mean.value
    center, reach = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return replace(mean, low=(center - reach) / scale, high=(center + reach) / scale)


def difference_of(own: Sequence[float], other: Sequence[float]) -> Estimate:
    """The mean of differences, question by question."""
    differences = [mine - theirs for mine, theirs in zip(own, other, strict=True)]
    mean = _mean(differences)
    if not {*own, *other} <= {0.0, 1.0}:
        return mean
    n = len(own) + 2
    p, q = (differences.count(1.0) + 1) / n, (differences.count(-1.0) + 1) / n
    reach = _Z * math.sqrt((p + q - (p - q) ** 2) / n)
    return replace(mean, low=max(p - q - reach, -1.0), high=min(p - q + reach, 1.0))


def _mean(values: Sequence[float]) -> Estimate:
    return mean_of(values, [1] * len(values))
