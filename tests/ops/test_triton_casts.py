"""The Triton casts against the reference, bit for bit: compiled on a GPU, interpreted without one.

`test_casts.py` runs its own cases on the GPU too; here is what only these kernels can get wrong.
"""

import math
import subprocess
import sys

import pytest
import torch

from blockscale import ops, reference
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.ops import dispatch
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal, assert_quantized_equal
from tests.devices import DEVICES, back, in_layout, on

pytest.importorskip("triton")

from blockscale.ops._triton import dequantize_weight, quantize_activation, quantize_weight

# NumPy's, in the interpreter, about Inf and NaN that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_FMTS = ("float32", "ue8m0")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(
    params=[
        *DEVICES,
        pytest.param("cuda without e4m3 instructions", marks=pytest.mark.gpu),
    ]
)
def any_way(request, monkeypatch):
    """The device, with its own conversions to E4M3 or the integer ones for older GPUs."""
    if request.param.endswith("instructions"):
        for kernels in (dequantize_weight, quantize_activation, quantize_weight):
            monkeypatch.setattr(kernels, "converts_to_e4m3", lambda device: False)
    return request.param.split()[0]


def quantized(op, device, x, *arguments, **options):
    return back(op(x.to(device), *arguments, backend="triton", **options))


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_both_ways(any_way, dtype, scale_fmt):
    x = data.wide_range((2, 50, 140), dtype)
    got = quantized(ops.quantize_weight, any_way, x, (40, 128), scale_fmt)
    assert_quantized_equal(got, reference.quantize_weight(x, (40, 128), scale_fmt))
    moved = on(any_way, *got)
    restored = back(ops.dequantize_weight(*moved, (40, 128), dtype, backend="triton"))
    assert_bitwise_equal(restored, reference.dequantize_weight(*got, (40, 128), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maker", [data.denormals, data.huge])
def test_weights_at_the_ends_of_the_range(any_way, maker, dtype):
    x = maker((16, 160), dtype)
    for scale_fmt in SCALE_FMTS:
        got = quantized(ops.quantize_weight, any_way, x, (16, 32), scale_fmt)
        assert_quantized_equal(got, reference.quantize_weight(x, (16, 32), scale_fmt))


def test_weight_blocks_over_the_whole_range_of_scales(any_way):
    powers = torch.arange(-146, 127, 7, dtype=torch.int32).repeat_interleave(16)
    x = torch.ldexp(torch.randn((4, len(powers)), generator=torch.Generator().manual_seed(0)), powers)
    got = quantized(ops.quantize_weight, any_way, x, (4, 16))
    assert_quantized_equal(got, reference.quantize_weight(x, (4, 16)))


@pytest.mark.parametrize("exponent", [-126, -119, -110, -90, -63, -62, -20, 0, 60, 110])
def test_float32_values_next_to_ties_at_every_size_of_scale(any_way, exponent):
    generator = torch.Generator().manual_seed(exponent + 200)
    scale = torch.ldexp(1 + torch.rand((16, 1), generator=generator), torch.tensor(exponent))
    ties = data.e4m3_ties()[:, :-1] * scale
    x = torch.cat(
        [448 * scale, ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0)], dim=1
    )
    got = quantized(ops.quantize_weight, any_way, x, (1, 1024))
    assert_quantized_equal(got, reference.quantize_weight(x, (1, 1024)))


@pytest.mark.parametrize("maker", [data.e4m3_ties, data.e4m3_boundary])
def test_ties_and_the_448_boundary(any_way, maker):
    x = maker()
    got = quantized(ops.quantize_weight, any_way, x, (1, 1024))
    assert_quantized_equal(got, reference.quantize_weight(x, (1, 1024)))


def test_zeros_keep_their_signs(any_way):
    x = data.zero_block((32, 64), (32, 32))
    got = quantized(ops.quantize_weight, any_way, x, (32, 32))
    assert_quantized_equal(got, reference.quantize_weight(x, (32, 32)))
    got = quantized(ops.quantize_activation, any_way, x, 32)
    assert_quantized_equal(got, reference.quantize_activation(x, 32))


@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_with_non_finite_values(any_way, dtype, scale_fmt):
    x = data.wide_range((5, 300), dtype)
    x[0, 3], x[0, 5], x[1, 130], x[2, 131], x[2, 132] = math.inf, -1, -math.nan, math.nan, -math.inf
    got = quantized(ops.quantize_activation, any_way, x, 128, scale_fmt)
    assert_quantized_equal(got, reference.quantize_activation(x, 128, scale_fmt))


@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((3, 256), 128), ((2, 3, 90), 30), ((70,), 32), ((1, 576), 128), ((33, 16), 16)]
)
def test_shapes_groups_and_scale_layouts(device, shape, group_size, layout):
    x = data.gaussian(shape)
    got = ops.quantize_activation(x.to(device), group_size, scale_layout=layout, backend="triton")
    assert in_layout(got[1], layout)
    assert_quantized_equal(back(got), reference.quantize_activation(x, group_size))


