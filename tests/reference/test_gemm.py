"""The reference GEMMs against an oracle that shares no code with them: NumPy float64, ml_dtypes codes."""

import ml_dtypes
import numpy as np
import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.reference import gemm, quantize_activation, quantize_weight
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal


def operands(m, n, k, experts=None, seed=0):
    """(a, a_scale, b, b_scale); with experts, b is (E, N, K)."""
    lead = () if experts is None else (experts,)
    a = quantize_activation(data.gaussian((m, k), seed=seed))
    return *a, *quantize_weight(data.gaussian((*lead, n, k), seed=seed + 1))


def values(codes):
    """float64 NumPy array of E4M3 codes."""
    return codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def oracle(a, a_scale, b, b_scale):
    """(M, N) in float64."""
    k, n = a.shape[1], b.shape[0]
    rows = values(a) * np.repeat(a_scale.numpy().astype(np.float64), 128, axis=1)[:, :k]
    blocks = np.repeat(np.repeat(b_scale.numpy().astype(np.float64), 128, axis=0), 128, axis=1)
    return rows @ (values(b) * blocks[:n, :k]).T


def assert_close(got, expected):
    """Every row within float32 rounding of a sum, relative to the largest value of the row."""
    limit = 1e-5 * np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(got.numpy().astype(np.float64) - expected) <= limit).all()


