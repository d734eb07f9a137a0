"""Formats below 8 bits: the reference against oracles in NumPy and ml_dtypes that share no code with it."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockscale import reference
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.group_formats import MXFP4, NVFP4, GroupInt
from blockscale.metrics import relative_error
from blockscale.reference.fp4 import quantize_mxfp4
from blockscale.reference.int4 import dequantize_int, quantize_int
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal, assert_unbiased

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = [
    GroupInt(bits, group_size, scale_fmt)
    for bits, group_size, scale_fmt in [(4, 128, "bf16"), (4, 32, "ue8m0"), (3, 64, "bf16"), (3, 32, "ue8m0")]
]
FORMATS = [*INTEGERS, MXFP4()]


def oracle(x, fmt):
    """(codes, scales as float32), a group at a time; the power of two comes from frexp."""
    values = x.to(torch.float32).numpy()
    rows = values.reshape(-1, values.shape[-1])
    groups = -(-rows.shape[1] // fmt.group_size)
    codes, scales = np.empty(rows.shape, np.int64), np.empty((len(rows), groups), np.float32)
    for row, group in np.ndindex(scales.shape):
        at = row, slice(group * fmt.group_size, (group + 1) * fmt.group_size)
        amax = np.abs(rows[at]).max()
        scale = max(amax / np.float32(fmt.largest), np.float32(2.0**-126)) if amax > 0 else np.float32(1)
        if fmt.scale_fmt == "ue8m0":
            mantissa, exponent = math.frexp(float(scale))
            scale = np.float32(math.ldexp(1.0, exponent - (mantissa == 0.5)))
        else:
            scale = np.float32(ml_dtypes.bfloat16(scale))
        scales[row, group] = scale
        quotient = rows[at] / scale
        if isinstance(fmt, GroupInt):
            codes[at] = np.clip(np.rint(quotient), -fmt.largest, fmt.largest)
        else:
            codes[at] = np.clip(quotient, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    shape = (*x.shape[:-1], groups)
    return torch.from_numpy(codes).reshape(x.shape), torch.from_numpy(scales).reshape(shape)


def assert_equals_the_oracle(x, fmt):
    codes, scale = quantize_int(x, fmt) if isinstance(fmt, GroupInt) else quantize_mxfp4(x)
    expected = oracle(x, fmt)
    assert scale.dtype == fmt.scale_dtype
    assert_bitwise_equal(scale.float(), expected[1], "scale")
    assert_bitwise_equal(codes.long() & 15, expected[0] & 15, "codes")
    return codes, scale


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 576), (2, 13, 200), (5, 31), (3, 1)], ids=str)
def test_codes_and_scales_equal_the_oracle(shape, dtype, fmt):
    assert_equals_the_oracle(data.wide_range(shape, dtype), fmt)


@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 150)),
    fmt=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    maker=st.sampled_from([data.gaussian, data.wide_range, data.denormals, data.huge]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80)
def test_any_weight_equals_the_oracle(shape, fmt, dtype, maker, seed):
    x = maker(shape, dtype, seed=seed)
    _, scale = assert_equals_the_oracle(x, fmt)
    assert bool((scale.float() >= 2.0**-126).all())
    assert bool(scale.float().isfinite().all())


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
def test_integer_ties_go_to_the_even_code(fmt):
    half = torch.arange(fmt.largest) + 0.5
    x = torch.cat([half, -half, torch.tensor([float(fmt.largest)])]).unsqueeze(0)
    codes, scale = quantize_int(x, fmt)
    even = (torch.arange(fmt.largest) + 1) // 2 * 2
    assert scale.float().tolist() == [[1.0]]
    assert codes[0, :-1].tolist() == [*even.tolist(), *(-even).tolist()]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_group_of_zeros_has_scale_one_and_zero_codes(fmt):
    x = data.gaussian((2, 256))
    x[:, :128] = 0
    packed, scale = reference.quantize_group(x, fmt)
    groups = 128 // fmt.group_size
    assert set(scale[:, :groups].float().flatten().tolist()) == {1.0}
    back = reference.dequantize_group(packed, scale, fmt, 256)
    assert set(back[:, :128].flatten().tolist()) == {0.0}


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_a_scale_to_bf16_saturates_nothing(bits):
    """The quotient of amax gets to 7 * (1 + 2**-8) at most, which rounds to 7 all the same."""
    fmt = GroupInt(bits)
    amax = torch.ldexp(1 + torch.arange(1 << 16) / 65536, torch.tensor(3)).unsqueeze(1)
    codes, scale = quantize_int(amax, fmt)
    quotient = amax / scale.float()
    assert set(codes.flatten().tolist()) == {fmt.largest}
    assert fmt.largest * (1 + 2.0**-9) < float(quotient.max()) <= fmt.largest * (1 + 2.0**-8)
    assert float((codes * scale.float() - amax).abs().div(scale.float()).max()) < 2.0**-5


@pytest.mark.parametrize("fmt", [GroupInt(4, 32, "ue8m0"), GroupInt(3, 32, "ue8m0")], ids=str)
def test_a_power_of_two_scale_is_never_below_the_exact_one(fmt):
    x = data.wide_range((64, 256), torch.float32)
    amax = x.view(64, -1, 32).abs().amax(-1)
    _, scale = quantize_int(x, fmt)
    assert bool((scale.float() * fmt.largest >= amax).all())
    assert bool((scale.float() * fmt.largest < 2 * amax * (1 + 2.0**-20)).all())


def test_no_mxfp4_value_is_off_by_more_than_a_scale():
    x = data.gaussian((256, 1024), torch.float32)
    packed, scale = reference.quantize_group(x, MXFP4())
    back = reference.dequantize_group(packed, scale, MXFP4(), 1024, torch.float32)
    error = (back - x).abs() / scale.float().repeat_interleave(32, dim=1)
    assert float(error.max()) <= 1.0
    saturated = x.abs() > 6 * scale.float().repeat_interleave(32, dim=1)
    assert 0 < int(saturated.sum()) < x.numel() // 50


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_power_of_two_scales_dequantize_to_bf16_exactly_and_again_to_the_same(fmt):
    x = data.gaussian((16, 256), torch.float32)
    packed, scale = reference.quantize_group(x, fmt)
    back = reference.dequantize_group(packed, scale, fmt, 256, torch.float32)
    if fmt.scale_fmt == "ue8m0":
        assert torch.equal(reference.dequantize_group(packed, scale, fmt, 256).float(), back)
    if isinstance(fmt, GroupInt) and fmt.scale_fmt == "bf16":
        again = reference.quantize_group(back, fmt)
        assert_bitwise_equal(again[0], packed)
        assert_bitwise_equal(again[1], scale)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rounding_is_unbiased(fmt):
    x = torch.randn((512, 1024), generator=torch.Generator().manual_seed(0))
    back = reference.dequantize_group(*reference.quantize_group(x, fmt), fmt, 1024, torch.float32)
    assert_unbiased(back, x)


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (GroupInt(4, 128), 0.1173),
        (GroupInt(4, 64), 0.1076),
        (GroupInt(4, 32), 0.0970),
        (GroupInt(4, 128, "ue8m0"), 0.1562),
        (GroupInt(3, 128), 0.2738),
        (MXFP4(), 0.1119),
    ],
    ids=str,
)
def test_the_error_of_gaussian_weights_is_the_known_one(fmt, expected):
    x = torch.randn((1024, 1024), generator=torch.Generator().manual_seed(0))
    back = reference.dequantize_group(*reference.quantize_group(x, fmt), fmt, 1024, torch.float32)
    assert relative_error(back, x) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_weight_is_refused_with_count_and_position(value, fmt):
    x = data.gaussian((2, 13, 300))
    x[1, 12, 7] = value
    x[1, 12, 299] = value
    with pytest.raises(NonFiniteError) as caught:
        reference.quantize_group(x, fmt)
    assert (caught.value.count, caught.value.position) == (2, (1, 12, 7))


_BAD_CALLS = {
    "weight: bad dtype": lambda: reference.quantize_group(torch.zeros((4, 4), dtype=torch.int8), MXFP4()),
    "weight: wrong shape": lambda: reference.quantize_group(torch.zeros(4), GroupInt()),
    "cannot quantize to this format": lambda: reference.quantize_group(torch.zeros(4, 4), NVFP4()),
    "dequantize_int: codes: bad dtype": lambda: dequantize_int(
        torch.zeros(4, 64), torch.ones(4, 1), GroupInt()
    ),
}


@pytest.mark.parametrize("message", _BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(BlockscaleError, match=message):
        _BAD_CALLS[message]()
