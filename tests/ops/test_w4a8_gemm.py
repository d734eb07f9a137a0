"""W4A8 GEMMs against the reference: float32 products of dequantized operands.

Without a GPU, Triton's interpreter runs the kernels on small shapes (tests/conftest.py turns it on); with one
they are compiled, and see the shapes of models too.
"""

import itertools

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.metrics import calc_diff
from blockscale.ops import w4a8_gemm as ops
from blockscale.ops._cuda.w4a8_configs import W4Tile
from blockscale.reference import packing, quantize_activation, w4, w4a8
from blockscale.reference.fp4 import quantize_mxfp4
from blockscale.reference.int4 import quantize_int
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal

pytest.importorskip("triton")

from blockscale.ops._triton import w4a8 as dense_kernel
from blockscale.ops._triton import w4a8_grouped as grouped_kernel
from blockscale.ops._triton.w4a8 import W4Config
from blockscale.ops._triton.w4a8_grouped import W4GroupedConfig

LIMIT = 1e-5
INTERPRETER_BF16_LIMIT = 2.5e-5  # it cuts float32 to bfloat16 instead of rounding
N, K = 144, 576  # two and a bit tiles, four and a half groups
KINDS, DTYPES = ["int4", "mxfp4"], [torch.bfloat16, torch.float32]
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these kernels")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DENSE = [None, W4Config(16, 64, 3, 2, 4), W4Config(64, 64, 1, 3, 4), W4Config(128, 128, 1, 3, 8)]
GROUPED = [None, W4GroupedConfig(16, 64, 4, 4), W4GroupedConfig(64, 64, 3, 4, 128)]
TILES = [  # of CUDA C++
    W4Tile(),
    W4Tile(cluster=2),
    W4Tile(rows=64),
    W4Tile(waves=1, cluster=2),
    W4Tile(rows=64, waves=1),
    W4Tile(rows=64, warpgroups=1, waves=1),
    W4Tile(rows=32, warpgroups=1, waves=1),
    W4Tile(unit=32),
]


def places(configs, tiles):
    """Devices with what runs there: Triton's configurations, and tiles of CUDA C++ on a GPU."""
    (cpu, gpu), named = DEVICES, [*configs, *tiles]
    return [pytest.param("cpu", each, marks=cpu.marks, id=f"cpu-{each}") for each in configs] + [
        pytest.param("cuda", each, marks=gpu.marks, id=f"cuda-{each}") for each in named
    ]


def with_more(cases, on_cpu, on_gpu):
    """Cases with more values: those that `on_cpu` has for a configuration, or each of `on_gpu`.

    The interpreter takes seconds for a kernel, and knows neither warps nor stages: a path through it once.
    """
    return [
        pytest.param(*each.values, *more, marks=each.marks, id="-".join([each.id, *map(str, more)]))
        for each in cases
        for more in (on_cpu(each.values[1]) if each.values[0] == "cpu" else on_gpu)
    ]


def kernels(config, triton):
    """Where the kernels of a configuration or tile are."""
    if not isinstance(config, W4Tile):
        return triton
    from blockscale.ops._cuda import w4a8_gemm as cuda_kernels  # needs the driver

    return cuda_kernels


def inputs(device):
    """K of experts: half a group behind four, or in the interpreter, which has no pipeline to fill, two."""
    return 320 if device.type == "cpu" else K


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def weight_of(shape, kind, device, seed=1):
    x = data.gaussian(shape, seed=seed).to(device)
    if kind == "int4":
        codes, scale = quantize_int(x, GroupInt(4, 128))
        fmt = GroupInt(4, 128)
    else:
        codes, scale = quantize_mxfp4(x)
        fmt = MXFP4()
    return w4.prepare_w4(packing.pack(codes, 4), scale, fmt, shape[-1])


