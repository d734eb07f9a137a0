"""Token rows to their experts' segments and back: the fast form of `blockscale.reference.moe`."""

from __future__ import annotations

from typing import TypeVar

import torch

from blockscale.ops import dispatch, gemm_audit
from blockscale.reference import moe
from blockscale.reference.fp8 import empty_scale
from blockscale.reference.moe import ROW_ALIGNMENT, Permuted, PermutedMasked

Moved = TypeVar("Moved", Permuted, PermutedMasked)


def moe_permute(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    scale: torch.Tensor | None = None,
    alignment: int = ROW_ALIGNMENT,
    *,
    backend: dispatch.Backend = "auto",
) -> Permuted:
    """Copy every token's row (and scales) to each of its experts' segments; the host waits for nothing.

    Args:
        x: (T, K), float8_e4m3fn, BF16, F16 or F32; rows at any stride.
        expert_ids: int32 or int64 (T, topk); a slot outside 0 .. num_experts - 1 gets no row.
        num_experts: E.
        scale: float32 (T, G), scales of x, any strides.
        alignment: rows a segment is padded to a multiple of.
        backend: "auto" takes the fastest that works for the tensors' device.

    Returns:
        Permuted: rows (M, K) in order of (expert, token, slot), scale (M, G) column-major, m_indices (M,)
        with -1 on padding and positions (T, topk). M is the most any routing could need. What padding rows
        hold is undefined.

    Raises:
        BlockscaleError: wrong dtype, shape or device, unknown backend.
    """
    op = "moe_permute"
    moe.check_permute(op, x, expert_ids, num_experts, scale)
    kernels = dispatch.triton_kernels(op, "permute", x.device, backend)
    if kernels is None:
        return _told(x, moe.moe_permute(x, expert_ids, num_experts, scale, alignment))
    m = moe.permuted_rows(expert_ids.numel(), num_experts, alignment)
    rows = torch.empty((m, x.shape[1]), dtype=x.dtype, device=x.device)
    row_scale = None if scale is None else empty_scale((m, scale.shape[1]), "column", x.device)
    positions = torch.empty(expert_ids.shape, dtype=torch.int32, device=x.device)
    m_indices = torch.empty(m, dtype=torch.int32, device=x.device)
    if expert_ids.numel():
        kernels.route(expert_ids.contiguous(), num_experts, alignment, positions, m_indices)
    if rows.numel():
        scales = None if scale is None or row_scale is None else (scale.detach(), row_scale)
        kernels.scatter(dispatch.as_rows(x), positions, rows, scales)
    return _told(x, Permuted(rows, row_scale, m_indices, positions))


def moe_permute_masked(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    scale: torch.Tensor | None = None,
    *,
    backend: dispatch.Backend = "auto",
) -> PermutedMasked:
    """Copy every token's row (and scales) to the rooms of its experts; for few tokens, in one kernel.

    Args:
        x: (T, K), float8_e4m3fn, BF16, F16 or F32; rows at any stride.
        expert_ids: int32 or int64 (T, topk), distinct for a token; a slot outside 0 .. num_experts - 1 gets
            no row.
        num_experts: E.
        scale: float32 (T, G), scales of x, any strides.
        backend: "auto" takes the fastest that works for the tensors' device.

    Returns:
        PermutedMasked: rows (E, Mmax, K) with room for all tokens at every expert, scale, masked_m (E,) and
        positions (T, topk).

    Raises:
        BlockscaleError: wrong dtype, shape or device, unknown backend.
    """
    op = "moe_permute_masked"
    moe.check_permute(op, x, expert_ids, num_experts, scale)
    kernels = dispatch.triton_kernels(op, "permute_masked", x.device, backend)
    if kernels is None or not expert_ids.numel():
        return _told(x, moe.moe_permute_masked(x, expert_ids, num_experts, scale))
    room, device = moe.expert_room(x.shape[0]), x.device
    rows = torch.empty((num_experts, room, x.shape[1]), dtype=x.dtype, device=device)
    row_scale = None
    if scale is not None:
        row_scale = empty_scale((num_experts * room, scale.shape[1]), "column", device)
        row_scale = row_scale.view(num_experts, room, -1)
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    positions = torch.empty(expert_ids.shape, dtype=torch.int32, device=device)
    scale = None if scale is None else scale.detach()
    outputs = rows, row_scale, counts, positions
    kernels.permute_masked(dispatch.as_rows(x), scale, expert_ids.contiguous(), outputs)
    return _told(x, PermutedMasked(rows, row_scale, counts, positions))


def moe_unpermute(
    rows: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor,
    *,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """out[t] = sum over j of weights[t, j] * rows[positions[t, j]], in float32, j ascending, rounded once.

    Args:
        rows: (M, N), BF16, F16 or F32; rows at any stride.
        positions: int32 (T, topk), of moe_permute; a slot at -1 adds nothing.
        weights: float32 (T, topk).
        backend: "auto" takes the fastest that works for the tensors' device.

    Returns:
        (T, N), of the dtype of rows.

    Raises:
        BlockscaleError: wrong dtype, shape or device, unknown backend.
    """
    op = "moe_unpermute"
    moe.check_unpermute(op, rows, positions, weights)
    kernels = dispatch.triton_kernels(op, "permute", rows.device, backend)
    if kernels is None:
        return moe.moe_unpermute(rows, positions, weights)
    out = torch.empty((positions.shape[0], rows.shape[1]), dtype=rows.dtype, device=rows.device)
    if out.numel():
        weights = weights.detach().contiguous()
        kernels.combine(dispatch.as_rows(rows), positions.contiguous(), weights, out)
    return out


def _told(x: torch.Tensor, moved: Moved) -> Moved:
    """The same; an audit of GEMMs hears where the rows of codes went."""
    if gemm_audit.current is not None:
        gemm_audit.current.remember_moved(x, moved.rows, moved.positions)
    return moved
