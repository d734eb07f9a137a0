"""The reference against an oracle that shares no code with it: NumPy for scales, ml_dtypes for codes."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockscale import reference
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.reference.fp8 import _to_e4m3
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal, assert_quantized_equal, assert_unbiased

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_FMTS = ("float32", "ue8m0")


def oracle_quantize(x, block_size, scale_fmt, amax_floor=0.0, min_scale=2.0**-126):
    """Block by block, in NumPy; the power of two comes from frexp."""
    values = x.to(torch.float32).numpy()
    matrices = values.reshape(-1, *values.shape[-2:])
    (n, k), (block_n, block_k) = values.shape[-2:], block_size
    codes = np.empty(matrices.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty((len(matrices), -(-n // block_n), -(-k // block_k)), np.float32)
    for e, i, j in np.ndindex(scales.shape):
        at = e, slice(i * block_n, (i + 1) * block_n), slice(j * block_k, (j + 1) * block_k)
        amax = max(np.abs(matrices[at]).max(), np.float32(amax_floor))
        scale = max(amax / np.float32(448), np.float32(min_scale)) if amax > 0 else np.float32(1)
        if scale_fmt == "ue8m0":
            mantissa, exponent = math.frexp(float(scale))
            scale = np.float32(math.ldexp(1.0, exponent - (mantissa == 0.5)))
        scales[e, i, j] = scale
        codes[at] = np.clip(matrices[at] / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    as_codes = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn).reshape(x.shape)
    return as_codes, torch.from_numpy(scales).reshape(*x.shape[:-2], *scales.shape[1:])


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((256, 384), (128, 128)),
        ((300, 576), (128, 128)),
        ((2, 130, 200), (128, 128)),
        ((64, 96), (32, 32)),
        ((7, 300), (1, 128)),
        ((101, 61), (100, 60)),
        ((5, 3), (128, 128)),
        ((6, 6), (1, 1)),
    ],
)
def test_codes_and_scales_equal_the_oracle(shape, block_size, dtype, scale_fmt):
    x = data.wide_range(shape, dtype)
    got = reference.quantize_weight(x, block_size, scale_fmt)
    assert_quantized_equal(got, oracle_quantize(x, block_size, scale_fmt))


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 90)),
    block_size=st.tuples(st.sampled_from([1, 7, 16, 32, 128]), st.sampled_from([1, 13, 32, 128])),
    dtype=st.sampled_from(DTYPES),
    scale_fmt=st.sampled_from(SCALE_FMTS),
    maker=st.sampled_from([data.gaussian, data.wide_range, data.denormals, data.huge]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_any_weight_equals_the_oracle_and_has_no_nan_code(shape, block_size, dtype, scale_fmt, maker, seed):
    x = maker(shape, dtype, seed=seed)
    codes, scale = reference.quantize_weight(x, block_size, scale_fmt)
    assert_quantized_equal((codes, scale), oracle_quantize(x, block_size, scale_fmt))
    assert not bool(codes.to(torch.float32).isnan().any())
    assert bool(scale.isfinite().all())


@pytest.mark.parametrize("mantissa", range(0, 128, 7))
@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
def test_every_bf16_value_equals_the_oracle(mantissa, scale_fmt):
    every = data.all_bf16()
    amax = torch.tensor([0x4300 + mantissa], dtype=torch.uint16).view(torch.bfloat16)
    x = every[every.abs() <= amax].unsqueeze(0)
    block = (1, x.shape[1])
    got = reference.quantize_weight(x, block, scale_fmt)
    assert_quantized_equal(got, oracle_quantize(x, block, scale_fmt))


def test_ties_round_to_the_even_code():
    codes, scale = reference.quantize_weight(data.e4m3_ties(), (1, 1024))
    lower = torch.arange(0x7E, dtype=torch.uint8)
    even = lower + (lower & 1)
    assert scale.item() == 1.0
    assert_bitwise_equal(codes[0, :0x7E].view(torch.uint8), even)
    assert_bitwise_equal(codes[0, 0x7E:-1].view(torch.uint8), even | 0x80)


def test_around_the_448_boundary():
    x = data.e4m3_boundary()
    codes, scale = reference.quantize_weight(x, (1, 1024))
    # One ulp below 416, 432, 448; the points; one ulp above 416, 432. The tie at 432 goes to the even code.
    expected = torch.tensor([416.0, 416, 448, 416, 448, 448, 416, 448])
    assert scale.item() == 1.0
    assert torch.equal(codes.to(torch.float32)[0], torch.cat([expected, -expected]))


def test_the_conversion_saturates_where_a_cast_may_give_nan():
    # No finite input gets here past 448 (1 + 2**-24); a scale that comes from elsewhere may push it further.
    got = _to_e4m3(torch.tensor([464.0, 480.0, 1e30, math.inf, -math.inf]))
    assert got.to(torch.float32).tolist() == [448.0] * 4 + [-448.0]


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
def test_a_zero_block_has_scale_one_and_keeps_its_signs(scale_fmt):
    x = data.zero_block((256, 256), (128, 128))
    codes, scale = reference.quantize_weight(x, scale_fmt=scale_fmt)
    assert scale[0, 0] == 1.0
    corner = codes[:128, :128].view(torch.uint8)
    assert set(corner[:, ::2].unique().tolist()) == {0}
    assert set(corner[:, 1::2].unique().tolist()) == {0x80}
    assert bool((scale[1:] != 1.0).all())


def test_tiny_weights_keep_their_precision():
    x = data.gaussian((128, 128), torch.float32)
    small = x * 2.0**-60
    codes, scale = reference.quantize_weight(x)
    small_codes, small_scale = reference.quantize_weight(small)
    assert_bitwise_equal(small_codes, codes)
    assert_bitwise_equal(small_scale, scale * 2.0**-60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_smallest_scale_is_a_normal_number(dtype):
    _, scale = reference.quantize_weight(data.denormals((64, 64), dtype), (8, 8))
    assert bool((scale >= 2.0**-126).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_top_of_the_range_survive_float32_scales(dtype):
    x = data.huge((64, 64), dtype)
    back = reference.dequantize_weight(*reference.quantize_weight(x, (32, 32)), (32, 32), torch.float32)
    assert bool(back.isfinite().all())
    assert bool(((back - x.float()).abs() <= x.float().abs() / 16 + back.abs().max() * 2.0**-17).all())


def test_ue8m0_scales_are_powers_of_two_and_never_below_the_float32_scale():
    x = data.wide_range((128, 256), torch.float32)
    _, exact = reference.quantize_weight(x, (8, 8), "float32")
    _, rounded = reference.quantize_weight(x, (8, 8), "ue8m0")
    assert bool(reference.is_power_of_two(rounded).all())
    assert bool((rounded >= exact).all())
    assert bool((rounded < 2 * exact).all())


def test_rounding_up_is_exact_one_ulp_around_every_power_of_two():
    below, exact, above = data.around_powers_of_two()
    assert_bitwise_equal(reference.round_up_to_power_of_two(below), exact)
    assert_bitwise_equal(reference.round_up_to_power_of_two(exact), exact)
    assert_bitwise_equal(reference.round_up_to_power_of_two(above), 2 * exact)


def test_rounding_up_keeps_what_is_not_finite():
    got = reference.round_up_to_power_of_two(torch.tensor([math.inf, math.nan, 3.0]))
    assert got[0] == math.inf
    assert math.isnan(got[1])
    assert got[2] == 4.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_power_of_two(dtype):
    values = torch.tensor([1.0, 0.5, 2.0**-130, 3.0, 0.0, -2.0, math.inf, math.nan], dtype=dtype)
    assert reference.is_power_of_two(values).tolist() == [True, True, True] + [False] * 5


@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    block_size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    maker=st.sampled_from([data.gaussian, data.wide_range]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_bf16_to_fp8_and_back_and_again_keeps_the_codes(shape, block_size, maker, seed):
    x = maker(shape, torch.bfloat16, seed=seed)
    first = reference.quantize_weight(x, block_size)
    again = reference.quantize_weight(reference.dequantize_weight(*first, block_size), block_size)
    assert_bitwise_equal(again[0], first[0], "codes")


@given(seed=st.integers(0, 1000), maker=st.sampled_from([data.gaussian, data.wide_range]))
@settings(max_examples=20)
def test_ue8m0_to_bf16_is_exact(seed, maker):
    quantized = reference.quantize_weight(maker((40, 70), torch.float32, seed=seed), (16, 16), "ue8m0")
    exact = reference.dequantize_weight(*quantized, (16, 16), torch.float32)
    assert torch.equal(reference.dequantize_weight(*quantized, (16, 16)).float(), exact)


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
def test_rounding_is_unbiased(scale_fmt):
    x = data.gaussian((1024, 1024), torch.float32)
    back = reference.dequantize_weight(
        *reference.quantize_weight(x, scale_fmt=scale_fmt), dtype=torch.float32
    )
    assert_unbiased(back, x)


def test_bias_would_be_noticed():
    x = data.gaussian((1024, 1024), torch.float32)
    back = reference.dequantize_weight(*reference.quantize_weight(x), dtype=torch.float32)
    with pytest.raises(AssertionError, match="standard errors from zero"):
        assert_unbiased(back + 1e-5, x)


@pytest.mark.parametrize(
    ("scale_fmt", "expected"), [("float32", 0.026), ("ue8m0", 0.0265)], ids=["float32", "ue8m0"]
)
def test_the_error_of_gaussian_weights_is_the_known_one(scale_fmt, expected):
    from blockscale.metrics import relative_error

    x = torch.randn((512, 512), generator=torch.Generator().manual_seed(0))
    back = reference.dequantize_weight(
        *reference.quantize_weight(x, scale_fmt=scale_fmt), dtype=torch.float32
    )
    assert relative_error(back, x) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_dequantize_rounds_the_float32_product_once(dtype, scale_dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(4, 1)
    scale = torch.tensor([[0.75, 1.3, 2.0**-130, 1e-3], [2.0**10, 3e-5, 448.0, 1.0]]).to(scale_dtype)
    product = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    product = product * np.kron(scale.to(torch.float32).numpy(), np.ones((2, 64), np.float32))
    with np.errstate(over="ignore"):
        narrow = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}.get(dtype, np.float32)
        expected = torch.from_numpy(product.astype(narrow).astype(np.float32))
    got = reference.dequantize_weight(codes, scale, (2, 64), dtype)
    assert got.dtype == dtype
    assert torch.equal(got.float().nan_to_num(nan=1e30), expected.nan_to_num(nan=1e30))
    assert set(got.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[got.isnan()].tolist()) == {
        {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}[dtype]
    }


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 130, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_weights_have_empty_results(shape):
    codes, scale = reference.quantize_weight(torch.empty(shape, dtype=torch.bfloat16))
    assert codes.shape == shape
    assert scale.numel() == 0
    assert reference.dequantize_weight(codes, scale).shape == shape


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_weight_is_refused_with_count_and_position(value):
    x = data.gaussian((2, 130, 300))
    x[1, 129, 7] = value
    x[1, 129, 299] = value
    with pytest.raises(NonFiniteError) as caught:
        reference.quantize_weight(x)
    assert (caught.value.count, caught.value.position) == (2, (1, 129, 7))


def test_find_nonfinite_knows_the_one_nan_of_e4m3():
    codes = torch.tensor([0x7E, 0x7F, 0x80, 0xFF, 0xFE], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert reference.find_nonfinite(codes) == (2, 1)
    assert reference.find_nonfinite(codes[:1]) == (0, -1)
    assert reference.find_nonfinite(codes[:0]) == (0, -1)


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group_size"), [((5, 256), 128), ((3, 4, 300), 128), ((70,), 32)])
def test_activations_equal_the_oracle_with_the_floor(shape, group_size, dtype, scale_fmt):
    x = data.wide_range(shape, dtype)
    x[..., :group_size] *= 1e-3  # below the floor
    codes, scale = reference.quantize_activation(x, group_size, scale_fmt)
    rows = x.reshape(-1, shape[-1])
    expected = oracle_quantize(rows, (1, group_size), scale_fmt, amax_floor=1e-4)
    assert scale.shape == (*shape[:-1], -(-shape[-1] // group_size))
    assert_quantized_equal((codes.reshape(rows.shape), scale.reshape(expected[1].shape)), expected)
    back = reference.dequantize_activation(codes, scale, group_size, torch.float32)
    assert_bitwise_equal(
        back.reshape(rows.shape), reference.dequantize_weight(*expected, (1, group_size), torch.float32)
    )


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
def test_non_finite_activations_make_the_scale_of_their_group_non_finite(scale_fmt):
    x = torch.ones(3, 256)
    x[1, 3], x[1, 4] = -math.inf, -1
    x[2, 130], x[2, 131] = -math.nan, math.inf
    codes, scale = reference.quantize_activation(x, 128, scale_fmt)
    assert scale.isfinite().tolist() == [[True, True], [False, True], [True, False]]
    assert scale[1, 0] == math.inf
    assert math.isnan(scale[2, 1])
    assert codes[1, 2:5].view(torch.uint8).tolist() == [0, 0x7F, 0x80]
    assert set(codes[2, 128:].view(torch.uint8).tolist()) == {0x7F}
    assert not bool(reference.dequantize_activation(codes, scale)[1, :128].isfinite().any())


_CODES = torch.zeros((4, 4), dtype=torch.float8_e4m3fn)
_BAD_CALLS = {
    "weight: bad dtype": lambda: reference.quantize_weight(torch.zeros((4, 4), dtype=torch.float64)),
    "weight: wrong shape": lambda: reference.quantize_weight(torch.zeros(4)),
    "bad block size": lambda: reference.quantize_weight(torch.zeros(4, 4), (0, 128)),
    "unknown scale_fmt": lambda: reference.quantize_weight(torch.zeros(4, 4), scale_fmt="e5m2"),
    "codes: bad dtype": lambda: reference.dequantize_weight(torch.zeros(4, 4), torch.ones(1, 1)),
    "scale: bad dtype": lambda: reference.dequantize_weight(_CODES, torch.ones((1, 1), dtype=torch.int32)),
    r"scale: wrong shape \(expected \[1, 1\], got \[2, 1\]\)": lambda: reference.dequantize_weight(
        _CODES, torch.ones(2, 1)
    ),
    "dtype: bad dtype": lambda: reference.dequantize_weight(_CODES, torch.ones(1, 1), dtype=torch.int8),
    "x: wrong shape": lambda: reference.quantize_activation(torch.ones(())),
    "bad group size": lambda: reference.quantize_activation(torch.ones(4), 0),
    "dequantize_activation: scale: wrong shape": lambda: reference.dequantize_activation(
        _CODES, torch.ones(4, 2)
    ),
    "find_nonfinite: x: bad dtype": lambda: reference.find_nonfinite(torch.ones(3, dtype=torch.int8)),
}


@pytest.mark.parametrize("message", _BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(BlockscaleError, match=message):
        _BAD_CALLS[message]()
