"""The fused references against PyTorch's own operations and Hugging Face's formulas."""

import math

import numpy as np
import pytest
import torch

from blockscale import reference
from blockscale.errors import BlockscaleError
from blockscale.reference import fused
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal, assert_quantized_equal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def every(dtype):
    """Every number of a 16-bit dtype, NaN and Inf too."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def ulps(got, truth):
    """Distance to a float64 truth in ulps of the float32 numbers about it."""
    exponent = torch.frexp(truth.abs().clamp_min(2.0**-126)).exponent
    return (got.double() - truth).abs() / torch.ldexp(torch.ones_like(truth), exponent - 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_is_within_two_ulps_for_every_16_bit_number(dtype):
    x = every(dtype).float()
    x = x[x.abs() <= 87]
    assert float(ulps(fused.silu(x), x.double() / (1 + (-x.double()).exp())).max()) < 2
    torch.testing.assert_close(fused.silu(x), torch.nn.functional.silu(x), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, 55296396376183), (torch.float16, 90198201848517)]
)
def test_silu_has_the_bits_of_fused_multiply_adds(dtype, expected):
    # The sum of all results' bits, from a C program with fmaf.
    x = every(dtype).float()
    bits = fused.silu(x[x.abs() <= 87]).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    assert int(bits.sum()) == expected


def test_silu_at_its_limits():
    x = torch.tensor([0.0, -0.0, 88.0, 1e30, math.inf, -88.0, -1e30, -math.inf, math.nan])
    expected = torch.tensor([0.0, -0.0, 88.0, 1e30, math.inf, -0.0, -0.0, math.nan, math.nan])
    got = fused.silu(x)
    assert torch.equal(got.isnan(), expected.isnan())
    assert_bitwise_equal(got[:7], expected[:7])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_rounds_the_float32_product_once(dtype):
    x = torch.randn((50, 400), generator=torch.Generator().manual_seed(0)).to(dtype)
    gate, up = x.float()[:, :200], x.float()[:, 200:]
    assert_bitwise_equal(fused.silu_mul(x), (fused.silu(gate) * up).to(dtype))
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(fused.silu_mul(x), expected.to(dtype))


def hugging_face_norm(x, weight, eps):
    hidden = x.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return weight * (hidden * torch.rsqrt(variance + eps)).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_that_of_hugging_face(dtype):
    x, weight = data.gaussian((64, 576), dtype), (1 + data.gaussian((576,), torch.float32)).to(dtype)
    got, expected = fused.rms_norm(x, weight), hugging_face_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    # The last bit of the sum and of rsqrt differ; rarely does that show in 16 bits.
    torch.testing.assert_close(got, expected)
    if dtype != torch.float32:
        assert float((got != expected).float().mean()) < 1e-3


def test_rms_norm_has_the_bits_of_hugging_face_where_nothing_is_rounded_in_between():
    x = torch.tensor([[3.0, -3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]).bfloat16()
    weight = torch.tensor([1.0, 0.5, 3.0, -2.0]).bfloat16()
    assert_bitwise_equal(fused.rms_norm(x, weight, 0.0)[0], torch.tensor([1.0, -0.5, 3.0, -2.0]).bfloat16())
    assert_bitwise_equal(fused.rms_norm(x, weight, 1.0)[2], hugging_face_norm(x, weight, 1.0)[2])
    assert bool(fused.rms_norm(x, weight, 0.0)[1].isnan().all())
    assert fused.rms_norm(x, weight, 1e-6)[1].tolist() == [0.0, 0.0, 0.0, -0.0]


@pytest.mark.parametrize("maker", [data.gaussian, data.wide_range])
def test_rms_norm_equals_numpy_where_the_sum_is_exact_enough(maker):
    x, weight = maker((200, 1000), torch.float32), 1 + data.gaussian((1000,), torch.float32)
    wide = x.numpy().astype(np.float64)
    variance = np.square(wide).sum(-1, keepdims=True).astype(np.float32) / np.float32(1000)
    factor = np.float32(1) / np.sqrt(variance + np.float32(1e-6))
    assert_bitwise_equal(fused.rms_norm(x, weight), torch.from_numpy(x.numpy() * factor * weight.numpy()))


def test_the_order_of_the_values_does_not_change_the_norm():
    x = data.wide_range((20, 4096), torch.bfloat16)
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(4096, dtype=torch.bfloat16)
    assert_bitwise_equal(fused.rms_norm(x[:, order], weight), fused.rms_norm(x, weight)[:, order])


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chains_end_in_quantize_activation(dtype, layout, scale_fmt):
    x, residual = data.gaussian((2, 9, 300), dtype), data.gaussian((2, 9, 300), dtype, seed=1)
    weight = (1 + data.gaussian((300,), torch.float32)).to(dtype)
    got = fused.silu_mul_quantize(x, 64, scale_fmt, layout)
    assert_quantized_equal(got, reference.quantize_activation(fused.silu_mul(x), 64, scale_fmt))
    assert got[1].stride()[-1] == (1 if layout == "row" else 20)
    got = fused.rms_norm_quantize(x, weight, 1e-5, 64, scale_fmt, residual, layout)
    hidden = x + residual
    assert_bitwise_equal(got[2], hidden)
    expected = reference.quantize_activation(fused.rms_norm(hidden, weight, 1e-5), 64, scale_fmt)
    assert_quantized_equal(got[:2], expected)
    assert len(fused.rms_norm_quantize(x, weight)) == 2


_X = torch.zeros((4, 6), dtype=torch.bfloat16)
_BAD_CALLS = {
    "silu_mul: x: wrong shape .*gate and up": lambda: fused.silu_mul(_X[:, :5]),
    "silu_mul: x: bad dtype": lambda: fused.silu_mul(_X.double()),
    "rms_norm: weight: bad dtype": lambda: fused.rms_norm(_X, torch.ones(6)),
    r"rms_norm: weight: wrong shape \(expected \[6\], got \[5\]\)": lambda: fused.rms_norm(_X, _X[0, :5]),
    "rms_norm_quantize: residual: wrong shape": lambda: fused.rms_norm_quantize(_X, _X[0], residual=_X[:2]),
    "rms_norm_quantize: residual: on another device": lambda: fused.rms_norm_quantize(
        _X, _X[0], residual=_X.to("meta")
    ),
    "bad group size": lambda: fused.silu_mul_quantize(_X, 0),
}


@pytest.mark.parametrize("message", _BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(BlockscaleError, match=message):
        _BAD_CALLS[message]()
