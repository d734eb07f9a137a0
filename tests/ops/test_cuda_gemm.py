"""The CUDA GEMM, tile by tile, and what overlapping launches must not break."""

import pytest
import torch

from blockscale import ops, reference
from blockscale.metrics import calc_diff
from blockscale.ops._cuda import configs
from blockscale.ops._cuda.configs import FewTile, Tile
from blockscale.testing import data

pytestmark = pytest.mark.gpu

N, K = 592, 1104  # no tile and no block divides them
TILES = (
    *configs._DENSE,
    *configs._GROUPED,
    *(
        FewTile(rows, waves=waves, splits=splits)
        for rows, waves, splits in ((8, 1, 8), (32, 2, 2), (64, 1, 4))
    ),
    Tile(16, share="a"),
    Tile(32, warpgroups=1, share="b"),
    Tile(64, warpgroups=1),
    Tile(128, warpgroups=3, share="b"),
    Tile(96, side=True),
    Tile(32, warpgroups=1, occupancy=2),
)


def _kernels():
    from blockscale.ops._cuda import fp8_gemm  # needs the driver

    return fp8_gemm


def _operands(m, n=N, k=K, lead=()):
    x, w = data.wide_range((m, k)).cuda(), data.gaussian((*lead, n, k), seed=1).cuda()
    return (*ops.quantize_activation(x, scale_layout="column"), *ops.quantize_weight(w))


@pytest.mark.parametrize("tile", TILES, ids=repr)
@pytest.mark.parametrize("m", [1, 50, 333])
def test_every_tile_gives_the_product(tile, m):
    operands = _operands(m)
    exact = reference.fp8_gemm_nt(*operands, out_dtype=torch.float32)
    bias = data.gaussian((N,)).cuda() * 1000
    for dtype, extra in ((torch.bfloat16, None), (torch.float32, bias)):
        memory = torch.full((m + 2, N + 32), torch.nan, dtype=dtype, device="cuda")
        out = memory[1:-1, 16:-16]
        _kernels().fp8_gemm_nt(*operands, bias=extra, out=out, tile=tile)
        expected = exact if extra is None else exact + extra.float()
        for row in (0, m // 2, m - 1):
            assert calc_diff(out[row], expected[row]) < 1e-5
        assert calc_diff(out, expected) < 1e-5
        out.fill_(torch.nan)
        assert bool(memory.isnan().all()), "nothing is written outside out"


@pytest.mark.parametrize("tile", configs._GROUPED, ids=repr)
def test_every_grouped_tile_leaves_padding_rows_of_masked_alone(tile):
    counts = torch.tensor([130, 0, 1, 300, 64], dtype=torch.int32, device="cuda")
    rows = torch.arange(300, device="cuda")
    parts = [_operands(300)[:2] for _ in counts]
    a, a_scale = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    b, b_scale = _operands(1, lead=(5,))[2:]
    exact = reference.m_grouped_fp8_gemm_nt_masked(a, a_scale, b, b_scale, counts, 300)
    out = torch.full((5, 300, N), torch.nan, dtype=torch.bfloat16, device="cuda")
    _kernels().m_grouped_fp8_gemm_nt_masked(a, a_scale, b, b_scale, counts, 300, out=out, tile=tile)
    counted = rows[None, :] < counts[:, None]
    assert calc_diff(out[counted], exact[counted]) < 1e-5
    assert bool(out[~counted].isnan().all())


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("m", [3, 64, 300])
def test_a_product_waits_for_the_kernels_before_it(m, captured):
    """A launch may be set up while the kernel before it runs: operands are made, used and overwritten."""
    quantized = ops.quantize_weight(data.gaussian((K, K)).cuda())
    x = data.gaussian((m, K), seed=2).cuda() * 50
    source, between, out = x.clone(), torch.empty_like(x), torch.empty_like(x)

    def chain():
        first = ops.quantize_activation(source, scale_layout="column")
        ops.fp8_gemm_nt(*first, *quantized, out=between)
        second = ops.quantize_activation(between, scale_layout="column")
        ops.fp8_gemm_nt(*second, *quantized, out=out)
        ops.fp8_gemm_nt(*first, *quantized, out=between)
        source.mul_(0.5)

    first = ops.quantize_activation(x, scale_layout="column")
    middle = ops.fp8_gemm_nt(*first, *quantized)
    torch.cuda.synchronize()
    expected = ops.fp8_gemm_nt(*ops.quantize_activation(middle, scale_layout="column"), *quantized)
    torch.cuda.synchronize()
    run = chain
    if captured:
        graph = torch.cuda.CUDAGraph()
        chain()
        with torch.cuda.graph(graph):
            chain()
        run = graph.replay
    for _ in range(30):
        source.copy_(x)
        out.fill_(torch.nan)
        run()
        assert torch.equal(out, expected)
        assert torch.equal(between, middle)