def test_rows_at_a_stride_and_transposed_ones(device):
    wide = data.wide_range((9, 400)).to(device)
    for x in (wide[:, 16:272], wide[::2, 1:130], wide[:, ::2], wide.t()):
        got = ops.quantize_activation(x, backend="triton")
        assert_quantized_equal(back(got), reference.quantize_activation(x.cpu().contiguous()))
        got = ops.quantize_weight(x, (16, 64), backend="triton")
        assert_quantized_equal(back(got), reference.quantize_weight(x.cpu().contiguous(), (16, 64)))
    codes, scale = on(device, *reference.quantize_weight(wide.cpu(), (8, 64)))
    got = ops.dequantize_weight(codes.t(), scale.t(), (64, 8), backend="triton")
    assert_bitwise_equal(got.cpu(), reference.dequantize_weight(codes.t().cpu(), scale.t().cpu(), (64, 8)))


def test_every_element_is_written_and_nothing_else(device):
    x = data.gaussian((7, 200)).to(device)
    memory = torch.full((9 * 200,), 0x55, dtype=torch.uint8, device=device)
    codes = memory[200:1600].view(torch.float8_e4m3fn).view(7, 200)
    padded = torch.full((4, 8), math.nan, device=device)
    scale = padded[1:3].t()[:7]
    ops.quantize_activation(x, 128, scale_layout="column", out=(codes, scale), backend="triton")
    assert_quantized_equal(back((codes, scale)), reference.quantize_activation(x.cpu()))
    assert bool((memory[:200] == 0x55).all() and (memory[1600:] == 0x55).all())
    assert bool(padded[0].isnan().all() and padded[3].isnan().all() and padded[1:3, 7].isnan().all())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_find_nonfinite(device, dtype):
    x = data.gaussian((3, 7000), torch.float32)
    assert ops.find_nonfinite(x.to(dtype).to(device), backend="triton") == (0, -1)
    for at in (20999, 15000, 9999):
        x.view(-1)[at] = -math.nan
    assert ops.find_nonfinite(x.to(dtype).to(device), backend="triton") == (3, 9999)


def test_a_non_finite_weight_is_refused_with_count_and_position(device):
    x = data.gaussian((2, 40, 70))
    x[1, 39, 69], x[1, 3, 4] = math.nan, -math.inf
    with pytest.raises(NonFiniteError) as caught:
        ops.quantize_weight(x.to(device), (32, 32), backend="triton")
    assert (caught.value.count, caught.value.position) == (2, (1, 3, 4))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_single_non_finite_value_is_enough(device, value):
    x = data.gaussian((20, 40))
    x[19, 39] = value
    with pytest.raises(NonFiniteError, match=r"1 NaN or Inf value, the first at \[19, 39\]"):
        ops.quantize_weight(x.to(device), (16, 16), backend="triton")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3)])
