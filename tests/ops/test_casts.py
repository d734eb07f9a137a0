"""Every backend against the reference, bit for bit."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockscale import ops, reference
from blockscale.errors import NonFiniteError
from blockscale.ops import dispatch
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal, assert_quantized_equal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_FMTS = ("float32", "ue8m0")
# Large enough for two threads, with ragged edges.
LARGE = (1100, 700)


@dataclass(frozen=True)
class Backend:
    name: str
    device: str

    def __call__(self, op: Callable, *tensors, **options):
        """Run `op` on this backend's device and bring the result back."""
        moved = [tensor.to(self.device) for tensor in tensors]
        result = op(*moved, backend=self.name, **options)
        return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()


@pytest.fixture(
    params=[
        Backend("reference", "cpu"),
        Backend("numba", "cpu"),
        pytest.param(Backend("auto", "cuda"), marks=pytest.mark.gpu),
    ],
    ids=lambda backend: f"{backend.name}-{backend.device}",
)
def backend(request):
    return request.param


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((256, 576), (128, 128)),
        ((300, 1000), (128, 128)),
        ((3, 130, 200), (128, 128)),
        ((130, 37), (128, 128)),
        ((129, 31), (128, 128)),
        ((70, 129), (32, 32)),
        ((100, 120), (100, 60)),
        ((5, 300), (1, 128)),
        ((40, 4100), (1, 4096)),
        ((2100, 3), (2048, 1)),
        ((3, 2), (128, 128)),
    ],
)
def test_weights_equal_the_reference_both_ways(backend, shape, block_size, dtype, scale_fmt):
    x = data.wide_range(shape, dtype)
    quantized = backend(ops.quantize_weight, x, block_size=block_size, scale_fmt=scale_fmt)
    assert_quantized_equal(quantized, reference.quantize_weight(x, block_size, scale_fmt))
    for target in DTYPES:
        got = backend(ops.dequantize_weight, *quantized, block_size=block_size, dtype=target)
        assert_bitwise_equal(got, reference.dequantize_weight(*quantized, block_size, target))


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 300)),
    block_size=st.tuples(st.sampled_from([1, 32, 100, 128]), st.sampled_from([1, 32, 60, 128, 200])),
    dtype=st.sampled_from(DTYPES),
    scale_fmt=st.sampled_from(SCALE_FMTS),
    maker=st.sampled_from([data.gaussian, data.wide_range, data.denormals, data.huge]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80)
def test_numba_equals_the_reference_on_any_weight(shape, block_size, dtype, scale_fmt, maker, seed):
    x = maker(shape, dtype, seed=seed)
    quantized = ops.quantize_weight(x, block_size, scale_fmt, backend="numba")
    assert_quantized_equal(quantized, reference.quantize_weight(x, block_size, scale_fmt))
    back = ops.dequantize_weight(*quantized, block_size, dtype, backend="numba")
    assert_bitwise_equal(back, reference.dequantize_weight(*quantized, block_size, dtype))


