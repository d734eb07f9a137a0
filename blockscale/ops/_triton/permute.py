"""Token rows into expert-contiguous segments and back, on the GPU, without a host synchronization.

Routing is a stable counting sort in three small kernels: how many slots of every chunk go to every expert;
where each chunk's slots of an expert begin (segments padded to whole tiles); the rank of a slot among the
equal ones of its chunk. No atomics: the same input gives the same positions. Then each row is read once and
written to its `topk` places; padding rows are not written. The way back sums `topk` rows in float32, first
choice first.

expert_ids (T, topk) integers; positions (T, topk) int32, the row of each slot, -1 for none; m_indices (M,)
int32, the expert of each row, -1 for padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import cdiv, current, next_power_of_2, overlap, wait_for_previous_kernel
from blockscale.ops._triton.e4m3 import narrow_canonical, widen
from blockscale.ops._triton.launch import quick

_CHUNK = 128  # slots a program ranks by comparing all pairs
_CHUNKS_AT_ONCE = 32  # rows of counts that one program sums at a time
_COPY_BYTES = 4096  # of a row moved at a time: 32 bytes a thread
_COMBINE_VALUES = 1024  # of a row summed at a time: 8 a thread, times topk rows in flight


@quick
@triton.jit(do_not_specialize=["slots"])
def _count_kernel(
    ids_ptr, counts_ptr, slots, experts, CHUNK: tl.constexpr, PIECE: tl.constexpr, EXPERTS: tl.constexpr
):
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), dtype=tl.int32)
    for first in range(0, CHUNK, PIECE):
        slot = chunk * CHUNK + first + tl.arange(0, PIECE)
        ids = tl.load(ids_ptr + slot, mask=slot < slots, other=-1).to(tl.int32)
        count += tl.sum((ids[:, None] == expert[None, :]).to(tl.int32), axis=0)  # (PIECE, EXPERTS)
    tl.store(counts_ptr + chunk * experts + expert, count, mask=expert < experts)


@quick
@triton.jit(do_not_specialize=["chunks"])
def _segment_kernel(
    counts_ptr, chunks, experts, ALIGNMENT: tl.constexpr, AT_ONCE: tl.constexpr, EXPERTS: tl.constexpr
):
    """Replace every chunk's counts by the row where its slots of each expert begin."""
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), dtype=tl.int32)
    first = 0
    while first < chunks:
        chunk = first + tl.arange(0, AT_ONCE)
        at = counts_ptr + chunk[:, None] * experts + expert[None, :]  # (AT_ONCE, EXPERTS)
        mask = (chunk < chunks)[:, None] & (expert < experts)[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0), axis=0)
        first += AT_ONCE
    padded = tl.cdiv(total, ALIGNMENT) * ALIGNMENT
    start = tl.cumsum(padded, axis=0) - padded
    first = 0
    while first < chunks:
        chunk = first + tl.arange(0, AT_ONCE)
        at = counts_ptr + chunk[:, None] * experts + expert[None, :]
        mask = (chunk < chunks)[:, None] & (expert < experts)[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, start[None, :] + tl.cumsum(count, axis=0) - count, mask=mask)
        start += tl.sum(count, axis=0)
        first += AT_ONCE


@quick
@triton.jit(do_not_specialize=["slots"])
def _place_kernel(ids_ptr, starts_ptr, positions_ptr, m_indices_ptr, slots, experts, CHUNK: tl.constexpr):
    chunk, index = tl.program_id(0), tl.arange(0, CHUNK)
    slot = chunk * CHUNK + index
    ids = tl.load(ids_ptr + slot, mask=slot < slots, other=-1).to(tl.int32)
    valid = (ids >= 0) & (ids < experts)
    before = (ids[:, None] == ids[None, :]) & (index[None, :] < index[:, None])  # (CHUNK, CHUNK)
    start = tl.load(starts_ptr + chunk * experts + ids, mask=valid, other=0)
    position = tl.where(valid, start + tl.sum(before.to(tl.int32), axis=1), -1)
    tl.store(positions_ptr + slot, position, mask=slot < slots)
    tl.store(m_indices_ptr + position, ids, mask=valid)


