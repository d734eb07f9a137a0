"""Rows of tokens to their experts and back, in plain PyTorch.

A token t has `topk` slots (t, j), each routed to expert expert_ids[t, j]. Permuted, the rows of an expert
are one segment, in order of (t, j); segments follow each other in order of the experts, each padded to a
multiple of `alignment` rows, so that no tile of a grouped GEMM sees two experts. On the way back

    out[t] = sum over j of weights[t, j] * rows[positions[t, j]]

in float32, j ascending, every product and every sum rounded: the same bits every time and everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blockscale.errors import BlockscaleError
from blockscale.reference import checks
from blockscale.reference.fp8 import empty_scale

ROW_ALIGNMENT = 128


@dataclass(frozen=True)
class Permuted:
    """Rows sorted by expert, and the way back.

    Attributes:
        rows: (M, K), of the dtype of the tokens; M from permuted_rows, of which the last may be unused.
        scale: (M, G) float32, column-major, or None if there was none.
        m_indices: int32 (M,), expert of each row, -1 for padding (whose rows and scales mean nothing).
        positions: int32 (T, topk), row of each slot, -1 where it has none.
    """

    rows: torch.Tensor
    scale: torch.Tensor | None
    m_indices: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class PermutedMasked:
    """Rows in a room of their own for every expert, and the way back.

    Attributes:
        rows: (E, Mmax, K), of the dtype of the tokens; Mmax from expert_room.
        scale: (E, Mmax, G) float32, strides (Mmax, 1, E * Mmax), or None if there was none.
        masked_m: int32 (E,), rows of every expert that count; what the others hold is undefined.
        positions: int32 (T, topk), e * Mmax + i of each slot, -1 where it has none.
    """

    rows: torch.Tensor
    scale: torch.Tensor | None
    masked_m: torch.Tensor
    positions: torch.Tensor


def expert_room(tokens: int) -> int:
    """Mmax for tokens that go to an expert once at most: a multiple of 4, so that scales are aligned."""
    return -(-tokens // 4) * 4


def permuted_rows(slots: int, num_experts: int, alignment: int = ROW_ALIGNMENT) -> int:
    """M that suffices for any routing of `slots` rows, known without looking at it."""
    return (slots + min(slots, num_experts) * (alignment - 1)) // alignment * alignment


def moe_permute(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    scale: torch.Tensor | None = None,
    alignment: int = ROW_ALIGNMENT,
) -> Permuted:
    """Copy every token's row (and scales) to each of its experts' segments.

    Args:
        x: (T, K), float8_e4m3fn, BF16, F16 or F32.
        expert_ids: int32 or int64 (T, topk); a slot outside 0 .. num_experts - 1 gets no row.
        num_experts: E.
        scale: float32 (T, G), scales of x, any strides.
        alignment: rows a segment is padded to a multiple of.
    """
    check_permute("moe_permute", x, expert_ids, num_experts, scale)
    flat = expert_ids.reshape(-1).to(torch.int64)
    here = (flat >= 0) & (flat < num_experts)
    order = torch.where(here, flat, num_experts).argsort(stable=True)[: int(here.sum())]
    experts = flat[order]
    counts = torch.bincount(experts, minlength=num_experts)
    padded = (counts + alignment - 1) // alignment * alignment
    first_slot, first_row = counts.cumsum(0) - counts, padded.cumsum(0) - padded
    row = first_row[experts] + torch.arange(len(order), device=x.device) - first_slot[experts]

    rows = permuted_rows(flat.numel(), num_experts, alignment)
    positions = torch.full_like(flat, -1, dtype=torch.int32)
    positions[order] = row.to(torch.int32)
    m_indices = torch.full((rows,), -1, dtype=torch.int32, device=x.device)
    m_indices[row] = experts.to(torch.int32)
    token = order // max(1, expert_ids.shape[1])
    permuted = torch.zeros((rows, x.shape[1]), dtype=x.dtype, device=x.device)
    permuted.view(torch.uint8)[row] = x.detach().contiguous().view(torch.uint8)[token]
    row_scale = None
    if scale is not None:
        row_scale = empty_scale((rows, scale.shape[1]), "column", x.device).zero_()
        row_scale[row] = scale.detach()[token]
    return Permuted(permuted, row_scale, m_indices, positions.view(expert_ids.shape))


def moe_permute_masked(
    x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int, scale: torch.Tensor | None = None
) -> PermutedMasked:
    """Copy every token's row (and scales) to the rooms of its experts, in order of (t, j).

    Args:
        x: (T, K), float8_e4m3fn, BF16, F16 or F32.
        expert_ids: int32 or int64 (T, topk), distinct for a token; a slot outside 0 .. num_experts - 1 gets
            no row.
        num_experts: E.
        scale: float32 (T, G), scales of x, any strides.
    """
    room = expert_room(x.shape[0])
    sorted_ = moe_permute(x, expert_ids, num_experts, scale, alignment=1)
    expert = sorted_.m_indices
    here = expert >= 0
    counts = torch.bincount(expert[here].long(), minlength=num_experts)
    first = counts.cumsum(0) - counts
    index = torch.arange(len(expert), device=x.device)
    place = torch.where(here, expert * room + index - first[expert.long()], 0).long()
    rows = torch.zeros((num_experts * room, x.shape[1]), dtype=x.dtype, device=x.device)
    rows.view(torch.uint8)[place[here]] = sorted_.rows.view(torch.uint8)[here]
    row_scale = None
    if sorted_.scale is not None:
        row_scale = empty_scale((num_experts * room, sorted_.scale.shape[1]), "column", x.device).zero_()
        row_scale[place[here]] = sorted_.scale[here]
        row_scale = row_scale.view(num_experts, room, -1)
    taken = sorted_.positions >= 0
    positions = torch.where(taken, place[sorted_.positions.clamp(min=0).long()], -1).to(torch.int32)
    return PermutedMasked(rows.view(num_experts, room, -1), row_scale, counts.to(torch.int32), positions)


def moe_unpermute(rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each token's rows, in float32 and rounded once to the dtype of rows.

    Args:
        rows: (M, N), BF16, F16 or F32: what the experts made of Permuted.rows.
        positions: int32 (T, topk), Permuted.positions; a slot at -1 adds nothing.
        weights: float32 (T, topk).

    Returns:
        (T, N).
    """
    check_unpermute("moe_unpermute", rows, positions, weights)
    out = torch.zeros((positions.shape[0], rows.shape[1]), dtype=torch.float32, device=rows.device)
    for choice in range(positions.shape[1]):
        (token,) = (positions[:, choice] >= 0).nonzero(as_tuple=True)
        row = rows.detach()[positions[token, choice].to(torch.int64)].to(torch.float32)
        out[token] = out[token] + weights.detach()[token, choice, None] * row
    return out.masked_fill(out.isnan(), torch.nan).to(rows.dtype)


