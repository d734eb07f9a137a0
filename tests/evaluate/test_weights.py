"""What is said of an FP8 weight: figures by definition, and planted faults by their names."""

import math

import pytest
import torch

from blockscale.calibrate.hessian import add_tokens, no_moments
from blockscale.calibrate.rounding import round_weight
from blockscale.evaluate.weights import report_weight
from blockscale.formats import BlockFP8
from blockscale.reference import quantize_weight


@pytest.fixture(params=[(128, 128), (1, 128), (32, 32)], ids=str)
def block(request):
    return request.param


def weight(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Blocks of unequal size, so that no two scales are the same.
    return (
        torch.randn(shape, generator=generator) * torch.rand(shape[-2], 1, generator=generator)
    ).bfloat16()


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("shape", [(576, 200), (2, 160, 256)])
def test_a_weight_as_it_is_quantized_has_no_fault(block, shape, scale_fmt):
    source = weight(*shape)
    codes, scale = quantize_weight(source, block, scale_fmt)
    report = report_weight(codes, scale, source, block)
    assert (report.fault, report.evidence) == (None, "")
    assert 25 < report.sqnr_db < 40
    assert report.worst_sqnr_db < report.sqnr_db
    assert len(report.worst_block) == len(shape)


def test_figures_are_what_they_say():
    source = torch.zeros(128, 256)
    source[:, :128] = 1.0
    source[3, 130] = 448.0  # a block of one value, beside which all others vanish
    source[5, 140] = 0.5
    codes, scale = quantize_weight(source)
    report = report_weight(codes, scale, source, (128, 128))
    assert report.amax == 448
    assert report.outliers == pytest.approx(1 / source.numel())
    assert report.saturated == pytest.approx((128 * 128 + 1) / source.numel())
    assert report.flushed == 0
    assert report.sqnr_db == math.inf
    source[7, 150] = 0.0005
    report = report_weight(*quantize_weight(source), source, (128, 128))
    assert report.flushed == pytest.approx(1 / source.numel())
    assert report.worst_block == (0, 1)


def test_one_corrupted_scale_is_found_where_it_is():
    source = weight(640, 512)
    codes, scale = quantize_weight(source)
    scale[3, 2] *= 1.5
    report = report_weight(codes, scale, source, (128, 128))
    assert report.fault == "scale of a block is wrong"
    assert report.evidence.startswith("1 of 20 blocks; block [3, 2]: ")
    assert report.worst_block == (3, 2)


def test_scales_rounded_after_the_codes_are_found():
    source = weight(640, 512)
    codes, scale = quantize_weight(source)
    rounded = torch.exp2(scale.log2().ceil())
    report = report_weight(codes, rounded, source, (128, 128))
    assert report.fault == "scales were changed after the codes"
    assert report_weight(codes, 1.1 * scale, source, (128, 128)).fault == report.fault


def test_a_swapped_grid_is_found():
    source = weight(512, 512)
    codes, scale = quantize_weight(source)
    for other in (scale.T.contiguous(), scale.flip(0)):
        assert report_weight(codes, other, source, (128, 128)).fault == "scale grid is swapped"


def test_other_weights_are_not_blamed_on_scales():
    codes, scale = quantize_weight(weight(256, 256))
    report = report_weight(codes, scale, weight(256, 256, seed=1), (128, 128))
    assert report.fault is None
    assert report.sqnr_db < 0


def test_zero_blocks_have_no_gain():
    source = weight(256, 256)
    source[:128, :128] = 0
    report = report_weight(*quantize_weight(source), source, (128, 128))
    assert report.fault is None


def noisy_moments(width, noise):
    """Moments of inputs to which the layers before have added noise, as a share of their size."""
    generator = torch.Generator().manual_seed(3)
    x, added = (torch.randn(8 * width, width, generator=generator) for _ in range(2))
    return add_tokens(no_moments(width), x, x + noise * added)


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3, 0.5])
def test_a_calibrated_weight_has_no_fault(noise, scale_fmt):
    source, fmt = weight(192, 256), BlockFP8((64, 128), scale_fmt)
    codes, scale = round_weight(source, noisy_moments(256, noise), fmt)
    report = report_weight(codes, scale, source, fmt.block_size, calibrated=True)
    assert (report.fault, report.evidence) == (None, "")


def test_a_weight_that_calibration_has_shrunk_has_no_fault():
    source = weight(256, 256)
    codes, scale = quantize_weight(source)
    report = report_weight(codes, scale / 1.19, source, (128, 128))
    assert report.fault == "scales were changed after the codes"
    report = report_weight(codes, scale / 1.19, source, (128, 128), calibrated=True)
    assert report.fault is None


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
def test_a_corrupted_scale_of_a_calibrated_weight_is_found(noise, factor):
    source, fmt = weight(256, 256), BlockFP8((64, 128), "ue8m0")
    codes, scale = round_weight(source, noisy_moments(256, noise), fmt)
    scale[2, 1] *= factor
    report = report_weight(codes, scale, source, fmt.block_size, calibrated=True)
    assert report.fault == "scale of a block is wrong"
    assert report.evidence.startswith("1 of 8 blocks; block [2, 1]: ")
