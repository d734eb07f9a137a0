"""Formats below 8 bits: what a format may be, and how many bytes and scales a weight has in it."""

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.group_formats import (
    E2M1_VALUES,
    MXFP4,
    NVFP4,
    GroupInt,
    group_scale_shape,
    packed_shape,
    packed_width,
)


@pytest.mark.parametrize(
    ("shape", "fmt", "packed", "scales"),
    [
        ((2048, 7168), GroupInt(), (2048, 3584), (2048, 56)),
        ((256, 2048, 7168), GroupInt(4, 32), (256, 2048, 3584), (256, 2048, 224)),
        ((2048, 7168), GroupInt(3), (2048, 2688), (2048, 56)),
        ((576, 575), MXFP4(), (576, 288), (576, 18)),
        ((5, 9), GroupInt(3), (5, 6), (5, 1)),
        ((5, 1), NVFP4(), (5, 1), (5, 1)),
        ((5, 40), NVFP4(), (5, 20), (5, 3)),
        ((0, 8), GroupInt(3), (0, 3), (0, 1)),
        ((8, 0), GroupInt(), (8, 0), (8, 0)),
    ],
)
def test_shapes(shape, fmt, packed, scales):
    assert packed_shape(shape, fmt) == packed
    assert group_scale_shape(shape, fmt) == scales


@pytest.mark.parametrize(
    ("bits", "widths"), [(4, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]), (3, [0, 3, 3, 3, 3, 3, 3, 3, 3, 6])]
)
def test_bytes_of_rows_of_zero_to_nine_codes(bits, widths):
    assert [packed_width(width, bits) for width in range(10)] == widths


def test_what_a_format_says_of_itself():
    assert GroupInt() == GroupInt(4, 128, "bf16")
    assert (GroupInt(4).largest, GroupInt(3).largest) == (7, 3)
    assert GroupInt().scale_dtype == torch.bfloat16
    assert GroupInt(scale_fmt="ue8m0").scale_dtype == MXFP4().scale_dtype == torch.float8_e8m0fnu
    assert E2M1_VALUES == (0, 0.5, 1, 1.5, 2, 3, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 2}, r"GroupInt: bits: bad value \(expected 4 | 3, got 2\)"),
        ({"bits": True}, "bits: bad value"),
        ({"group_size": 16}, r"group_size: bad value \(expected 32 | 64 | 128, got 16\)"),
        ({"scale_fmt": "float32"}, r"scale_fmt: bad value \(expected bf16 | ue8m0, got 'float32'\)"),
    ],
)
def test_other_formats_are_refused(arguments, message):
    with pytest.raises(BlockscaleError, match=message.replace("|", r"\|")):
        GroupInt(**arguments)
