"""The fused ops against the reference chain, bit for bit: compiled on a GPU, interpreted without one."""

import math

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.ops.rms_norm_quantize import rms_norm, rms_norm_quantize
from blockscale.ops.silu_mul_quantize import silu_mul, silu_mul_quantize
from blockscale.reference import fused
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal, assert_quantized_equal
from tests.devices import DEVICES, back, in_layout, on

pytest.importorskip("triton")

from blockscale.ops._triton import rms_norm_quantize as rms_kernels
from blockscale.ops._triton import silu_mul_quantize as silu_kernels

# NumPy's, in the interpreter, about Inf and NaN that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_FMTS = ("float32", "ue8m0")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def gate_up(shape, dtype=torch.bfloat16, seed=0):
    """Gates and values of a size where silu is neither linear nor at its limits."""
    return (200 * data.gaussian(shape, torch.float32, seed)).to(dtype)


def norm_weight(size, dtype=torch.bfloat16):
    return (1 + data.gaussian((size,), torch.float32, seed=7)).to(dtype)


def assert_norm_equal(got, expected):
    assert len(got) == len(expected)
    assert_quantized_equal(got[:2], expected[:2])
    for one, other in zip(got[2:], expected[2:], strict=True):
        assert_bitwise_equal(one, other, "x + residual")


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group_size"), [((5, 512), 128), ((2, 3, 180), 30), ((70,), 128)])
def test_silu_mul(device, shape, group_size, dtype, scale_fmt):
    x = gate_up(shape, dtype)
    got = silu_mul_quantize(x.to(device), group_size, scale_fmt, backend="triton")
    assert_quantized_equal(back(got), fused.silu_mul_quantize(x, group_size, scale_fmt))


def test_silu_mul_of_non_finite_gates_and_values(device):
    x = gate_up((8, 64))
    for row, gate in enumerate((math.inf, -math.inf, math.nan, 100.0, -100.0, -0.0, 1e-38, 2.0**-23)):
        x[row, 3] = gate
    x[3, 40], x[4, 40] = math.inf, math.nan
    got = silu_mul_quantize(x.to(device), 8, backend="triton")
    assert_quantized_equal(back(got), fused.silu_mul_quantize(x, 8))


@pytest.mark.parametrize("up", [1.0, -0.7, 2.0**110])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_every_16_bit_gate(device, dtype, up):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    gates = bits.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    x = torch.stack([gates, torch.full_like(gates, min(up, torch.finfo(dtype).max))], dim=1)
    # A group of one value has its magnitude as scale, to the last bit.
    got = silu_mul_quantize(x.to(device), 1, backend="triton")
    assert_quantized_equal(back(got), fused.silu_mul_quantize(x, 1))


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group_size"), [((3, 640), 128), ((2, 2, 90), 32)])
def test_rms_norm(device, shape, group_size, dtype, with_residual, scale_fmt):
    x, weight = data.gaussian(shape, dtype), norm_weight(shape[-1], dtype)
    residual = data.gaussian(shape, dtype, seed=1) if with_residual else None
    options = {"group_size": group_size, "scale_fmt": scale_fmt}
    moved = None if residual is None else residual.to(device)
    got = rms_norm_quantize(*on(device, x, weight), residual=moved, backend="triton", **options)
    assert_norm_equal(back(got), fused.rms_norm_quantize(x, weight, residual=residual, **options))


def test_rms_norm_of_rows_that_are_zero_tiny_huge_or_not_finite(device):
    x = data.gaussian((6, 256), torch.bfloat16)
    x[0], x[1, 5], x[2, 7] = 0.0, math.inf, math.nan
    x[3] *= 2.0**-60
    x[4] *= 2.0**60
    residual = torch.zeros_like(x)
    residual[5, 3] = math.nan
    for eps in (1e-6, 0.0):
        got = rms_norm_quantize(
            *on(device, x, norm_weight(256)), eps, residual=residual.to(device), backend="triton"
        )
        assert_norm_equal(back(got), fused.rms_norm_quantize(x, norm_weight(256), eps, residual=residual))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_as_it_is(device, dtype):
    x = gate_up((5, 300), dtype)
    assert_bitwise_equal(silu_mul(x.to(device), backend="triton").cpu(), fused.silu_mul(x), "silu * up")


