"""Token rows to a room of their own for every expert: for few tokens, in one kernel.

rows[e, i] is the i-th row of expert e, in order of the slots (t, j); every expert has room for `capacity`
rows. A program takes a token: it counts, for each of its slots, the slots before it with the same expert, and
copies the token's row to all its places. The first E programs also count an expert's slots. No atomics: the
same input gives the same positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import current, next_power_of_2, overlap, wait_for_previous_kernel
from blockscale.ops._triton.launch import quick

_SLOTS_AT_ONCE = 256  # that a token's slots are compared with
_COPY_BYTES = 4096  # of a row moved at a time


@quick
@triton.jit(do_not_specialize=["tokens", "capacity"])
def _permute_masked_kernel(
    x_ptr,
    scale_ptr,
    ids_ptr,
    rows_ptr,
    row_scale_ptr,
    counts_ptr,
    positions_ptr,
    tokens,
    experts,
    capacity,
    row_bytes,
    x_stride,
    groups,
    scale_row_stride,
    scale_group_stride,
    row_scale_stride,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous_kernel(OVERLAPS)
    program = tl.program_id(0)
    if program < experts:
        count = tl.zeros((AT_ONCE,), tl.int32)
        for first in range(0, tokens * TOPK, AT_ONCE):
            slot = first + tl.arange(0, AT_ONCE)
            ids = tl.load(ids_ptr + slot, mask=slot < tokens * TOPK, other=-1)
            count += (ids == program).to(tl.int32)
        tl.store(counts_ptr + program, tl.sum(count, axis=0))
    if program < tokens:
        token, choice = program.to(tl.int64), tl.arange(0, SLOTS)
        mine = program * TOPK + choice
        ids = tl.load(ids_ptr + mine, mask=choice < TOPK, other=-1).to(tl.int32)
        rank = tl.zeros((SLOTS,), tl.int32)
        first = 0
        while first < (program + 1) * TOPK:
            slot = first + tl.arange(0, AT_ONCE)
            others = tl.load(ids_ptr + slot, mask=slot < tokens * TOPK, other=-1).to(tl.int32)
            same = (others[:, None] == ids[None, :]) & (slot[:, None] < mine[None, :])  # (AT_ONCE, SLOTS)
            rank += tl.sum(same.to(tl.int32), axis=0)
            first += AT_ONCE
        valid = (ids >= 0) & (ids < experts)
        position = tl.where(valid, ids * capacity + rank, -1)
        tl.store(positions_ptr + mine, position, mask=choice < TOPK)
        for first in range(0, row_bytes, BLOCK):
            offset = first + tl.arange(0, BLOCK)
            row = tl.load(x_ptr + token * x_stride + offset, mask=offset < row_bytes)
            for j in tl.static_range(TOPK):
                to = tl.sum(tl.where(choice == j, position, 0), axis=0).to(tl.int64)
                end = tl.where(to >= 0, row_bytes, 0)
                tl.store(rows_ptr + to * row_bytes + offset, row, mask=offset < end)
        if GROUPS > 0:
            group = tl.arange(0, GROUPS).to(tl.int64)
            at = scale_ptr + token * scale_row_stride + group * scale_group_stride
            scale = tl.load(at, mask=group < groups)
            for j in tl.static_range(TOPK):
                to = tl.sum(tl.where(choice == j, position, 0), axis=0).to(tl.int64)
                end = tl.where(to >= 0, groups, 0)
                tl.store(row_scale_ptr + to + group * row_scale_stride, scale, mask=group < end)


def permute_masked(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    expert_ids: torch.Tensor,
    outputs: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor],
) -> None:
    """Fill rows (E, Mmax, K), their scales (E, Mmax, G) or None, counts (E,) and positions (T, topk).

    x (T, K) with unit stride along K, its scales (T, G) at any strides, expert_ids (T, topk) contiguous;
    the scales of rows as (E * Mmax, G), column-major.
    """
    rows, row_scale, counts, positions = outputs
    tokens, topk = expert_ids.shape
    experts, capacity = rows.shape[:2]
    source, target = x.view(torch.uint8), rows.view(torch.uint8)
    from_scale, to_scale = (source, target) if scale is None or row_scale is None else (scale, row_scale)
    groups = 0 if scale is None else scale.shape[1]
    with current(x.device):
        _permute_masked_kernel[(max(tokens, experts),)](
            source,
            from_scale,
            expert_ids,
            target,
            to_scale,
            counts,
            positions,
            tokens,
            experts,
            capacity,
            target.shape[2],
            source.stride(0),
            groups,
            from_scale.stride(0),
            from_scale.stride(1),
            to_scale.stride(-1),
            TOPK=topk,
            SLOTS=next_power_of_2(topk),
            AT_ONCE=_SLOTS_AT_ONCE,
            BLOCK=min(_COPY_BYTES, next_power_of_2(target.shape[2])),
            GROUPS=next_power_of_2(groups) if groups else 0,
            num_warps=4,
            **overlap(x.device),
        )
