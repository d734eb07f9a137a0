"""Costs of formats, where windows tell them apart and where they do not."""

import math

import pytest

from blockscale.evaluate.sensitivity import Change
from blockscale.search.candidates import candidates
from blockscale.search.costs import Measured, costs, pooled

TOKENS = 100
FORMATS = candidates(("fp8", "fp8:64x64"), "compressed-tensors", (128, 128), "float32")


def measured(noise, *kl):
    sums = tuple(value * TOKENS for value in kl)
    return Measured(Change(sums, (TOKENS,) * len(kl), (TOKENS,) * len(kl)), noise)


def test_formats_that_windows_do_not_tell_apart_share_by_noise():
    # Noise of one to two, and the other way round in what was measured.
    found = pooled([measured(0.001, 0.02, 0.06), measured(0.002, 0.05, 0.01)])
    assert found == pytest.approx([0.07 / 3, 0.14 / 3])


def test_formats_that_windows_tell_apart_keep_what_was_measured():
    pair = [measured(0.001, 0.010, 0.011, 0.012), measured(0.001, 0.110, 0.111, 0.1121)]
    assert pooled(pair) == pytest.approx([0.011, 0.1110333], rel=1e-4)


def test_one_window_tells_nothing_apart():
    assert pooled([measured(0.001, 0.01), measured(0.003, 0.07)]) == pytest.approx([0.02, 0.06])


def test_without_noise_there_is_nothing_to_share_by():
    assert pooled([measured(0.0, 0.0), measured(0.0, -1e-9)]) == [0.0, 0.0]
    assert pooled([measured(math.inf, 0.5), measured(0.1, 0.1)]) == [0.5, 0.1]


def test_a_cost_says_what_was_measured_and_what_is_taken():
    found = costs(FORMATS, (10, 12), [measured(0.001, 0.02), measured(0.001, 0.04)])
    assert [(cost.format, cost.nbytes) for cost in found] == [("fp8", 10), ("fp8:64x64", 12)]
    assert [cost.kl for cost in found] == pytest.approx([0.03, 0.03])
    assert [cost.measured_kl for cost in found] == pytest.approx([0.02, 0.04])
    assert [cost.output_sqnr_db for cost in found] == pytest.approx([30, 30])


def test_what_the_model_lacks_costs_its_predictions_nothing():
    found = costs(FORMATS, (10, 12), [])
    assert [(cost.nbytes, cost.kl, cost.measured_kl) for cost in found] == [(10, 0.0, None), (12, 0.0, None)]
