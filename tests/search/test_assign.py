"""Assignments against all there are."""

import itertools
import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockscale.search.assign import Option, assign, hull, smallest

OPTION = st.builds(Option, st.integers(1, 40), st.integers(0, 1000).map(lambda cost: cost / 64))
UNITS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def every(units):
    """(size, cost) of all assignments."""
    for options in itertools.product(*units):
        yield sum(option.size for option in options), math.fsum(option.cost for option in options)


def optimum(units, limit):
    return min(cost for size, cost in every(units) if size <= limit)


def largest_step(units):
    return max(max(o.cost for o in options) - min(o.cost for o in options) for options in units)


@settings(max_examples=300, deadline=None)
@given(UNITS, st.integers(0, 120))
def test_is_the_optimum_where_it_can_be_looked_for(units, more):
    limit = smallest(units) + more
    found = assign(units, limit)
    assert found.cost == pytest.approx(optimum(units, limit), rel=1e-8)
    assert found.bound == found.cost
    assert found.size <= limit


def test_a_large_problem_is_solved_too():
    draw = random.Random(1)
    units = [
        [Option(size, 0.0), *(Option(size * share // 16, draw.random() ** 4) for share in (8, 9, 10))]
        for size in (draw.randrange(10**6, 10**8) for _ in range(120))
    ]
    limit = 0.7 * sum(options[0].size for options in units)
    found = assign(units, limit)
    assert found.bound == found.cost
    assert limit * 0.99 < found.size <= limit


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(units=UNITS, more=st.integers(0, 120))
def test_without_looking_its_bound_brackets_the_optimum(monkeypatch, units, more):
    monkeypatch.setattr("blockscale.search.exact._MOST", 0)
    limit = smallest(units) + more
    found = assign(units, limit)
    taken = [options[number] for options, number in zip(units, found.chosen, strict=True)]
    assert found.size == sum(option.size for option in taken) <= limit
    assert found.cost == pytest.approx(math.fsum(option.cost for option in taken))
    best = optimum(units, limit)
    assert found.bound <= best + 1e-9
    assert best <= found.cost + 1e-9
    assert found.cost <= found.bound + largest_step(units) + 1e-9


@settings(max_examples=300, deadline=None)
@given(UNITS)
def test_points_of_the_hull_are_the_cheapest_of_their_size_and_convex(units):
    points = hull(units)
    assert points[0].size == smallest(units)
    assert points[-1].cost == pytest.approx(optimum(units, math.inf))
    for point in points:
        assert point.cost == pytest.approx(optimum(units, point.size))
    for one, two, three in zip(points, points[1:], points[2:], strict=False):
        saved = (one.cost - two.cost) / (two.size - one.size)
        assert (two.cost - three.cost) / (three.size - two.size) <= saved + 1e-9


@given(UNITS)
def test_with_room_for_all_it_is_the_optimum(units):
    found = assign(units, math.inf)
    assert found.cost == found.bound == pytest.approx(optimum(units, math.inf))


def test_leftover_bytes_go_to_what_still_fits():
    # The best step a byte is the first unit's; it does not fit, and the second's does.
    units = [[Option(0, 100), Option(10, 0)], [Option(0, 9), Option(1, 0)]]
    found = assign(units, 9)
    assert (found.chosen, found.size, found.cost) == ((0, 1), 1, 100)
    assert found.bound == found.cost  # it is the best


def test_an_option_off_the_hull_fills_what_is_left():
    units = [[Option(0, 100), Option(5, 60), Option(10, 0)]]
    assert [point.chosen for point in hull(units)] == [(0,), (2,)]
    assert assign(units, 7).chosen == (1,)


def test_nothing_is_smaller_than_the_smallest():
    with pytest.raises(ValueError, match="that small"):
        assign([[Option(2, 1)], [Option(3, 1)]], 4)
