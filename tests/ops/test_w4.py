"""Four-bit weights put into the layout of their products and back: fast, and the bits of the reference."""

import pytest
import torch

from blockscale import ops, reference
from blockscale.errors import BlockscaleError
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.reference import packing
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal

FORMATS = [GroupInt(4, 128), GroupInt(4, 128, "ue8m0"), MXFP4()]
# Whole groups, a group and a half, less than one, and odd widths; several experts.
SHAPES = [(48, 576), (3, 16, 256), (16, 16), (5, 77), (4, 127), (2, 7, 129)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=FORMATS, ids=["int4", "int4 ue8m0", "mxfp4"])
def fmt(request):
    return request.param


def assert_same(got, expected):
    assert (got.shape, got.width, got.kind) == (expected.shape, expected.width, expected.kind)
    assert_bitwise_equal(got.words, expected.words)
    assert_bitwise_equal(got.scale, expected.scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_moved_as_the_reference_moves_them(device, fmt, shape):
    packed, scale = reference.quantize_group(data.wide_range(shape).to(device), fmt)
    if shape[-1] % 2:
        packed[..., -1] |= 0x80  # half a byte past the row may hold anything, -8 too
    expected, before = reference.prepare_w4(packed, scale, fmt, shape[-1]), packed.clone()
    assert_same(ops.prepare_w4(packed, scale, fmt, shape[-1]), expected)
    assert_bitwise_equal(packed, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_the_reference(device, fmt, shape, dtype):
    packed, scale = reference.quantize_group(data.wide_range(shape).to(device), fmt)
    weight = reference.prepare_w4(packed, scale, fmt, shape[-1])
    assert_bitwise_equal(ops.dequantize_w4(weight, dtype), reference.dequantize_w4(weight, dtype))
    if len(shape) == 3:
        assert_bitwise_equal(ops.dequantize_w4(weight[1]), reference.dequantize_w4(weight[1]))


@pytest.mark.parametrize("exponents", [(120, 108, 80, 120), (0, 0, 0, 0), (254, 254, 243, 0), (127, 0, 1, 2)])
def test_blocks_of_any_distance(device, exponents):
    """Where scales of a group are more than 2**11 apart codes are rounded, by the reference itself."""
    codes = torch.arange(16, dtype=torch.uint8, device=device).repeat(8)[None].expand(12, -1).contiguous()
    codes[3, 32:64] = 8  # a block of minus zeros asks for no scale
    scale = torch.tensor(exponents, dtype=torch.uint8, device=device).expand(12, 4).contiguous()
    operands = packing.pack(codes, 4), scale.view(torch.float8_e8m0fnu), MXFP4(), 128
    expected = reference.prepare_w4(*operands)
    found = ops.prepare_w4(*operands)
    assert_same(found, expected)
    assert_bitwise_equal(ops.dequantize_w4(found), reference.dequantize_w4(expected))


def test_only_codes_out_of_range_are_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(reference, "prepare_w4", lambda *_: pytest.fail("the slow way"))
    for fmt in FORMATS:
        packed, scale = reference.quantize_group(data.gaussian((16, 256)), fmt)
        ops.prepare_w4(packed, scale, fmt, 256)


def test_a_group_whose_scale_is_nan_is_nan(device):
    packed, scale = reference.quantize_group(data.gaussian((16, 256)).to(device), GroupInt(4, 128))
    scale[3, 1] = torch.nan
    weight = ops.prepare_w4(packed, scale, GroupInt(4, 128), 256)
    for dtype in (torch.float32, torch.bfloat16):
        found = ops.dequantize_w4(weight, dtype)
        assert bool(found[3, 128:].isnan().all())
        assert int(found.isnan().sum()) == 128


def test_refusals_are_those_of_the_reference():
    packed, scale = reference.quantize_group(data.gaussian((16, 128)), GroupInt(4, 128))
    for column, code in ((0, 0x08), (5, 0x80), (63, 0x88)):
        wrong = packed.clone()
        wrong[2, column] = code
        with pytest.raises(BlockscaleError, match="prepare_w4: packed: a code of -8"):
            ops.prepare_w4(wrong, scale, GroupInt(4, 128), 128)
    with pytest.raises(BlockscaleError, match="no W4A8 format"):
        ops.prepare_w4(packed, scale, GroupInt(4, 64), 128)
    with pytest.raises(BlockscaleError, match="packed: wrong shape"):
        ops.prepare_w4(packed, scale, GroupInt(4, 128), 256)
    bad = torch.full((16, 4), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(BlockscaleError, match="NaN among the scales"):
        ops.prepare_w4(packed, bad, MXFP4(), 128)
