"""Every GEMM backend against the reference: float32 products of dequantized operands.

Without a GPU, Triton's interpreter runs the kernels on small shapes (tests/conftest.py turns it on); with one
they are compiled, and see the shapes of models too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from blockscale.metrics import calc_diff
from blockscale.reference import gemm as reference
from blockscale.reference import quantize_activation, quantize_weight
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal

pytest.importorskip("triton")

from blockscale.ops._triton import gemm, gemm_grouped, gemm_small_m
from blockscale.ops._triton.gemm import TileConfig
from blockscale.ops._triton.gemm_grouped import MaskedConfig
from blockscale.ops._triton.gemm_small_m import SmallMConfig

LIMIT = 1e-5
# Triton's interpreter cuts float32 to bfloat16 instead of rounding: up to 2**-7 of a value, 2e-5 in
# calc_diff.
INTERPRETER_BF16_LIMIT = 2.5e-5
N, K = 144, 576  # one and a bit blocks, four and a half groups
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these kernels")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@dataclass(frozen=True)
class Backend:
    """A launcher with the configuration it is given; None chooses by shape."""

    launch: Callable[..., torch.Tensor]
    config: Any = None

    def __str__(self):
        parts = "" if self.config is None else "-".join(str(part) for part in vars(self.config).values())
        return f"{self.launch.__module__.rpartition('.')[2]}[{parts}]"


TILES = [TileConfig(64, 128, 3, 4), TileConfig(128, 128, 4, 8)]
SMALL = [
    SmallMConfig(16, 64, 5, 2, 2, 4),
    SmallMConfig(64, 64, 1, 3, 2, 4),
    SmallMConfig(128, 64, 2, 0, 4, 4),
]
DENSE = [
    *[Backend(gemm.fp8_gemm_nt, config) for config in TILES],
    *[Backend(gemm_small_m.fp8_gemm_nt, config) for config in SMALL],
]


@pytest.fixture(params=DENSE, ids=str)
def dense(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def column_major(scale):
    """The layout the kernels like best: (..., M, G) with strides (..., 1, M rounded up to 4), padding NaN."""
    *lead, m, groups = scale.shape
    memory = torch.full((*lead, groups, -(-m // 4) * 4), torch.nan, device=scale.device)
    memory[..., :m] = scale.transpose(-1, -2)
    return memory[..., :m].transpose(-1, -2)


def operands(m, n, k, device, lead_a=(), lead_b=(), seed=0):
    """(a, a_scale, b, b_scale): scales that differ from group to group, a_scale in its fast layout."""
    a = quantize_activation(data.wide_range((*lead_a, m, k), seed=seed).to(device))
    b = quantize_weight(data.gaussian((*lead_b, n, k), seed=seed + 1).to(device))
    return a[0], column_major(a[1]), *b


def poisoned(shape, dtype, device):
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def assert_rows_close(got, expected):
    """calc_diff < 1e-5 for every row by itself, so that large rows don't hide small ones."""
    assert got.shape == expected.shape
    cut = got.dtype == torch.bfloat16 and got.device.type == "cpu"
    for row, (one, other) in enumerate(zip(got.float(), expected.float(), strict=True)):
        assert calc_diff(one, other) < (INTERPRETER_BF16_LIMIT if cut else LIMIT), f"row {row}"


def run(backend, quantized, bias=None, dtype=torch.bfloat16):
    """The backend's product, in memory that held NaN."""
    out = poisoned((quantized[0].shape[0], quantized[2].shape[0]), dtype, quantized[0].device)
    assert backend.launch(*quantized, bias, out, backend.config) is out
    return out


@pytest.mark.parametrize("m", [0, 1, 7, 130])
def test_any_number_of_rows_and_ragged_blocks(dense, device, m):
    quantized = operands(m, N, K, device)
    assert_rows_close(run(dense, quantized), reference.fp8_gemm_nt(*quantized))


@pytest.mark.parametrize("launch", [gemm.fp8_gemm_nt, gemm_small_m.fp8_gemm_nt])
@pytest.mark.parametrize(("n", "k"), [(128, 256), (576, 128), (16, 16), (144, 1040)])
def test_other_sizes_with_the_configuration_chosen_for_them(launch, device, n, k):
    quantized = operands(20, n, k, device)
    assert_rows_close(run(Backend(launch), quantized), reference.fp8_gemm_nt(*quantized))


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_bias_and_float32_out(dense, device, bias_dtype):
    quantized = operands(9, N, K, device)
    bias = data.gaussian((N,), bias_dtype).to(device) * 1000
    expected = reference.fp8_gemm_nt(*quantized, bias=bias, out_dtype=torch.float32)
    assert_rows_close(run(dense, quantized, bias, torch.float32), expected)


def test_activation_scales_of_any_strides(dense, device):
    a, a_scale, b, b_scale = operands(9, N, K, device)
    expected = run(dense, (a, a_scale, b, b_scale))
    for scale in (a_scale.contiguous(), torch.stack([a_scale, a_scale], dim=-1)[..., 1]):
        assert_bitwise_equal(run(dense, (a, scale, b, b_scale)), expected)


def test_scales_over_120_binades_cost_no_bit(dense, device):
    """Powers of two on rows of a and blocks of b come out of the product as they are."""
    a, a_scale, b, b_scale = operands(9, N, K, device)
    plain = run(dense, (a, a_scale, b, b_scale), dtype=torch.float32)
    row = torch.ldexp(torch.ones(9), torch.linspace(-60, 60, 9).round()).to(device)
    block = torch.ldexp(torch.ones(2), torch.tensor([-40, 20])).to(device)
    scaled = (a, column_major(a_scale * row[:, None]), b, b_scale * block[:, None])
    factor = row[:, None] * block.repeat_interleave(128)[:N]
    assert_bitwise_equal(run(dense, scaled, dtype=torch.float32), plain * factor)