def rows_of(shape, device, seed=0):
    """Codes, and scales in the layout that kernels like best: a column contiguous, padding NaN."""
    a, scale = quantize_activation(data.wide_range(shape, seed=seed))
    *lead, m, groups = scale.shape
    memory = torch.full((*lead, groups, -(-m // 4) * 4), torch.nan)
    memory[..., :m] = scale.transpose(-1, -2)
    return a.to(device), memory.to(device)[..., :m].transpose(-1, -2)


def poisoned(shape, dtype, device):
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def assert_rows_close(got, expected):
    """calc_diff < 1e-5 for every row by itself, so that large rows don't hide small ones."""
    assert got.shape == expected.shape
    cut = got.dtype == torch.bfloat16 and got.device.type == "cpu"
    for row, (one, other) in enumerate(zip(got.float(), expected.float(), strict=True)):
        assert calc_diff(one, other) < (INTERPRETER_BF16_LIMIT if cut else LIMIT), f"row {row}"


# 150 rows are ten tiles of 16, more than the eight that go together; from 257 on the largest tile is chosen.
@pytest.mark.parametrize(
    ("device", "config", "m"),
    with_more(
        places(DENSE, TILES),
        on_cpu=lambda config: [(m,) for m in (0, 1, 7, 70, 150 if config else 300)],
        on_gpu=[(m,) for m in (0, 1, 7, 70, 300)],
    ),
    indirect=["device"],
)
def test_any_number_of_rows_and_ragged_blocks(device, kind, config, m):
    a, a_scale = rows_of((m, K), device)
    b = weight_of((N, K), kind, device)
    out = poisoned((m, N), torch.float32, device)
    run = kernels(config, dense_kernel).w4a8_gemm_nt
    assert run(a, a_scale, b, None, out, config) is out
    assert_rows_close(out, w4a8.w4a8_gemm_nt(a, a_scale, b, out_dtype=torch.float32))


@pytest.mark.parametrize(("n", "k"), [(128, 256), (576, 128), (16, 16), (144, 1040)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("device", "backend"), places(["triton"], ["cuda"]), indirect=["device"])
def test_other_sizes_with_bias(device, backend, kind, n, k, dtype):
    a, a_scale = rows_of((20, k), device)
    b = weight_of((n, k), kind, device)
    bias = data.gaussian((n,)).to(device)
    found = ops.w4a8_gemm_nt(a, a_scale, b, bias=bias, out_dtype=dtype, backend=backend)
    assert_rows_close(found, w4a8.w4a8_gemm_nt(a, a_scale, b, bias=bias, out_dtype=dtype))


@pytest.mark.parametrize(("device", "backend"), places(["triton"], ["cuda"]), indirect=["device"])
def test_every_code_is_multiplied_exactly(device, backend, kind):
    """One activation of 1 a row picks a column of the weight, which must come out to the bit."""
    b = weight_of((64, 256), kind, device)
    a = torch.eye(256, device=device)[::3].to(torch.float8_e4m3fn)
    a_scale = torch.ones(a.shape[0], 2, device=device)
    found = ops.w4a8_gemm_nt(a, a_scale, b, out_dtype=torch.float32, backend=backend)
    assert_bitwise_equal(found + 0.0, w4.dequantize_w4(b).t()[::3].contiguous() + 0.0)


def test_split_k_gives_the_same_bits_whatever_the_workspace_held(device, monkeypatch):
    a, a_scale = rows_of((20, K), device)
    b, config = weight_of((N, K), "int4", device), W4Config(16, 64, 3, 2, 4)
    kept = {}
    fresh = dense_kernel._workspace

    def same_memory(*arguments):
        return kept.setdefault("memory", fresh(*arguments))

    def run():
        return dense_kernel.w4a8_gemm_nt(
            a, a_scale, b, None, poisoned((20, N), torch.float32, device), config
        )

    monkeypatch.setattr(dense_kernel, "_workspace", same_memory)
    expected = run()
    for fill in (None, 0, -1):
        counters, partials = kept["memory"]
        partials.fill_(torch.nan)
        if fill is not None:
            counters.fill_(fill)
        assert_bitwise_equal(run(), expected)


# What reads weights knows nothing of what writes results: every tile with either kind and either dtype.
@pytest.mark.parametrize(
    ("device", "config", "kind", "dtype"),
    with_more(
        places(GROUPED, TILES),
        on_cpu=lambda config: list(zip(KINDS, DTYPES, strict=True)),
        on_gpu=list(itertools.product(KINDS, DTYPES)),
    ),
    indirect=["device", "kind"],
)
def test_contiguous_experts_empty_ones_and_padding(device, kind, config, dtype):
    k = inputs(device)
    a, a_scale = rows_of((640, k), device)
    a.view(torch.uint8)[198:256] = 0x7F  # padding may hold anything
    b = weight_of((4, N, k), kind, device)
    indices = torch.full((640,), -1, dtype=torch.int32, device=device)
    # All quarters of a segment, three, one and two of them; and a segment of padding.
    indices[:198], indices[256:257], indices[384 : 384 + 40] = 2, 0, 3
    out = poisoned((640, N), dtype, device)
    run = kernels(config, grouped_kernel).m_grouped_w4a8_gemm_nt_contiguous
    run(a, a_scale, b, indices, out, config)
    expected = w4a8.m_grouped_w4a8_gemm_nt_contiguous(a, a_scale, b, indices, out=torch.empty_like(out))
    counted = indices >= 0
    assert_rows_close(out[counted], expected[counted])


# Without a configuration 1 and 40 expected rows choose tiles of 16 and 64; 40 are several programs of 16.
@pytest.mark.parametrize(
    ("device", "config", "expected_m"),
    with_more(
        places(GROUPED, TILES),
        on_cpu=lambda config: {GROUPED[0]: [(1,), (40,)], GROUPED[1]: [(40,)], GROUPED[2]: []}[config],
        on_gpu=[(1,), (40,)],
    ),
    indirect=["device"],
)
def test_masked_experts_write_their_rows_and_no_others(device, kind, config, expected_m):
    k = inputs(device)
    a, a_scale = rows_of((5, 80, k), device)
    b = weight_of((5, N, k), kind, device)
    counts = [0, 1, 17, 80, 400]  # more than there is room for means all of them
    out = poisoned((5, 80, N), torch.bfloat16, device)
    masked_m = torch.tensor(counts, dtype=torch.int32, device=device)
    run = kernels(config, grouped_kernel).m_grouped_w4a8_gemm_nt_masked
    run(a, a_scale, b, masked_m, expected_m, out, config)
    expected = w4a8.m_grouped_w4a8_gemm_nt_masked(
        a, a_scale, b, masked_m, expected_m, out=torch.zeros_like(out)
    )
    for expert, count in enumerate(counts):
        assert_rows_close(out[expert, :count], expected[expert, :count])
        assert bool(out[expert, count:].isnan().all())


@pytest.mark.parametrize("where", ["code", "scale"])
@pytest.mark.parametrize(("device", "backend"), places(["triton"], ["cuda"]), indirect=["device"])
def test_nan_stays_in_its_row(device, backend, where):
    a, a_scale = rows_of((9, K), device)
    if where == "scale":
        a_scale[3, 4] = torch.nan
    elif device.type == "cpu":
        pytest.skip("Triton's interpreter takes the NaN code for 480")
    else:
        a.view(torch.uint8)[3, 0] = 0x7F  # in memory behind row 2, whose last group is half a one
    nan = ops.w4a8_gemm_nt(a, a_scale, weight_of((N, K), "int4", device), backend=backend).isnan()
    assert bool(nan[3].all())
    assert int(nan.sum()) == N


# -- The public functions


def test_on_a_cpu_weights_are_dequantized(kind):
    a, a_scale = rows_of((256, K), torch.device("cpu"))
    b = weight_of((2, N, K), kind, torch.device("cpu"))
    found = ops.w4a8_gemm_nt(a, a_scale, b[1], out_dtype=torch.float32)
    assert_rows_close(found, w4a8.w4a8_gemm_nt(a, a_scale, b[1], out_dtype=torch.float32))
    indices = torch.arange(2, dtype=torch.int32).repeat_interleave(128)
    expected = w4a8.m_grouped_w4a8_gemm_nt_contiguous(a, a_scale, b, indices)
    assert_rows_close(ops.m_grouped_w4a8_gemm_nt_contiguous(a, a_scale, b, indices), expected)
    counts = torch.tensor([3, 128], dtype=torch.int32)
    shaped = a.view(2, 128, K), a_scale.contiguous().view(2, 128, -1)
    out = torch.zeros(2, 128, N, dtype=torch.bfloat16)
    expected = w4a8.m_grouped_w4a8_gemm_nt_masked(*shaped, b, counts, 3, out=out.clone())
    found = ops.m_grouped_w4a8_gemm_nt_masked(*shaped, b, counts, 3, out=out)
    assert_bitwise_equal(found, expected)


def test_wrong_arguments_are_named():
    cpu = torch.device("cpu")
    a, a_scale = rows_of((128, K), cpu)
    b, experts = weight_of((N, K), "int4", cpu), weight_of((2, N, K), "int4", cpu)
    indices = torch.zeros(128, dtype=torch.int32)
    with pytest.raises(BlockscaleError, match="a: bad dtype"):
        ops.w4a8_gemm_nt(a.float(), a_scale, b)
    with pytest.raises(BlockscaleError, match="a_scale: wrong shape"):
        ops.w4a8_gemm_nt(a, a_scale[:, :4], b)
    with pytest.raises(BlockscaleError, match="b: wrong shape"):
        ops.w4a8_gemm_nt(a, a_scale, experts)
    with pytest.raises(BlockscaleError, match="a: wrong shape"):
        ops.w4a8_gemm_nt(a[:, :512].contiguous(), a_scale, b)
    with pytest.raises(BlockscaleError, match="out: bad dtype"):
        ops.w4a8_gemm_nt(a, a_scale, b, out=torch.empty(128, N))
    with pytest.raises(BlockscaleError, match="N a positive multiple of 16"):
        ops.w4a8_gemm_nt(a, a_scale, weight_of((24, K), "int4", cpu))
    with pytest.raises(BlockscaleError, match="unpadded rows"):
        ops.m_grouped_w4a8_gemm_nt_contiguous(a[:100], a_scale[:100], experts, indices[:100])
    with pytest.raises(BlockscaleError, match="m_indices: bad dtype"):
        ops.m_grouped_w4a8_gemm_nt_contiguous(a, a_scale, experts, indices.long())
    shaped = a.view(2, 64, K), a_scale.contiguous().view(2, 64, -1)
    with pytest.raises(BlockscaleError, match="expected_m: bad value"):
        ops.m_grouped_w4a8_gemm_nt_masked(*shaped, experts, indices[:2], -1)
    with pytest.raises(BlockscaleError, match="unknown backend"):
        ops.w4a8_gemm_nt(a, a_scale, b, backend="gluon")
    with pytest.raises(BlockscaleError, match="backend cuda is not available"):
        ops.w4a8_gemm_nt(a, a_scale, b, backend="cuda")


# -- With a GPU: the shapes of models, and graphs


SHAPES = [(4096, 7168), (7168, 2048), (2816, 2048), (2048, 1408), (2112, 7168)]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 16, 48, 128, 1000])
def test_shapes_of_deepseek(kind, m, n, k):
    cuda = torch.device("cuda")
    a, a_scale = rows_of((m, k), cuda)
    b = weight_of((n, k), kind, cuda)
    expected = w4a8.w4a8_gemm_nt(a, a_scale, b)
    assert calc_diff(ops.w4a8_gemm_nt(a, a_scale, b), expected) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 32, 48, 128, 256])
