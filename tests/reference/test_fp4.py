"""E2M1 and what is read of it: NVFP4, and MXFP4 as FP8."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from blockscale import reference
from blockscale.errors import BlockscaleError
from blockscale.group_formats import MXFP4, NVFP4
from blockscale.reference.fp4 import dequantize_fp4, e2m1_value, to_e2m1
from blockscale.reference.packing import pack
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal


def test_e2m1_ties_go_to_the_even_mantissa_and_beyond_six_it_saturates():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 7.0, 1e30])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0]
    assert e2m1_value(to_e2m1(ties)).tolist() == expected
    assert e2m1_value(to_e2m1(-ties)).tolist() == [-value for value in expected]
    above = torch.nextafter(ties[:7], torch.tensor(9.0))
    assert e2m1_value(to_e2m1(above)).tolist() == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    below = torch.nextafter(ties[:7], torch.tensor(0.0))
    assert e2m1_value(to_e2m1(below)).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]


def test_every_e2m1_code_has_the_value_of_ml_dtypes_and_comes_back():
    codes = torch.arange(16, dtype=torch.uint8)
    expected = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert_bitwise_equal(e2m1_value(codes), torch.from_numpy(expected))
    assert_bitwise_equal(to_e2m1(e2m1_value(codes)), codes)


def test_power_of_two_scales_by_other_rules_are_read_too():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).unsqueeze(0)
    for exponent in (0, 1, 254):
        scale = torch.tensor([[exponent]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
        got = dequantize_fp4(codes, scale, MXFP4(), torch.float32)
        expected = e2m1_value(codes).double() * 2.0 ** (exponent - 127)
        assert torch.equal(got, expected.float())
    nan = torch.tensor([[0xFF]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert bool(dequantize_fp4(codes, nan, MXFP4()).isnan().all())


def test_nvfp4_golden():
    packed = torch.tensor([[0x17, 0x9F, *[0] * 6, 0x02]], dtype=torch.uint8)  # 6, 0.5, -6, -0.5; then 1
    scale = torch.tensor([[448.0, 0.25]]).to(torch.float8_e4m3fn)
    multiplier = reference.nvfp4_scale(scale, torch.tensor([0.5]), "modelopt")
    assert multiplier.tolist() == [[224.0, 0.125]]
    got = reference.dequantize_group(packed, multiplier, NVFP4(), 17)
    assert got[0, :4].tolist() == [1344.0, 112.0, -1344.0, -112.0]
    assert got[0, 16] == 0.125
    divided = reference.nvfp4_scale(scale, torch.tensor(2.0), "compressed-tensors")
    assert_bitwise_equal(divided, multiplier)


def test_nvfp4_experts_have_global_scales_of_their_own():
    scale = torch.ones(2, 3, 4).to(torch.float8_e4m3fn)
    got = reference.nvfp4_scale(scale, torch.tensor([0.5, 3.0]), "modelopt")
    assert (got[0].unique().tolist(), got[1].unique().tolist()) == ([0.5], [3.0])
    got = reference.nvfp4_scale(scale, torch.tensor(0.5), "modelopt")
    assert got.unique().tolist() == [0.5]


@pytest.mark.parametrize("block_size", [(128, 128), (8, 32)])
def test_mxfp4_of_a_trained_kind_of_weight_is_fp8_without_a_loss(block_size):
    x = data.gaussian((2, 200, 576))
    packed, scale = reference.quantize_group(x, MXFP4())
    codes, block_scale, lossless = reference.fp8_from_mxfp4(packed, scale, 576, block_size)
    assert bool(lossless.all())
    assert bool(reference.is_power_of_two(block_scale).all())
    assert_bitwise_equal(
        reference.dequantize_weight(codes, block_scale, block_size, torch.float32),
        reference.dequantize_group(packed, scale, MXFP4(), 576, torch.float32),
    )


@pytest.mark.parametrize(
    ("values", "exponents", "exact"),
    [
        # 6 * 2**6 is the largest that fits, 0.5 * 2**-8 the smallest: 14 binades apart.
        ((6.0, 0.5), (14, 0), True),
        ((6.0, 0.5), (15, 0), False),
        ((6.0, 1.0), (15, 0), True),
        ((6.0, 4.0), (17, 0), True),
        ((6.0, 4.0), (18, 0), False),
        ((1.0, 3.0), (17, 0), True),
        ((3.0, 1.5), (16, 0), False),
        # What each value leaves above it, up to 448, with the smallest code below.
        ((4.0, 0.5), (14, 0), True),
        ((3.0, 0.5), (15, 0), True),
        ((2.0, 0.5), (15, 0), True),
        ((1.5, 0.5), (16, 0), True),
        ((1.0, 0.5), (16, 0), True),
        ((0.5, 0.5), (17, 0), True),
        ((0.5, 0.5), (18, 0), False),
        # Zeros have no say, at whatever scale.
        ((0.0, 0.5), (60, 0), True),
        ((6.0, 0.0), (60, 0), True),
    ],
)
def test_which_scales_may_share_a_block_of_fp8(values, exponents, exact):
    codes = to_e2m1(torch.tensor(values).repeat_interleave(32).unsqueeze(0))
    packed = pack(codes, 4)
    for shift in (100, 1):
        scale = torch.tensor([exponents]).add(shift).to(torch.uint8).view(torch.float8_e8m0fnu)
        got, block_scale, lossless = reference.fp8_from_mxfp4(packed, scale, 64)
        assert lossless.tolist() == [[exact]]
        before = dequantize_fp4(codes, scale, MXFP4(), torch.float32)
        after = reference.dequantize_weight(got, block_scale, dtype=torch.float32)
        assert torch.equal(after, before) == exact
        # The larger values stay exact at any rate, and the smaller ones are off by half of E4M3's last step.
        assert torch.equal(after[:, :32], before[:, :32])
        assert bool(((after - before).abs() <= block_scale * 2.0**-10).all())


@pytest.mark.parametrize("exponent", [0, 254])
def test_fp8_from_mxfp4_at_the_ends_of_the_scales(exponent):
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).unsqueeze(0) & 0b1011  # at most 1.5: finite
    scale = torch.tensor([[exponent]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    got, block_scale, lossless = reference.fp8_from_mxfp4(pack(codes, 4), scale, 32)
    assert bool(lossless.all())
    assert 2.0**-126 <= float(block_scale) < math.inf
    assert torch.equal(
        reference.dequantize_weight(got, block_scale, dtype=torch.float32),
        dequantize_fp4(codes, scale, MXFP4(), torch.float32),
    )


def test_fp8_from_mxfp4_of_zeros_has_scale_one():
    scale = torch.tensor([[200]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    codes, block_scale, lossless = reference.fp8_from_mxfp4(
        torch.full((1, 16), 0x80, dtype=torch.uint8), scale, 32
    )
    assert (block_scale.tolist(), lossless.tolist()) == ([[1.0]], [[True]])
    assert codes.view(torch.uint8).flatten().tolist() == [0, 0x80] * 16


_CODES = torch.zeros((4, 64), dtype=torch.uint8)
_SCALE = torch.full((4, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
_BAD_CALLS = {
    "dequantize_fp4: scale: wrong shape": lambda: dequantize_fp4(_CODES, torch.ones(4, 1), MXFP4()),
    "dtype: bad dtype": lambda: dequantize_fp4(_CODES, torch.ones(4, 2), MXFP4(), torch.int8),
    "nvfp4_scale: scale: bad dtype": lambda: reference.nvfp4_scale(_SCALE, torch.ones(1), "modelopt"),
    "unknown layout": lambda: reference.nvfp4_scale(
        torch.ones(4, 2).to(torch.float8_e4m3fn), torch.ones(1), "nvidia"
    ),
    "global_scale: wrong shape": lambda: reference.nvfp4_scale(
        torch.ones(3, 4, 2).to(torch.float8_e4m3fn), torch.ones(2), "modelopt"
    ),
    "block_size: cuts through groups": lambda: reference.fp8_from_mxfp4(_CODES[:, :32], _SCALE, 64, (8, 48)),
    "scale: NaN among the scales": lambda: reference.fp8_from_mxfp4(
        _CODES[:, :32], torch.full_like(_SCALE.view(torch.uint8), 255).view(torch.float8_e8m0fnu), 64
    ),
}


@pytest.mark.parametrize("message", _BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(BlockscaleError, match=message):
        _BAD_CALLS[message]()