@pytest.mark.parametrize(("m", "n", "k"), [(7, 256, 256), (130, 576, 576), (1, 16, 16), (3, 144, 1040)])
def test_dense_equals_the_oracle(m, n, k):
    quantized = operands(m, n, k)
    got = gemm.fp8_gemm_nt(*quantized, out_dtype=torch.float32)
    assert_close(got, oracle(*quantized))


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_the_sum_with_bias_is_rounded_once(bias_dtype):
    quantized, bias = operands(5, 32, 144), data.gaussian((32,), bias_dtype)
    exact = gemm.fp8_gemm_nt(*quantized, out_dtype=torch.float32)
    got = gemm.fp8_gemm_nt(*quantized, bias=bias)
    assert_bitwise_equal(got, (exact + bias.float()).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_out_is_written_and_returned(dtype):
    quantized = operands(5, 32, 144)
    out = torch.full((5, 32), torch.nan, dtype=dtype)
    assert gemm.fp8_gemm_nt(*quantized, out_dtype=dtype, out=out) is out
    assert_bitwise_equal(out, gemm.fp8_gemm_nt(*quantized, out_dtype=dtype))


def test_no_rows_give_no_rows():
    assert gemm.fp8_gemm_nt(*operands(0, 32, 144)).shape == (0, 32)
    indices = torch.empty(0, dtype=torch.int32)
    assert gemm.m_grouped_fp8_gemm_nt_contiguous(*operands(0, 32, 144, 2), indices).shape == (0, 32)


def test_scales_of_any_strides_count_as_their_values():
    a, a_scale, b, b_scale = operands(5, 32, 272)
    column_major = a_scale.t().contiguous().t()
    got = gemm.fp8_gemm_nt(a, column_major, b, b_scale)
    assert_bitwise_equal(got, gemm.fp8_gemm_nt(a, a_scale, b, b_scale))


def test_contiguous_rows_meet_their_own_expert_and_padding_gives_zeros():
    a, a_scale, b, b_scale = operands(384, 32, 144, experts=4)
    a.view(torch.uint8)[200:256] = 0x7F  # padding may hold anything, NaN too
    indices = torch.full((384,), -1, dtype=torch.int32)
    indices[:128], indices[128:200] = 3, 1
    out = torch.full((384, 32), torch.nan)
    got = gemm.m_grouped_fp8_gemm_nt_contiguous(a, a_scale, b, b_scale, indices, out=out)
    assert_close(got[:128], oracle(a[:128], a_scale[:128], b[3], b_scale[3]))
    assert_close(got[128:200], oracle(a[128:200], a_scale[128:200], b[1], b_scale[1]))
    assert bool((got[200:] == 0).all())


def test_masked_writes_the_rows_that_count_and_no_others():
    b, b_scale = operands(1, 32, 144, experts=3)[2:]
    a, a_scale = quantize_activation(data.gaussian((3, 10, 144)))
    out = torch.full((3, 10, 32), torch.nan)
    counts = [0, 10, 3]
    got = gemm.m_grouped_fp8_gemm_nt_masked(
        a, a_scale, b, b_scale, torch.tensor(counts, dtype=torch.int32), 4, out=out
    )
    for expert, count in enumerate(counts):
        part = a[expert, :count], a_scale[expert, :count], b[expert], b_scale[expert]
        if count:
            assert_close(got[expert, :count], oracle(*part))
        assert bool(got[expert, count:].isnan().all())


def dense(*, m=4, n=32, k=144, **changes):
    names = ("a", "a_scale", "b", "b_scale")
    arguments = {**dict(zip(names, operands(m, n, k), strict=True)), **changes}
    return gemm.fp8_gemm_nt(*[arguments.pop(name) for name in names], **arguments)


def contiguous(*, m=128, **changes):
    names = ("a", "a_scale", "b", "b_scale", "m_indices")
    indices = torch.zeros(m, dtype=torch.int32)
    arguments = {**dict(zip(names, (*operands(m, 32, 144, 2), indices), strict=True)), **changes}
    return gemm.m_grouped_fp8_gemm_nt_contiguous(*[arguments.pop(name) for name in names], **arguments)


def masked(*, experts=2, **changes):
    names = ("a", "a_scale", "b", "b_scale", "masked_m", "expected_m")
    rows = quantize_activation(data.gaussian((experts, 4, 144)))
    weights = operands(1, 32, 144, 2)[2:]
    arguments = dict(zip(names, (*rows, *weights, torch.ones(2, dtype=torch.int32), 1), strict=True))
    arguments |= changes
    return gemm.m_grouped_fp8_gemm_nt_masked(*[arguments.pop(name) for name in names], **arguments)


_CODES = torch.zeros((4, 144), dtype=torch.float8_e4m3fn)
_BAD_CALLS = {
    "fp8_gemm_nt: a: bad dtype": lambda: dense(a=torch.zeros(4, 144)),
    r"a: wrong shape \(expected \(M, K\), got \[144\]\)": lambda: dense(a=_CODES[0]),
    r"a: wrong shape \(expected \[4, 144\], got \[4, 128\]\)": lambda: dense(a=_CODES[:, :128].clone()),
    r"a: wrong layout .*; pass a.contiguous\(\)": lambda: dense(
        a=torch.zeros((144, 4), dtype=torch.uint8).view(torch.float8_e4m3fn).t()
    ),
    r"a: misaligned .*got byte 8 .*; pass a.clone\(\)": lambda: dense(
        a=torch.zeros(600, dtype=torch.uint8).view(torch.float8_e4m3fn)[8:584].view(4, 144)
    ),
    "b: bad size .*K a positive multiple of 16, got 152": lambda: dense(k=152),
    "b: bad size .*N a positive multiple of 16, got 40": lambda: dense(n=40),
    "a_scale: bad dtype": lambda: dense(a_scale=torch.ones((4, 2), dtype=torch.float64)),
    r"a_scale: wrong shape \(expected \[4, 2\], got \[2, 4\]\)": lambda: dense(a_scale=torch.ones(2, 4)),
    r"b_scale: wrong shape \(expected \[1, 2\], got \[2, 1\]\)": lambda: dense(b_scale=torch.ones(2, 1)),
    "b_scale: wrong layout": lambda: dense(n=144, b_scale=torch.ones(2, 2).t()),
    "bias: wrong shape": lambda: dense(bias=torch.ones(4)),
    "bias: bad dtype": lambda: dense(bias=torch.ones(32, dtype=torch.int32)),
    "out_dtype: bad dtype": lambda: dense(out_dtype=torch.float16),
    "out: bad dtype .*; pass out_dtype=torch.float32": lambda: dense(out=torch.empty(4, 32)),
    "out: wrong shape": lambda: dense(out=torch.empty((32, 4), dtype=torch.bfloat16)),
    "out: wrong layout": lambda: dense(out=torch.empty((32, 4), dtype=torch.bfloat16).t()),
    "b: on another device .*expected cpu, like a, got meta": lambda: dense(
        b=torch.empty((32, 144), dtype=torch.float8_e4m3fn, device="meta")
    ),
    r"a: unpadded rows .*got 100\); pad": lambda: contiguous(m=100),
    "m_indices: bad dtype": lambda: contiguous(m_indices=torch.zeros(128, dtype=torch.int64)),
    "m_indices: wrong shape": lambda: contiguous(m_indices=torch.zeros(2, dtype=torch.int32)),
    "contiguous: out: bad dtype": lambda: contiguous(out=torch.empty((128, 32), dtype=torch.float16)),
    "m_grouped_fp8_gemm_nt_masked: a: wrong shape": lambda: masked(experts=3),
    "masked_m: wrong shape": lambda: masked(masked_m=torch.ones(3, dtype=torch.int32)),
    "expected_m: bad value": lambda: masked(expected_m=-1),
}


@pytest.mark.parametrize("message", _BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(BlockscaleError, match=message):
        _BAD_CALLS[message]()
