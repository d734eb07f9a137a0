"""What is asked, and what meets it."""

import pytest

from blockscale.errors import BlockscaleError
from blockscale.search.assign import Option
from blockscale.search.goals import Goal, choose, parse_size, smallest_bytes, target_bytes

# Four units that are alike but for what they cost.
UNITS = [[Option(10, 0.0), Option(5, cost)] for cost in (0.1, 0.2, 0.4, 0.8)]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0.6x", 600),
        (".5x", 500),
        ("350GB", 350 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("2MiB", 2**21),
        ("12kB", 12000),
        ("77 B", 77),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text, 1000) == nbytes


@pytest.mark.parametrize("text", ["", "0.6", "x", "0x", "-1GB", "350gb", "1e3B", "1 iB", "GB", "0.6 y"])
def test_other_sizes_are_refused(text):
    with pytest.raises(BlockscaleError, match="bad size"):
        parse_size(text, 1000)


@pytest.mark.parametrize(
    "asked", [{}, {"max_kl": 0.0}, {"max_kl": float("nan")}, {"min_accuracy": 1.0}, {"min_accuracy": 0.0}]
)
def test_goals_that_ask_nothing_are_refused(asked):
    with pytest.raises(BlockscaleError, match=r"nothing is asked|bad bound"):
        Goal(**asked)


def test_a_size_that_no_assignment_has_is_refused_with_the_smallest():
    smallest = smallest_bytes(UNITS, 60)
    assert smallest == 80
    with pytest.raises(BlockscaleError, match=r"at least 80 bytes, 0\.8000x.*got 79 bytes") as told:
        target_bytes(Goal("79 B"), 100, smallest)
    assert "\n" not in str(told.value)
    assert target_bytes(Goal("80 B"), 100, smallest) == 80
    with pytest.raises(BlockscaleError, match="nothing needs quantizing"):
        target_bytes(Goal("1x"), 100, smallest)


def test_the_smallest_size_that_is_printed_can_be_asked_for():
    with pytest.raises(BlockscaleError) as told:
        target_bytes(Goal("0.1x"), 300_001, 200_003)
    share = str(told.value).split("bytes, ")[1].split("x")[0]
    assert target_bytes(Goal(f"{share}x"), 300_001, 200_003) >= 200_003


def test_without_a_size_the_smallest_below_a_kl():
    found = choose(UNITS, Goal(max_kl=0.7001), None, lambda _: 1.0)
    assert (found.chosen, found.size) == ((1, 1, 1, 0), 25)
    assert found.cost == pytest.approx(0.7)
    assert choose(UNITS, Goal(max_kl=0.05), None, lambda _: 1.0).chosen == (0, 0, 0, 0)


def test_without_a_size_the_smallest_accurate_one():
    asked = []

    def agreement(assignment):
        asked.append(assignment)
        return 1 - assignment.cost / 2

    found = choose(UNITS, Goal(min_accuracy=0.8), None, agreement)
    assert found.chosen == (1, 1, 0, 0)
    assert len(asked) <= 3  # of five on the hull
    assert choose(UNITS, Goal(min_accuracy=0.9), None, agreement).chosen == (1, 0, 0, 0)
    # Both: 0.35 nats allow the same, 0.2 do not.
    assert choose(UNITS, Goal(max_kl=0.35, min_accuracy=0.8), None, agreement).chosen == (1, 1, 0, 0)
    assert choose(UNITS, Goal(max_kl=0.25, min_accuracy=0.8), None, agreement).cost <= 0.25
    assert choose(UNITS, Goal(max_kl=2.0, min_accuracy=0.8), None, agreement).chosen == (1, 1, 0, 0)


def test_at_a_size_bounds_are_held_to():
    assert choose(UNITS, Goal("30 B", max_kl=0.35), 30, lambda _: 1.0).chosen == (1, 1, 0, 0)
    with pytest.raises(BlockscaleError, match="max-kl"):
        choose(UNITS, Goal("30 B", max_kl=0.29), 30, lambda _: 1.0)
    with pytest.raises(BlockscaleError, match=r"min-accuracy.*0\.8900 measured"):
        choose(UNITS, Goal("30 B", min_accuracy=0.9), 30, lambda _: 0.89)
