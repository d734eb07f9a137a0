"""Permutation of token rows: against an oracle in plain Python, and there and back."""

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.reference import moe, quantize_activation
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal


def routing(tokens, topk, experts, seed=0):
    """Distinct experts for every token, more of them among the first ones."""
    scores = torch.rand((tokens, experts), generator=torch.Generator().manual_seed(seed))
    return (scores / torch.arange(1, experts + 1)).topk(topk, dim=1).indices


def oracle(expert_ids, experts, alignment):
    """(positions, m_indices) with lists."""
    members = {expert: [] for expert in range(experts)}
    for token, chosen in enumerate(expert_ids.tolist()):
        for choice, expert in enumerate(chosen):
            if expert in members:
                members[expert].append((token, choice))
    positions = torch.full(expert_ids.shape, -1, dtype=torch.int32)
    m_indices = []
    for expert, slots in members.items():
        for slot in slots:
            positions[slot] = len(m_indices)
            m_indices.append(expert)
        m_indices += [-1] * (-len(m_indices) % alignment)
    return positions, m_indices


@pytest.mark.parametrize("alignment", [128, 16])
@pytest.mark.parametrize(("tokens", "topk", "experts"), [(37, 4, 16), (1, 8, 256), (200, 2, 3), (0, 2, 4)])
def test_rows_go_to_the_segments_of_their_experts(tokens, topk, experts, alignment):
    expert_ids = routing(tokens, topk, experts)
    x = data.gaussian((tokens, 48))
    codes, scale = quantize_activation(x, 16)
    got = moe.moe_permute(codes, expert_ids, experts, scale, alignment)
    positions, m_indices = oracle(expert_ids, experts, alignment)
    assert_bitwise_equal(got.positions, positions)
    rows = moe.permuted_rows(tokens * topk, experts, alignment)
    assert got.m_indices.tolist() == m_indices + [-1] * (rows - len(m_indices))
    assert rows % alignment == 0
    assert got.scale.shape == (rows, 3)
    assert got.scale.stride() == (1, rows)
    for choice in range(topk):
        at = positions[:, choice].long()
        assert_bitwise_equal(got.rows[at], codes)
        assert_bitwise_equal(got.scale[at], scale)
    for first in range(0, rows, alignment):
        assert (
            len({expert for expert in got.m_indices[first : first + alignment].tolist() if expert >= 0}) <= 1
        )


def test_the_bound_on_rows_is_reached_and_never_passed():
    assert moe.permuted_rows(3, 4) == 3 * 128
    assert moe.permuted_rows(1000, 4) == 1408  # 1 + 1 + 1 + 997 rows of four experts: 11 tiles
    assert moe.permuted_rows(0, 4) == 0


def test_slots_of_other_experts_get_no_row():
    expert_ids = torch.tensor([[0, 5], [-1, 1], [2, 0]])
    got = moe.moe_permute(data.gaussian((3, 8)), expert_ids, 2, alignment=4)
    assert got.positions.tolist() == [[0, -1], [-1, 4], [-1, 1]]
    assert got.m_indices.tolist() == [0, 0, -1, -1, 1] + [-1] * 7
    assert got.scale is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back_with_weights(dtype):
    expert_ids = routing(50, 3, 8)
    x = data.gaussian((50, 40), dtype)
    weights = torch.rand((50, 3), generator=torch.Generator().manual_seed(1))
    permuted = moe.moe_permute(x, expert_ids, 8)
    got = moe.moe_unpermute(permuted.rows, permuted.positions, weights)
    total = (weights[:, 0, None] * x.float() + weights[:, 1, None] * x.float()) + weights[
        :, 2, None
    ] * x.float()
    assert_bitwise_equal(got, total.to(dtype))


def test_a_slot_without_a_row_adds_nothing():
    rows = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]])
    positions = torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32)
    got = moe.moe_unpermute(rows, positions, torch.full((2, 2), 0.5))
    assert got.tolist() == [[0.5, 1.0], [0.0, 0.0]]


_X = torch.zeros((4, 6), dtype=torch.bfloat16)
_IDS = torch.zeros((4, 2), dtype=torch.int64)
_AT = _IDS.int()
_BAD_CALLS = {
    "moe_permute: expert_ids: bad dtype": lambda: moe.moe_permute(_X, _IDS.float(), 2),
    "moe_permute: expert_ids: wrong shape": lambda: moe.moe_permute(_X, _IDS[:3], 2),
    "moe_permute: x: wrong shape": lambda: moe.moe_permute(_X[0], _IDS, 2),
    "moe_permute: num_experts: bad value": lambda: moe.moe_permute(_X, _IDS, 0),
    "moe_permute: scale: bad dtype": lambda: moe.moe_permute(_X, _IDS, 2, _X),
    "moe_permute: scale: on another device": lambda: moe.moe_permute(
        _X, _IDS, 2, torch.zeros((4, 1), device="meta")
    ),
    "moe_unpermute: positions: bad dtype": lambda: moe.moe_unpermute(_X, _IDS, torch.ones(4, 2)),
    "moe_unpermute: weights: wrong shape": lambda: moe.moe_unpermute(_X, _AT, torch.ones(4, 3)),
    "moe_unpermute: rows: wrong shape or device": lambda: moe.moe_unpermute(_X[0], _AT, torch.ones(4, 2)),
}


@pytest.mark.parametrize("message", _BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(BlockscaleError, match=message):
        _BAD_CALLS[message]()