@pytest.mark.parametrize(("n", "k"), [(2816, 2048), (2048, 1408)])
def test_experts_of_the_16b_model(kind, tokens, n, k):
    cuda = torch.device("cuda")
    b = weight_of((8, n, k), kind, cuda)
    room = max(128, tokens)
    a, a_scale = rows_of((8, room, k), cuda)
    counts = torch.tensor([tokens, 0, 1, tokens, tokens, 3, room, tokens], dtype=torch.int32, device=cuda)
    expected = w4a8.m_grouped_w4a8_gemm_nt_masked(a, a_scale, b, counts, tokens)
    found = ops.m_grouped_w4a8_gemm_nt_masked(a, a_scale, b, counts, tokens)
    valid = torch.arange(room, device=cuda) < counts[:, None]
    assert calc_diff(found[valid], expected[valid]) < LIMIT
    experts = torch.arange(8, dtype=torch.int32, device=cuda)[:, None].expand(8, room)
    indices = torch.where(valid, experts, -1).flatten().contiguous()
    flat = a.flatten(0, 1), a_scale.flatten(0, 1)
    found = ops.m_grouped_w4a8_gemm_nt_contiguous(*flat, b, indices)
    assert calc_diff(found.view(8, room, n)[valid], expected[valid]) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("m", [16, 100], ids=["split-k", "many"])
def test_products_replay_in_a_graph(m):
    cuda = torch.device("cuda")
    a, a_scale = rows_of((m, 7168), cuda)
    b = weight_of((2112, 7168), "int4", cuda)
    expected = ops.w4a8_gemm_nt(a, a_scale, b)
    out = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.w4a8_gemm_nt(a, a_scale, b, out=out)
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        assert_bitwise_equal(out, expected)