def test_silu_mul_of_the_rows_that_count(device):
    x, rows = gate_up((30, 256)), torch.tensor([[3, -1], [29, 7]], dtype=torch.int32)
    some = [3, 7, 29]
    expected, scale = fused.silu_mul_quantize(x, 64)
    got = silu_mul_quantize(x.to(device), 64, scale_layout="column", rows=rows.to(device), backend="triton")
    assert_quantized_equal((got[0].cpu()[some], got[1].cpu()[some]), (expected[some], scale[some]))
    plain = silu_mul(x.to(device), rows=rows.to(device), backend="triton")
    assert_bitwise_equal(plain.cpu()[some], fused.silu_mul(x)[some], "silu * up")


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("scale_fmt", [None, *SCALE_FMTS])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_as_its_readers_want_it(device, with_residual, scale_fmt, plain):
    if scale_fmt is None and not plain:
        return  # nothing is asked for
    x, weight = data.gaussian((3, 640), torch.bfloat16), norm_weight(640)
    residual = data.gaussian(x.shape, torch.bfloat16, seed=1) if with_residual else None
    moved = None if residual is None else residual.to(device)
    got = rms_norm(*on(device, x, weight), 1e-6, moved, scale_fmt, plain=plain, backend="triton")
    hidden = x if residual is None else fused.add_residual(x, residual)
    y = fused.rms_norm(hidden, weight)
    assert_bitwise_equal(got.hidden.cpu(), hidden, "x + residual")
    assert (got.y is None) == (not plain)
    if plain:
        assert_bitwise_equal(got.y.cpu(), y, "norm")
    assert (got.codes is None) == (scale_fmt is None)
    if scale_fmt is not None:
        assert in_layout(got.scale, "column")
        expected = fused.rms_norm_quantize(hidden, weight, scale_fmt=scale_fmt)
        assert_quantized_equal(back((got.codes, got.scale)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maker", [data.gaussian, data.wide_range])
@pytest.mark.parametrize("columns", [512, 1536, 7168, 16384])
def test_rms_norm_of_many_rows(columns, maker, dtype):
    x, residual = maker((512, columns), dtype), maker((512, columns), dtype, seed=1)
    weight = norm_weight(columns, dtype)
    got = rms_norm_quantize(*on("cuda", x, weight), residual=residual.cuda())
    assert_norm_equal(back(got), fused.rms_norm_quantize(x, weight, residual=residual))


@pytest.mark.gpu
@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_of_many_rows(dtype, scale_fmt):
    x = gate_up((2000, 4096), dtype)
    got = silu_mul_quantize(x.cuda(), scale_fmt=scale_fmt)
    assert_quantized_equal(back(got), fused.silu_mul_quantize(x, scale_fmt=scale_fmt))


@pytest.mark.parametrize("layout", ["row", "column"])
def test_scale_layouts_and_rows_at_a_stride(device, layout):
    wide = gate_up((7, 600)).to(device)
    for x in (wide[:, 8:264], wide[::2, :256], wide[:, ::2][:, :128]):
        got = silu_mul_quantize(x, 32, scale_layout=layout, backend="triton")
        assert in_layout(got[1], layout)
        assert_quantized_equal(back(got), fused.silu_mul_quantize(x.cpu(), 32))
        weight = norm_weight(x.shape[1])
        got = rms_norm_quantize(
            x, weight.to(device), 1e-6, 32, scale_layout=layout, residual=x, backend="triton"
        )
        assert in_layout(got[1], layout)
        assert_norm_equal(back(got), fused.rms_norm_quantize(x.cpu(), weight, 1e-6, 32, residual=x.cpu()))


@pytest.mark.parametrize("shape", [(0, 256), (4, 0), (2, 0, 64)])
def test_empty_tensors(device, shape):
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    codes, scale = silu_mul_quantize(x, backend="triton")
    assert codes.shape == (*shape[:-1], shape[-1] // 2)
    assert scale.shape == (*shape[:-1], -(-shape[-1] // 256))
    codes, scale, hidden = rms_norm_quantize(x, x.new_ones(shape[-1]), residual=x, backend="triton")
    assert codes.shape == hidden.shape == shape
    assert scale.numel() == 0


def test_groups_and_rows_too_large_for_registers(device, monkeypatch):
    monkeypatch.setattr(silu_kernels, "LARGEST_GROUP", 64)
    monkeypatch.setattr(rms_kernels, "LARGEST_ROW", 64)
    x, weight = gate_up((3, 256)), norm_weight(256)
    got = silu_mul_quantize(x.to(device), backend="triton")
    assert_quantized_equal(back(got), fused.silu_mul_quantize(x))
    got = rms_norm_quantize(*on(device, x, weight), residual=x.to(device), backend="triton")
    assert_norm_equal(back(got), fused.rms_norm_quantize(x, weight, residual=x))


def test_on_the_cpu_the_fast_quantizer_ends_the_chain():
    x, weight = gate_up((9, 512)), norm_weight(512)
    for backend in ("auto", "numba", "reference"):
        got = silu_mul_quantize(x, scale_layout="column", backend=backend)
        assert in_layout(got[1], "column")
        assert_quantized_equal(got, fused.silu_mul_quantize(x))
        got = rms_norm_quantize(x, weight, residual=x, backend=backend)
        assert_norm_equal(got, fused.rms_norm_quantize(x, weight, residual=x))


_X = torch.zeros((4, 6), dtype=torch.bfloat16)
_BAD_CALLS = {
    "silu_mul_quantize: x: wrong shape .*gate and up": lambda: silu_mul_quantize(_X[:, :5]),
    "silu_mul_quantize: backend: unknown backend": lambda: silu_mul_quantize(_X, backend="cuda"),
    "rms_norm_quantize: weight: wrong shape": lambda: rms_norm_quantize(_X, _X[0, :5]),
    "rms_norm_quantize: backend: unknown backend": lambda: rms_norm_quantize(_X, _X[0], backend="cuda"),
    "unknown scale_fmt": lambda: rms_norm_quantize(_X, _X[0], scale_fmt="e5m2"),
}


@pytest.mark.parametrize("message", _BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(BlockscaleError, match=message):
        _BAD_CALLS[message]()
