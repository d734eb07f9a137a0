import math

import pytest
import torch

from blockscale import metrics
from blockscale.errors import BlockscaleError
from blockscale.reference import dequantize_weight, quantize_weight
from blockscale.testing import data


def test_calc_diff_is_one_minus_twice_the_product_over_the_squares():
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.0, -3.0])
    expected = 1 - 2 * (1.5 + 4 - 9) / ((1 + 4 + 9) + (2.25 + 4 + 9))
    assert metrics.calc_diff(x, y) == pytest.approx(expected, rel=1e-15)
    assert metrics.calc_diff(y, x) == metrics.calc_diff(x, y)


def test_equal_tensors_are_at_distance_zero():
    x = data.gaussian((3, 50))
    assert metrics.calc_diff(x, x) == 0.0
    assert metrics.relative_error(x, x) == 0.0
    assert metrics.sqnr_db(x, x) == math.inf


@pytest.mark.parametrize("shape", [(0,), (4, 4)])
def test_zero_and_empty_tensors_are_at_distance_zero(shape):
    zero = torch.zeros(shape)
    assert metrics.calc_diff(zero, zero) == 0.0
    assert metrics.relative_error(zero, zero) == 0.0


def test_any_error_of_a_zero_truth_is_infinite():
    assert metrics.relative_error(torch.ones(3), torch.zeros(3)) == math.inf
    assert metrics.sqnr_db(torch.ones(3), torch.zeros(3)) == -math.inf


def test_relative_error_is_a_ratio_of_frobenius_norms():
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]])
    assert metrics.relative_error(x, y) == 0.75
    assert metrics.sqnr_db(x, y) == pytest.approx(20 * math.log10(4 / 3))


def test_calc_diff_follows_from_the_noise_ratio():
    x = data.gaussian((256, 512), torch.float32)
    y = dequantize_weight(*quantize_weight(x), dtype=torch.float32)
    predicted = 0.5 * 10 ** (-metrics.sqnr_db(y, x) / 10)
    assert metrics.calc_diff(y, x) == pytest.approx(predicted, rel=1e-2)


def test_sums_over_many_pieces_are_exact():
    x = torch.ones((1 << 20) + 7, dtype=torch.bfloat16)
    y = x.clone()
    y[-1] = 2
    assert metrics.relative_error(x, y) == math.sqrt(1 / ((1 << 20) + 6 + 4))


def test_nan_is_not_hidden():
    assert math.isnan(metrics.calc_diff(torch.tensor([math.nan, 1.0]), torch.ones(2)))
    assert math.isnan(metrics.relative_error(torch.tensor([math.nan, 1.0]), torch.ones(2)))
    assert math.isnan(metrics.sqnr_db(torch.tensor([math.nan, 1.0]), torch.ones(2)))


def test_saturation_counts_both_signs_of_448_and_nothing_else():
    codes = torch.tensor([448.0, -448.0, 416.0, 0.0]).to(torch.float8_e4m3fn)
    assert metrics.saturation(codes) == 0.5
    assert metrics.saturation(codes[:0]) == 0.0


def test_bad_arguments_are_named():
    with pytest.raises(BlockscaleError, match="shapes differ"):
        metrics.calc_diff(torch.ones(2), torch.ones(3))
    with pytest.raises(BlockscaleError, match=r"expected float8_e4m3fn, got torch\.float32"):
        metrics.saturation(torch.ones(2))