def check_permute(
    op: str, x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int, scale: torch.Tensor | None
) -> None:
    """Tokens (T, K), their experts (T, topk) and scales (T, G), on one device."""
    checks.check_dtype(f"{op}: x", x.dtype, (checks.CODES, *checks.HIGH_PRECISION))
    checks.check_dtype(f"{op}: expert_ids", expert_ids.dtype, (torch.int32, torch.int64))
    if not isinstance(num_experts, int) or num_experts < 1:
        raise BlockscaleError(
            "bad value", where=f"{op}: num_experts", expected="a positive integer", got=repr(num_experts)
        )
    others = [("x", x, "(T, K)"), ("expert_ids", expert_ids, "(T, topk)")]
    if scale is not None:
        checks.check_dtype(f"{op}: scale", scale.dtype, (torch.float32,))
        others.append(("scale", scale, "(T, G)"))
    _check_rows(op, others)


def check_unpermute(op: str, rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> None:
    """Rows (M, N), positions and weights (T, topk), on one device."""
    checks.check_dtype(f"{op}: rows", rows.dtype, checks.HIGH_PRECISION)
    checks.check_dtype(f"{op}: positions", positions.dtype, (torch.int32,))
    checks.check_dtype(f"{op}: weights", weights.dtype, (torch.float32,))
    _check_rows(op, [("positions", positions, "(T, topk)"), ("weights", weights, "(T, topk)")])
    checks.check_shape(f"{op}: weights", tuple(weights.shape), tuple(positions.shape))
    if rows.dim() != 2 or rows.device != positions.device:
        raise BlockscaleError(
            "wrong shape or device",
            where=f"{op}: rows",
            expected=f"(M, N) on {positions.device}",
            got=f"{list(rows.shape)} on {rows.device}",
        )


def _check_rows(op: str, tensors: list[tuple[str, torch.Tensor, str]]) -> None:
    """All two-dimensional, with the tokens of the first, on its device."""
    first = tensors[0][1]
    for name, tensor, shape in tensors:
        if tensor.dim() != 2 or tensor.shape[0] != first.shape[0]:
            raise BlockscaleError(
                "wrong shape", where=f"{op}: {name}", expected=shape, got=list(tensor.shape)
            )
        if tensor.device != first.device:
            raise BlockscaleError(
                "on another device", where=f"{op}: {name}", expected=first.device, got=tensor.device
            )