@pytest.mark.parametrize(
    ("scale_fmt", "exponent", "mantissas"),
    [
        # How a mantissa is rounded depends on the mantissa of the scale, hence on that of amax.
        ("float32", 0x01, range(128)),
        ("float32", 0x7F, range(128)),
        ("float32", 0x09, range(0, 128, 16)),
        ("float32", 0xFE, range(0, 128, 16)),
        # The power of two changes where amax / 448 passes one: at a mantissa of 1.75.
        *[("ue8m0", exponent, (0, 0x5F, 0x60, 0x61, 0x7F)) for exponent in (0x01, 0x06, 0x09, 0x80, 0xFE)],
    ],
    ids=str,
)
def test_every_bf16_value_with_every_scale_mantissa(exponent, mantissas, scale_fmt):
    every = data.all_bf16()
    for mantissa in mantissas:
        amax = (
            torch.tensor([exponent << 7 | mantissa], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
        )
        x = torch.where(every.abs() <= amax, every, amax).reshape(255, 256)
        got = ops.quantize_weight(x, (255, 256), scale_fmt, backend="numba")
        assert_quantized_equal(got, reference.quantize_weight(x, (255, 256), scale_fmt))


@pytest.mark.parametrize("width", [256, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_kind_of_scale(backend, dtype, width):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:width].repeat(16, 1)
    special = [1.0, 0.75, -3.0, 0.0, -0.0, 2.0**-126, 2.0**-149, 1e-39, 2.0**112, 2.0**119]
    special += [2.0**120, 3e38, math.inf, -math.inf, math.nan, -math.nan]
    scale = torch.tensor(special).unsqueeze(1)
    got = backend(ops.dequantize_weight, codes, scale, block_size=(1, 256), dtype=dtype)
    assert_bitwise_equal(got, reference.dequantize_weight(codes, scale, (1, 256), dtype))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_may_be_stored_in_other_formats(backend, scale_dtype):
    codes, scale = reference.quantize_weight(data.gaussian((300, 200)), scale_fmt="ue8m0")
    got = backend(ops.dequantize_weight, codes, scale.to(scale_dtype))
    assert_bitwise_equal(got, reference.dequantize_weight(codes, scale))


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "group_size"), [((37, 576), 128), ((2, 5, 300), 128), ((70,), 32), ((3, 7), 1)]
)
def test_activations_equal_the_reference_non_finite_ones_too(backend, shape, group_size, dtype, scale_fmt):
    x = data.wide_range(shape, dtype)
    x.view(-1)[3], x.view(-1)[5], x.view(-1)[-1] = math.inf, -1, -math.nan
    got = backend(ops.quantize_activation, x, group_size=group_size, scale_fmt=scale_fmt)
    assert_quantized_equal(got, reference.quantize_activation(x, group_size, scale_fmt))