def test_empty_tensors(device, shape):
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    codes, scale = ops.quantize_weight(x, backend="triton")
    assert codes.shape == shape
    assert ops.dequantize_weight(codes, scale, backend="triton").shape == shape
    assert ops.find_nonfinite(x, backend="triton") == (0, -1)
    for layout in ("row", "column"):
        codes, scale = ops.quantize_activation(x, scale_layout=layout, backend="triton")
        assert codes.shape == shape
        assert scale.shape == (*shape[:-1], -(-shape[-1] // 128))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_kind_of_scale(any_way, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(16, 1)
    special = [1.0, 0.75, -3.0, 0.0, -0.0, 2.0**-126, 2.0**-149, 1e-39, 2.0**112, 2.0**119]
    special += [2.0**120, 3e38, math.inf, -math.inf, math.nan, -math.nan]
    scale = torch.tensor(special).unsqueeze(1)
    got = ops.dequantize_weight(*on(any_way, codes, scale), (1, 256), dtype, backend="triton")
    assert_bitwise_equal(got.cpu(), reference.dequantize_weight(codes, scale, (1, 256), dtype))


def test_blocks_too_large_for_registers_and_groups_too(device, monkeypatch):
    monkeypatch.setattr(quantize_weight, "LARGEST_BLOCK", 64)
    monkeypatch.setattr(quantize_activation, "LARGEST_GROUP", 64)
    x = data.wide_range((20, 200))
    assert_quantized_equal(
        quantized(ops.quantize_weight, device, x, (16, 16)), reference.quantize_weight(x, (16, 16))
    )
    assert_quantized_equal(
        quantized(ops.quantize_activation, device, x, 128), reference.quantize_activation(x, 128)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("scale_fmt", SCALE_FMTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_with_every_amax_mantissa(dtype, scale_fmt):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).cuda()
    every = every[every.isfinite()]
    bits = 7 if dtype == torch.bfloat16 else 10
    one = int(torch.ones((), dtype=dtype).view(torch.int16))
    for mantissa in range(1 << bits):
        amax = torch.tensor(one + mantissa, dtype=torch.int16).view(dtype).cuda()
        x = torch.where(every.abs() <= amax, every, amax).unsqueeze(0)
        got = ops.quantize_activation(x, 1 << 15, scale_fmt)
        assert_quantized_equal(got, reference.quantize_activation(x, 1 << 15, scale_fmt))
        weight = ops.quantize_weight(x, (1, 1 << 16), scale_fmt)
        assert_quantized_equal(weight, reference.quantize_weight(x, (1, 1 << 16), scale_fmt))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(8))
def test_random_float32_values_with_random_scales(seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.rand((4096, 4096), generator=generator, device="cuda") * 2 - 1
    assert_quantized_equal(ops.quantize_activation(x, 32), reference.quantize_activation(x, 32))
    assert_quantized_equal(ops.quantize_weight(x, (8, 16)), reference.quantize_weight(x, (8, 16)))


@pytest.mark.gpu
def test_a_million_rows_need_64_bit_offsets():
    x = torch.randn((1 << 20, 2112), device="cuda", dtype=torch.bfloat16)
    codes, scale = ops.quantize_activation(x, scale_layout="column")
    for rows in (slice(0, 100), slice(-100, None)):
        assert_quantized_equal(
            (codes[rows], scale[rows].contiguous()), reference.quantize_activation(x[rows])
        )
    codes, scale = ops.quantize_weight(x)
    assert_quantized_equal((codes[-128:], scale[-1:]), reference.quantize_weight(x[-128:]))
    assert_bitwise_equal(
        ops.dequantize_weight(codes, scale)[-128:], reference.dequantize_weight(codes[-128:], scale[-1:])
    )
    x[-1, -1] = math.nan
    assert ops.find_nonfinite(x) == (1, x.numel() - 1)


@pytest.mark.gpu
def test_quantizing_activations_can_be_captured_in_a_graph():
    x = torch.randn((64, 576), device="cuda", dtype=torch.bfloat16)
    ops.quantize_activation(x, scale_layout="column")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.quantize_activation(x, scale_layout="column")
    x.copy_(data.wide_range((64, 576)))
    graph.replay()
    assert_quantized_equal(back(got), reference.quantize_activation(x.cpu()))


@pytest.mark.gpu
def test_cuda_tensors_go_to_triton_unless_something_else_is_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(
        quantize_activation, "quantize_activation", lambda *arguments: calls.append(arguments)
    )
    x = torch.ones((4, 128), device="cuda", dtype=torch.bfloat16)
    ops.quantize_activation(x, backend="reference")
    assert not calls
    ops.quantize_activation(x)
    assert len(calls) == 1


def test_cpu_tensors_do_not_go_to_triton_by_themselves(monkeypatch):
    monkeypatch.setattr(quantize_activation, "quantize_activation", None)
    x = data.gaussian((4, 128))
    assert_quantized_equal(ops.quantize_activation(x), reference.quantize_activation(x))


def test_asking_for_triton_where_it_cannot_run_is_an_error(monkeypatch):
    with pytest.raises(BlockscaleError, match=r"backend triton is not available .*no kernels for a meta"):
        ops.quantize_weight(torch.zeros((4, 4), device="meta"), backend="triton")
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    dispatch._triton_obstacle.cache_clear()
    dispatch.triton_kernels.cache_clear()
    with pytest.raises(BlockscaleError, match=r"backend triton is not available .*works on CUDA tensors"):
        ops.quantize_weight(torch.zeros(4, 4), backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    dispatch._triton_obstacle.cache_clear()
    dispatch.triton_kernels.cache_clear()
    with pytest.raises(BlockscaleError, match="triton cannot be imported"):
        ops.quantize_weight(torch.zeros(4, 4), backend="triton")
    dispatch._triton_obstacle.cache_clear()
    dispatch.triton_kernels.cache_clear()


def test_importing_the_ops_does_not_import_triton():
    command = "import sys, blockscale.ops; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_column_scale_to_write_to_has_to_have_the_strides():
    x = data.gaussian((6, 256))
    codes = torch.empty((6, 256), dtype=torch.float8_e4m3fn)
    good = torch.empty((2, 8)).t()[:6]
    got = ops.quantize_activation(x, scale_layout="column", out=(codes, good))
    assert got[1] is good
    assert_quantized_equal(got, reference.quantize_activation(x))
    with pytest.raises(BlockscaleError, match=r"out\[1\]: unusable output .*\(1, 8\).*got.*\(2, 1\)"):
        ops.quantize_activation(x, scale_layout="column", out=(codes, torch.empty(6, 2)))
    with pytest.raises(BlockscaleError, match=r"unknown scale_layout .*'diagonal'"):
        ops.quantize_activation(x, scale_layout="diagonal")