def test_groups_far_apart_in_scale(dense, device):
    a, a_scale, b, b_scale = operands(9, N, K, device)
    spread = torch.ldexp(torch.ones(5), torch.tensor([60, -60, 57, 0, 58])).to(device)
    scaled = (a, column_major(a_scale * spread), b, b_scale * spread.flip(0))
    expected = reference.fp8_gemm_nt(*scaled, out_dtype=torch.float32)
    assert_rows_close(run(dense, scaled, dtype=torch.float32), expected)


@pytest.mark.parametrize("where", ["code", "scale"])
def test_nan_stays_in_its_row(dense, device, where):
    quantized = operands(9, N, K, device)
    if where == "scale":
        quantized[1][3, 4] = torch.nan
    elif device.type == "cpu":
        pytest.skip("Triton's interpreter takes the NaN code for 480")
    else:
        quantized[0].view(torch.uint8)[3, 500] = 0x7F
    nan = run(dense, quantized).isnan()
    assert bool(nan[3].all())
    assert int(nan.sum()) == N


def test_the_same_bits_every_time_whatever_the_workspace_held(device, monkeypatch):
    quantized = operands(20, N, K, device)
    backend = Backend(gemm_small_m.fp8_gemm_nt, SmallMConfig(16, 64, 5, 2, 2, 4))
    kept = {}
    fresh = gemm_small_m._workspace

    def same_memory(*arguments):
        return kept.setdefault("memory", fresh(*arguments))

    monkeypatch.setattr(gemm_small_m, "_workspace", same_memory)
    expected = run(backend, quantized)
    for fill in (None, 0, -1, 1 << 62):
        counters, partials = kept["memory"]
        partials.fill_(torch.nan)
        if fill is not None:  # else what the call before left
            counters.fill_(fill)
        assert_bitwise_equal(run(backend, quantized), expected)


@pytest.mark.parametrize("config", TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_contiguous_experts_empty_ones_and_padding(device, config, dtype):
    quantized = operands(512, N, K, device, lead_b=(4,))
    quantized[0].view(torch.uint8)[230:256] = 0x7F  # padding may hold anything
    indices = torch.full((512,), -1, dtype=torch.int32, device=device)
    indices[:230], indices[256:257] = 2, 0
    out = poisoned((512, N), dtype, device)
    gemm.m_grouped_fp8_gemm_nt_contiguous(*quantized, indices, out, config)
    expected = reference.m_grouped_fp8_gemm_nt_contiguous(*quantized, indices, out=torch.empty_like(out))
    assert_rows_close(out, expected)


MASKED = [
    None,
    MaskedConfig(16, 64, 1, 3, 2, 4),
    MaskedConfig(32, 64, 2, 0, 4, 4),
]


@pytest.mark.parametrize("config", MASKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masked_experts_write_their_rows_and_no_others(device, config, dtype):
    quantized = operands(40, N, K, device, lead_a=(4,), lead_b=(4,))
    counts = [0, 1, 17, 40]
    out = poisoned((4, 40, N), dtype, device)
    masked_m = torch.tensor(counts, dtype=torch.int32, device=device)
    gemm_grouped.m_grouped_fp8_gemm_nt_masked(*quantized, masked_m, 8, out, config)
    expected = reference.m_grouped_fp8_gemm_nt_masked(*quantized, masked_m, 8, out=torch.zeros_like(out))
    for expert, count in enumerate(counts):
        assert_rows_close(out[expert, :count], expected[expert, :count])
        assert bool(out[expert, count:].isnan().all())


# -- With a GPU: the shapes of models, graphs, and tensors that need 64-bit offsets


SHAPES = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048), (576, 7168)]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 16, 64, 100, 128, 1000])
@pytest.mark.parametrize("launch", [gemm.fp8_gemm_nt, gemm_small_m.fp8_gemm_nt])
def test_shapes_of_deepseek_v3(launch, m, n, k):
    quantized = operands(m, n, k, torch.device("cuda"))
    expected = reference.fp8_gemm_nt(*quantized)
    assert calc_diff(run(Backend(launch), quantized), expected) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, *SMALL], ids=str)
def test_split_k_replays_in_a_graph(config):
    quantized = operands(16, 2112, 7168, torch.device("cuda"))
    backend = Backend(gemm_small_m.fp8_gemm_nt, config)
    expected = run(backend, quantized)
    out = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.launch(*quantized, None, out, backend.config)
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        assert_bitwise_equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("launch", [gemm.fp8_gemm_nt, gemm_small_m.fp8_gemm_nt])
@pytest.mark.parametrize(("m", "n", "k"), [(300_032, 16, 7168), (66_000, 32_768, 128)])
def test_offsets_past_31_bits(launch, m, n, k):
    cuda = torch.device("cuda")
    seeded = torch.Generator(cuda).manual_seed(0)
    a = torch.randint(0, 0x70, (m, k), dtype=torch.uint8, device=cuda, generator=seeded)
    a = a.view(torch.float8_e4m3fn)
    a_scale = column_major(torch.rand((m, -(-k // 128)), device=cuda, generator=seeded) + 0.5)
    quantized = (a, a_scale, *operands(1, n, k, cuda)[2:])
    out = run(Backend(launch), quantized)
    for rows in (slice(0, 200), slice(m - 200, m)):
        part = reference.fp8_gemm_nt(a[rows], a_scale[rows], *quantized[2:], out_dtype=torch.float32)
        assert_rows_close(out[rows], part)
