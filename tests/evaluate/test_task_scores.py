"""Figures of tasks: means, intervals of shares, and differences paired by questions."""

import math
from types import SimpleNamespace

import pytest

from blockscale.evaluate.tasks.answers import Answers, difference_of, share_of, task_scores
from blockscale.evaluate.tasks.questions import Questions


def questions(named, name, count):
    config = SimpleNamespace(task=name, num_fewshot=None, fewshot_split="a", test_split="b")
    return Questions(named, SimpleNamespace(config=config), tuple(range(count)))


def test_a_share_has_wilsons_interval():
    figure = share_of([1.0] * 3 + [0.0] * 7)
    assert figure.value == pytest.approx(0.3)
    assert figure.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert (figure.low, figure.high) == pytest.approx((0.1078, 0.6032), abs=1e-4)  # as R's prop.test has it
    nothing = share_of([0.0] * 10)
    assert (nothing.value, nothing.low) == pytest.approx((0, 0))
    assert nothing.high == pytest.approx(0.2775, abs=1e-4)
    assert 0 < share_of([1.0]).low < 1  # one question is no certainty


def test_a_difference_is_paired():
    own, other = [1.0] * 60 + [0.0] * 40, [1.0] * 55 + [0.0] * 45
    figure = difference_of(own, other)
    assert figure.value == pytest.approx(0.05)
    # 5 of 100 changed, all for the better: b = 5, c = 0.
    p, q = 6 / 102, 1 / 102
    reach = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / 102)
    assert (figure.low, figure.high) == pytest.approx((p - q - reach, p - q + reach))
    apart = math.hypot(share_of(own).standard_error, share_of(other).standard_error)
    assert figure.standard_error < 0.4 * apart
    same = difference_of(own, own)
    assert (same.value, same.standard_error) == (0, 0)
    assert same.low < 0 < same.high


def test_other_values_have_the_interval_of_a_mean():
    figure = share_of([0.5, 0.25, 0.75])
    assert figure.value == 0.5
    assert figure.high - 0.5 == pytest.approx(4.3027 * 0.25 / math.sqrt(3), rel=1e-3)
    assert difference_of([0.5, 1.0], [0.0, 0.0]).value == 0.75


def test_members_of_a_task_count_by_their_questions():
    members = [questions("mmlu", "mmlu_a", 1), questions("mmlu", "mmlu_b", 3), questions("arc", "arc", 2)]
    answers = [
        Answers("model", "mmlu_a", {"acc": [1.0]}),
        Answers("model", "mmlu_b", {"acc": [0.0, 0.0, 1.0]}),
        Answers("model", "arc", {"acc": [0.0, 1.0], "acc_norm": [1.0, 1.0]}),
    ]
    scores = task_scores(members, answers)
    assert [(each.task, each.metric, each.questions, each.score.value) for each in scores] == [
        ("mmlu", "acc", 4, 0.5),
        ("arc", "acc", 2, 0.5),
        ("arc", "acc_norm", 2, 1.0),
    ]
    assert scores[0].reference is scores[0].difference is None
    reference = [
        Answers("reference", each.task, {key: [1.0] * len(v) for key, v in each.values.items()})
        for each in answers
    ]
    both = task_scores(members, answers + reference)
    assert [each.difference.value for each in both] == [-0.5, -0.5, 0.0]
    assert both[0].score == scores[0].score
