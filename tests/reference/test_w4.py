"""Prepared four-bit weights: every code and scale comes back, and the bits are the E4M3 numbers meant."""

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.reference import packing, w4
from blockscale.reference.fp4 import dequantize_fp4, quantize_mxfp4
from blockscale.reference.int4 import dequantize_int, quantize_int
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal

INT4 = GroupInt(4, 128)


def prepared(codes, scale, fmt):
    return w4.prepare_w4(packing.pack(codes, 4), scale, fmt, codes.shape[-1])


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(48, 576), (3, 16, 128), (16, 16), (2, 32, 1040)])
def test_int4_values_come_back_as_they_were(shape, scale_dtype):
    codes, scale = quantize_int(data.gaussian(shape), GroupInt(4, 128, "ue8m0"))
    scale = scale.to(torch.float32)
    scale = (scale if scale_dtype == torch.float8_e8m0fnu else scale * 1.37).to(scale_dtype)
    weight = prepared(codes, scale, INT4)
    assert weight.shape == shape
    assert_bitwise_equal(w4.dequantize_w4(weight) + 0.0, dequantize_int(codes, scale, INT4, torch.float32))


@pytest.mark.parametrize("shape", [(48, 576), (3, 16, 128), (16, 16), (2, 32, 1040)])
def test_mxfp4_values_come_back_as_they_were(shape):
    codes, scale = quantize_mxfp4(data.gaussian(shape))
    weight = prepared(codes, scale, MXFP4())
    assert weight.shape == shape
    assert_bitwise_equal(w4.dequantize_w4(weight), dequantize_fp4(codes, scale, MXFP4(), torch.float32))


@pytest.mark.parametrize("exponent", [0, 1, 11, 127, 254])
def test_every_mxfp4_code_at_every_distance_of_scales_up_to_2_to_the_11(exponent):
    codes = torch.arange(16, dtype=torch.uint8).repeat(8)[None].expand(12, -1).contiguous()
    below = (exponent - torch.arange(12)).clamp_min(0)
    exponents = torch.stack([torch.full((12,), exponent), below, below, below], dim=1)
    scale = exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    found = w4.dequantize_w4(prepared(codes, scale, MXFP4()))
    expected = dequantize_fp4(codes, scale, MXFP4(), torch.float32)
    assert_bitwise_equal(found, expected)


def test_mxfp4_blocks_of_zeros_ask_for_no_scale():
    codes = torch.full((16, 128), 6, dtype=torch.uint8)
    codes[:, 32:64] = 8  # minus zero
    exponents = torch.tensor([100, 254, 100, 89], dtype=torch.uint8).expand(16, 4).contiguous()
    scale = exponents.view(torch.float8_e8m0fnu)
    found = w4.dequantize_w4(prepared(codes, scale, MXFP4()))
    assert_bitwise_equal(found, dequantize_fp4(codes, scale, MXFP4(), torch.float32))


def test_mxfp4_blocks_far_below_their_neighbours_are_rounded_to_a_scale_that_fits():
    codes = torch.arange(16, dtype=torch.uint8).repeat(8)[None].expand(16, -1).contiguous()
    exponents = torch.tensor([120, 108, 80, 120], dtype=torch.uint8).expand(16, 4).contiguous()
    scale = exponents.view(torch.float8_e8m0fnu)
    found = w4.dequantize_w4(prepared(codes, scale, MXFP4()))
    exact = dequantize_fp4(codes, scale, MXFP4(), torch.float32)
    unit = 2.0 ** (120 - 127)
    assert_bitwise_equal(found[:, :32], exact[:, :32])
    assert_bitwise_equal(found[:, 96:], exact[:, 96:])
    assert bool(((found - exact).abs() <= 0.25 * unit * 2.0**-11).all())
    assert bool((found[:, 32:64] != exact[:, 32:64]).any())


def test_words_and_turned_words_are_e4m3_numbers_after_one_mask():
    """What the kernel does to a word of INT4 codes, on the bytes."""
    codes, scale = quantize_int(data.gaussian((16, 256)), INT4)
    weight = prepared(codes, scale, INT4)
    words, turned = weight.words, (weight.words >> 4 & 0x0FFFFFFF) | (weight.words << 28)
    low = (words.view(torch.uint8) & 0x87).view(torch.float8_e4m3fn).float() * 512
    high = (turned.view(torch.uint8) & 0x87).view(torch.float8_e4m3fn).float() * 512
    both = torch.cat([low, high], dim=-1).transpose(0, 1).flatten(1)
    assert_bitwise_equal(both + 0.0, codes.float())


def test_refusals_are_one_line():
    codes, scale = quantize_int(data.gaussian((16, 128)), INT4)
    codes[3, 5] = -8
    with pytest.raises(BlockscaleError, match="a code of -8"):
        prepared(codes, scale, INT4)
    codes[3, 5] = 0
    with pytest.raises(BlockscaleError, match="no W4A8 format"):
        prepared(codes, scale, GroupInt(4, 64))
    with pytest.raises(BlockscaleError, match="scale: wrong shape"):
        prepared(codes, scale[:8], INT4)
    with pytest.raises(BlockscaleError, match="packed: wrong shape"):
        w4.prepare_w4(packing.pack(codes, 4), scale, INT4, 256)
    with pytest.raises(BlockscaleError, match="scale: bad dtype"):
        prepared(codes.view(torch.uint8) & 15, scale.repeat(1, 4), MXFP4())
    bad = torch.full((16, 4), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(BlockscaleError, match="NaN among the scales"):
        prepared(codes.view(torch.uint8) & 15, bad, MXFP4())