@quick
@triton.jit(do_not_specialize=["scale_group_stride", "row_scale_stride"])
def _scatter_kernel(
    x_ptr,
    scale_ptr,
    positions_ptr,
    rows_ptr,
    row_scale_ptr,
    row_bytes,
    x_stride,
    groups,
    scale_row_stride,
    scale_group_stride,
    row_scale_stride,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first = 0
    while first < row_bytes:
        offset = first + tl.arange(0, BLOCK)
        row = tl.load(x_ptr + token * x_stride + offset, mask=offset < row_bytes)
        for choice in tl.static_range(TOPK):
            position = tl.load(positions_ptr + token * TOPK + choice).to(tl.int64)
            end = tl.where(position >= 0, row_bytes, 0)  # a slot of another expert gets no row
            tl.store(rows_ptr + position * row_bytes + offset, row, mask=offset < end)
        first += BLOCK
    if GROUPS > 0:
        group = tl.arange(0, GROUPS).to(tl.int64)
        scale = tl.load(
            scale_ptr + token * scale_row_stride + group * scale_group_stride, mask=group < groups
        )
        for choice in tl.static_range(TOPK):
            position = tl.load(positions_ptr + token * TOPK + choice).to(tl.int64)
            target = row_scale_ptr + position + group * row_scale_stride
            tl.store(target, scale, mask=group < tl.where(position >= 0, groups, 0))


@quick
@triton.jit
def _combine_kernel(
    rows_ptr,
    positions_ptr,
    weights_ptr,
    out_ptr,
    columns,
    rows_stride,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous_kernel(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOPK):
        position = tl.load(positions_ptr + token * TOPK + choice).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOPK + choice)
        end = tl.where(position >= 0, columns, 0)
        row = widen(tl.load(rows_ptr + position * rows_stride + column, mask=column < end, other=0.0))
        total = tl.where(position >= 0, total + weight * row, total)
    out = narrow_canonical(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * columns + column, out, mask=column < columns)


def route(
    expert_ids: torch.Tensor,
    num_experts: int,
    alignment: int,
    positions: torch.Tensor,
    m_indices: torch.Tensor,
) -> None:
    """Fill positions (T, topk) and m_indices (M,) from expert_ids (T, topk), all contiguous."""
    slots = expert_ids.numel()
    chunks = cdiv(slots, _CHUNK)
    experts = next_power_of_2(num_experts)
    counts = torch.empty((chunks, num_experts), dtype=torch.int32, device=expert_ids.device)
    m_indices.fill_(-1)
    with current(expert_ids.device):
        _count_kernel[(chunks,)](
            expert_ids, counts, slots, num_experts, CHUNK=_CHUNK, PIECE=32, EXPERTS=experts, num_warps=4
        )
        _segment_kernel[(1,)](
            counts,
            chunks,
            num_experts,
            ALIGNMENT=alignment,
            AT_ONCE=_CHUNKS_AT_ONCE,
            EXPERTS=experts,
            num_warps=8,
        )
        _place_kernel[(chunks,)](
            expert_ids, counts, positions, m_indices, slots, num_experts, CHUNK=_CHUNK, num_warps=4
        )


def scatter(
    x: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Copy row t of x (T, K), unit stride along K, to rows (M, K) at positions[t].

    The pair of scales, (T, G) at any strides and (M, G) column-major, goes with them.
    """
    tokens, topk = positions.shape
    source, target = x.view(torch.uint8), rows.view(torch.uint8)
    scale, row_scale = scales or (source, target)
    groups = scale.shape[1] if scales else 0
    with current(x.device):
        _scatter_kernel[(tokens,)](
            source,
            scale,
            positions,
            target,
            row_scale,
            target.shape[1],
            source.stride(0),
            groups,
            scale.stride(0),
            scale.stride(1),
            row_scale.stride(1),
            TOPK=topk,
            BLOCK=min(_COPY_BYTES, next_power_of_2(target.shape[1])),
            GROUPS=next_power_of_2(groups) if groups else 0,
            num_warps=4,
        )


def combine(rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """out[t] = sum of weights[t, j] * rows[positions[t, j]], j ascending, in float32."""
    tokens, topk = positions.shape
    columns = rows.shape[1]
    block = min(_COMBINE_VALUES, next_power_of_2(columns))
    with current(rows.device):
        _combine_kernel[(tokens, cdiv(columns, block))](
            rows,
            positions,
            weights,
            out,
            columns,
            rows.stride(0),
            TOPK=topk,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
            **overlap(rows.device),
        )