@pytest.mark.parametrize("maker", [data.e4m3_ties, data.e4m3_boundary])
def test_ties_and_the_448_boundary(backend, maker):
    x = maker()
    got = backend(ops.quantize_weight, x, block_size=(1, 1024))
    assert_quantized_equal(got, reference.quantize_weight(x, (1, 1024)))


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
def test_a_zero_block_beside_others(backend, scale_fmt):
    x = data.zero_block((2, 256, 300), (128, 128))
    got = backend(ops.quantize_weight, x, scale_fmt=scale_fmt)
    assert_quantized_equal(got, reference.quantize_weight(x, scale_fmt=scale_fmt))
    assert got[1][:, 0, 0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 130, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_tensors(backend, shape):
    codes, scale = backend(ops.quantize_weight, torch.empty(shape, dtype=torch.bfloat16))
    assert codes.shape == shape
    assert scale.numel() == 0
    assert backend(ops.dequantize_weight, codes, scale).shape == shape
    assert backend(ops.quantize_activation, torch.empty(shape))[0].shape == shape
    assert ops.find_nonfinite(torch.empty(shape), backend=backend.name) == (0, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [LARGE, (2, 550, 700), (3, 5)])
def test_a_non_finite_weight_is_refused_with_count_and_position(backend, dtype, shape):
    x = data.gaussian(shape, dtype)
    last = tuple(size - 1 for size in shape)
    x[last], x[(*last[:-2], 1, 2)] = math.nan, -math.inf
    with pytest.raises(NonFiniteError) as caught:
        backend(ops.quantize_weight, x)
    assert (caught.value.count, caught.value.position) == (2, (*last[:-2], 1, 2))
    assert "quantize_weight: weight: 2 NaN or Inf values" in str(caught.value)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_find_nonfinite_across_pieces(backend, dtype, monkeypatch):
    monkeypatch.setattr("blockscale.ops.nonfinite._PIECE", 5000)
    monkeypatch.setattr(dispatch, "_SINGLE_THREAD_BELOW", 0)
    x = data.gaussian((3, 7000), torch.float32)
    assert ops.find_nonfinite(x.to(dtype).to(backend.device), backend=backend.name) == (0, -1)
    for at in (20999, 15000, 14999, 9999):
        x.view(-1)[at] = math.nan
    moved = x.to(dtype).to(backend.device)
    assert ops.find_nonfinite(moved, backend=backend.name) == (4, 9999)
    assert ops.find_nonfinite(moved, backend=backend.name) == reference.find_nonfinite(moved)


@pytest.mark.parametrize("threads", [1, 2, 5, None])
@pytest.mark.parametrize("shape", [LARGE, (3, 400, 700)])
def test_the_number_of_threads_does_not_change_a_bit(shape, threads):
    x = data.wide_range(shape)
    quantized = ops.quantize_weight(x, threads=threads, backend="numba")
    assert_quantized_equal(quantized, reference.quantize_weight(x))
    back = ops.dequantize_weight(*quantized, threads=threads, backend="numba")
    assert_bitwise_equal(back, reference.dequantize_weight(*quantized))
    rows = ops.quantize_activation(x, threads=threads, backend="numba")
    assert_quantized_equal(rows, reference.quantize_activation(x))


def test_the_reference_in_pieces_equals_the_reference_at_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_REFERENCE_PIECE", 20000)
    x = data.wide_range((2, 500, 300))
    quantized = ops.quantize_weight(x, backend="reference")
    assert_quantized_equal(quantized, reference.quantize_weight(x))
    back = ops.dequantize_weight(*quantized, backend="reference")
    assert_bitwise_equal(back, reference.dequantize_weight(*quantized))
    assert_quantized_equal(ops.quantize_activation(x, backend="reference"), reference.quantize_activation(x))


def test_threads_of_the_caller_do_not_disturb_each_other():
    weights = [data.wide_range((300, 500), dtype, seed) for seed in range(4) for dtype in DTYPES]
    results = [None] * len(weights)

    def convert(index):
        quantized = ops.quantize_weight(weights[index], threads=1)
        results[index] = (*quantized, ops.dequantize_weight(*quantized, threads=1))

    callers = [threading.Thread(target=convert, args=(index,)) for index in range(len(weights))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for weight, result in zip(weights, results, strict=True):
        assert_quantized_equal(result[:2], reference.quantize_weight(weight))
        assert_bitwise_equal(result[2], reference.dequantize_weight(*result[:2]))


def test_inputs_need_not_be_contiguous(backend):
    x = data.wide_range((300, 500))
    for view in (x.t(), x[::2, 1::3], x[:, 100:228]):
        quantized = backend(ops.quantize_weight, view)
        assert_quantized_equal(quantized, reference.quantize_weight(view.contiguous()))
        rows = backend(ops.quantize_activation, view)
        assert_quantized_equal(rows, reference.quantize_activation(view.contiguous()))
    codes, scale = reference.quantize_weight(x)
    back = backend(ops.dequantize_weight, codes.t(), scale.t())
    assert_bitwise_equal(back, reference.dequantize_weight(codes, scale).t().contiguous())


def test_input_at_an_odd_address(backend):
    x = data.wide_range((40, 50))
    buffer = torch.cat([torch.zeros(1, dtype=torch.uint8), x.view(-1).view(torch.uint8)])
    odd = torch.frombuffer(buffer.numpy(), dtype=torch.bfloat16, offset=1).view(40, 50)
    assert odd.data_ptr() % 2 == 1
    assert dispatch.bits(odd, (1, 40, 50)).flags.aligned
    assert_quantized_equal(backend(ops.quantize_weight, odd), reference.quantize_weight(x))


def test_parameters_that_require_gradients(backend):
    x = torch.nn.Parameter(data.gaussian((40, 50)))
    got = backend(ops.quantize_weight, x)
    assert_quantized_equal(got, reference.quantize_weight(x.detach()))
    assert not got[1].requires_grad


def test_results_go_to_the_given_tensors(backend):
    x = data.wide_range((200, 300)).to(backend.device)
    poison = torch.full((200, 300), math.nan, device=backend.device)
    for op, grid, truth in (
        (ops.quantize_weight, (2, 3), reference.quantize_weight),
        (ops.quantize_activation, (200, 3), reference.quantize_activation),
    ):
        out = poison.to(torch.float8_e4m3fn), torch.full(grid, math.nan, device=backend.device)
        got = op(x, out=out, backend=backend.name)
        assert got[0] is out[0]
        assert got[1] is out[1]
        assert_quantized_equal(out, truth(x))
    quantized = reference.quantize_weight(x)
    back = poison.to(torch.bfloat16)
    assert ops.dequantize_weight(*quantized, out=back, backend=backend.name) is back
    assert_bitwise_equal(back, reference.dequantize_weight(*quantized))
