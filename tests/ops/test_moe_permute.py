"""Permutation of token rows on Triton against the reference: compiled on a GPU, interpreted without."""

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.ops.moe_permute import moe_permute, moe_permute_masked, moe_unpermute
from blockscale.reference import moe, quantize_activation
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal
from tests.devices import DEVICES, on

pytest.importorskip("triton")

CODES = torch.float8_e4m3fn


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def routing(tokens, topk, experts, seed=0):
    """Distinct experts for every token, more of them among the first ones."""
    scores = torch.rand((tokens, experts), generator=torch.Generator().manual_seed(seed))
    return (scores / torch.arange(1, experts + 1)).topk(topk, dim=1).indices


def assert_permuted_equal(got, expected):
    """Everything but the padding, whose rows mean nothing."""
    assert_bitwise_equal(got.positions.cpu(), expected.positions, "positions")
    assert_bitwise_equal(got.m_indices.cpu(), expected.m_indices, "m_indices")
    assert got.rows.shape == expected.rows.shape
    valid = expected.m_indices >= 0
    assert_bitwise_equal(got.rows.cpu()[valid], expected.rows[valid], "rows")
    assert (got.scale is None) == (expected.scale is None)
    if got.scale is not None:
        assert got.scale.shape == expected.scale.shape
        assert got.scale.stride() == (1, got.scale.shape[0])
        assert_bitwise_equal(got.scale.cpu()[valid], expected.scale[valid], "scale")


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "topk", "experts", "columns"),
    [(70, 4, 20, 96), (1, 8, 256, 48), (65, 2, 3, 17), (3, 1, 1, 128)],
)
def test_codes_and_scales_go_to_their_experts(device, tokens, topk, experts, columns, id_dtype):
    codes, scale = quantize_activation(data.gaussian((tokens, columns)), 32, scale_layout="column")
    expert_ids = routing(tokens, topk, experts).to(id_dtype)
    got = moe_permute(*on(device, codes, expert_ids), experts, scale.to(device), backend="triton")
    assert_permuted_equal(got, moe.moe_permute(codes, expert_ids, experts, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back_with_weights(device, dtype):
    x, expert_ids = data.gaussian((30, 200), dtype), routing(30, 3, 8)
    weights = torch.rand((30, 3), generator=torch.Generator().manual_seed(1))
    got = moe_permute(*on(device, x, expert_ids), 8, alignment=16, backend="triton")
    expected = moe.moe_permute(x, expert_ids, 8, alignment=16)
    assert_permuted_equal(got, expected)
    out = moe_unpermute(got.rows, got.positions, weights.to(device), backend="triton")
    assert_bitwise_equal(out.cpu(), moe.moe_unpermute(expected.rows, expected.positions, weights))


def test_slots_of_other_experts_get_no_row_and_add_nothing(device):
    x, expert_ids = data.gaussian((3, 8)), torch.tensor([[0, 5], [-1, 1], [2, -7]])
    got = moe_permute(*on(device, x, expert_ids), 2, alignment=4, backend="triton")
    expected = moe.moe_permute(x, expert_ids, 2, alignment=4)
    assert_permuted_equal(got, expected)
    got.rows[got.m_indices < 0] = torch.nan
    weights = torch.full((3, 2), 0.5)
    out = moe_unpermute(got.rows, got.positions, weights.to(device), backend="triton")
    assert_bitwise_equal(out.cpu(), moe.moe_unpermute(expected.rows, expected.positions, weights))


def test_many_chunks_of_slots(device):
    tokens = 1400 if device == "cpu" else 20000
    x, expert_ids = data.gaussian((tokens, 1)), routing(tokens, 4, 6)
    got = moe_permute(*on(device, x, expert_ids), 6, backend="triton") if device != "cpu" else None
    if got is not None:
        assert_permuted_equal(got, moe.moe_permute(x, expert_ids, 6))
        return
    from blockscale.ops._triton import permute

    positions = torch.empty((tokens, 4), dtype=torch.int32)
    m_indices = torch.empty(moe.permuted_rows(tokens * 4, 6), dtype=torch.int32)
    permute.route(expert_ids, 6, 128, positions, m_indices)
    expected = moe.moe_permute(x, expert_ids, 6)
    assert_bitwise_equal(positions, expected.positions)
    assert_bitwise_equal(m_indices, expected.m_indices)


def test_rows_at_a_stride(device):
    wide = data.gaussian((20, 96)).to(device)
    expert_ids = routing(20, 2, 4)
    for x in (wide[:, 32:64], wide[:, ::3]):
        got = moe_permute(x, expert_ids.to(device), 4, alignment=8, backend="triton")
        assert_permuted_equal(got, moe.moe_permute(x.cpu(), expert_ids, 4, alignment=8))
    weights = torch.rand((20, 2))
    rows = wide.repeat(8, 1)[:, 16:80]
    out = moe_unpermute(rows, got.positions, weights.to(device), backend="triton")
    assert_bitwise_equal(out.cpu(), moe.moe_unpermute(rows.cpu(), got.positions.cpu(), weights))


@pytest.mark.parametrize(("tokens", "topk", "columns"), [(0, 2, 16), (3, 0, 16), (3, 2, 0)])
def test_empty_tensors(device, tokens, topk, columns):
    x = torch.zeros((tokens, columns), dtype=torch.bfloat16)
    expert_ids = torch.zeros((tokens, topk), dtype=torch.int64)
    got = moe_permute(*on(device, x, expert_ids), 4, backend="triton")
    assert_permuted_equal(got, moe.moe_permute(x, expert_ids, 4))
    weights = torch.zeros((tokens, topk))
    out = moe_unpermute(got.rows, got.positions, weights.to(device), backend="triton")
    assert_bitwise_equal(out.cpu(), torch.zeros((tokens, columns), dtype=torch.bfloat16))


@pytest.mark.gpu
def test_the_way_there_and_back_can_be_captured_in_a_graph():
    x, expert_ids = data.gaussian((64, 256)).cuda(), routing(64, 4, 16).cuda()
    weights = torch.rand((64, 4), device="cuda")

    def run():
        permuted = moe_permute(x, expert_ids, 16)
        return permuted, moe_unpermute(permuted.rows, permuted.positions, weights)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        permuted, out = run()
    other = routing(64, 4, 16, seed=5)
    expert_ids.copy_(other)
    graph.replay()
    expected = moe.moe_permute(x.cpu(), other, 16)
    assert_permuted_equal(permuted, expected)
    assert_bitwise_equal(out.cpu(), moe.moe_unpermute(expected.rows, expected.positions, weights.cpu()))


def test_the_cpu_takes_the_reference():
    x, expert_ids = data.gaussian((5, 16)), routing(5, 2, 4)
    got, expected = moe_permute(x, expert_ids, 4), moe.moe_permute(x, expert_ids, 4)
    assert_permuted_equal(got, expected)
    weights = torch.rand((5, 2))
    out = moe_unpermute(got.rows, got.positions, weights)
    assert_bitwise_equal(out, moe.moe_unpermute(expected.rows, expected.positions, weights))


def test_bad_arguments_are_named():
    x, expert_ids = torch.zeros(4, 8), torch.zeros((4, 2), dtype=torch.int64)
    with pytest.raises(BlockscaleError, match="moe_permute: expert_ids: wrong shape"):
        moe_permute(x, expert_ids[:2], 2)
    with pytest.raises(BlockscaleError, match="moe_permute: backend: unknown backend"):
        moe_permute(x, expert_ids, 2, backend="cuda")
    with pytest.raises(BlockscaleError, match="moe_unpermute: weights: bad dtype"):
        moe_unpermute(x, expert_ids.int(), expert_ids)


@pytest.mark.parametrize(
    ("tokens", "topk", "experts", "columns"), [(1, 8, 66, 48), (9, 3, 10, 96), (128, 8, 20, 32)]
)
def test_a_room_for_every_expert(device, tokens, topk, experts, columns):
    if device == "cpu":
        tokens = min(tokens, 40)  # 320 slots: more than are compared at once, and more tokens than experts
    codes, scale = quantize_activation(data.gaussian((tokens, columns)), 16, scale_layout="column")
    expert_ids = routing(tokens, topk, experts).int()
    expert_ids[0, 0] = -1
    expected = moe.moe_permute_masked(codes, expert_ids, experts, scale)
    got = moe_permute_masked(*on(device, codes, expert_ids), experts, scale.to(device), backend="triton")
    assert_bitwise_equal(got.masked_m.cpu(), expected.masked_m, "masked_m")
    assert_bitwise_equal(got.positions.cpu(), expected.positions, "positions")
    assert got.rows.shape == (experts, -(-tokens // 4) * 4, columns)
    assert got.scale.stride() == expected.scale.stride()
    valid = torch.arange(got.rows.shape[1]) < expected.masked_m[:, None]
    assert_bitwise_equal(got.rows.cpu()[valid], expected.rows[valid], "rows")
    assert_bitwise_equal(got.scale.cpu()[valid], expected.scale[valid], "scale")
    flat = expected.rows.flatten(0, 1)
    for token in range(tokens):
        for position in expected.positions[token].tolist():
            if position >= 0:
                assert_bitwise_equal(flat[position], codes[token], "a token's row")


def test_a_room_holds_high_precision_rows_too(device):
    x, expert_ids = data.gaussian((5, 24), torch.bfloat16), routing(5, 2, 3)
    got = moe_permute_masked(*on(device, x, expert_ids), 3, backend="triton")
    back = moe_unpermute(got.rows.flatten(0, 1), got.positions, torch.full((5, 2), 0.5, device=device))
    assert got.scale is None
    assert_bitwise_equal(back.cpu(), x, "half of a row twice")
