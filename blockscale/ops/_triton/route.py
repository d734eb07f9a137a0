"""The choice of experts, as `blockscale/reference/routing.py` defines it, and logits of few tokens.

logits (P, T, E) float32, P parts to be added up, bias (E,) or none; experts int32 and weights float32
(T, topk + shared). A program holds a few tokens with all their experts in registers, and takes the best of
what is left again and again.

For few tokens a program of `_logits_kernel` computes a part, over a share of the K inputs: one that took all
of them would be alone with reading the weights. Products of 16-bit numbers are exact, sums float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import cdiv, current, next_power_of_2, overlap, wait_for_previous_kernel
from blockscale.ops._triton.e4m3 import operand
from blockscale.ops._triton.launch import quick
from blockscale.reference.routing import Routing

_VALUES = 1024  # logits of a program: 8 a thread
_PARTS = 16  # shares of K
_STEP = 128  # of K
_TOKENS = 16  # the least of a tensor core product


@quick
@triton.jit(do_not_specialize=["tokens"])
def _logits_kernel(
    x_ptr,
    weight_ptr,
    parts_ptr,
    tokens,
    experts,
    width,
    x_stride,
    STEPS: tl.constexpr,
    STEP: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous_kernel(OVERLAPS)
    part, token = tl.program_id(0), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    logits = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for step in tl.static_range(STEPS):
        column = (part * STEPS + step) * STEP + tl.arange(0, STEP)
        inside = (column < width)[None, :]
        at = weight_ptr + expert[:, None] * width + column[None, :]
        weight = operand(tl.load(at, mask=(expert < experts)[:, None] & inside, other=0.0), dtype)
        at = x_ptr + token.to(tl.int64)[:, None] * x_stride + column[None, :]
        x = operand(tl.load(at, mask=(token < tokens)[:, None] & inside, other=0.0), dtype)
        logits = tl.dot(x, tl.trans(weight), logits)
    at = parts_ptr + (part * tokens + token)[:, None] * experts + expert[None, :]
    tl.store(at, logits, mask=(token < tokens)[:, None] & (expert < experts)[None, :])


@triton.jit
def _best(values, index):
    """The largest of every row, its index (the lowest among equals) and where it is."""
    at = tl.argmax(values, axis=1)
    hit = index[None, :] == at[:, None]
    return tl.max(values, axis=1), at, hit


@triton.jit
def _among_groups(choice, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUP_BEST: tl.constexpr):
    """choice (TOKENS, EXPERTS), -inf outside the best groups."""
    TOKENS: tl.constexpr = choice.shape[0]
    EXPERTS: tl.constexpr = choice.shape[1]
    SIZE: tl.constexpr = EXPERTS // GROUPS
    rows = tl.reshape(choice, (TOKENS * GROUPS, SIZE))
    best, _, hit = _best(rows, tl.arange(0, SIZE))
    if GROUP_BEST == 2:
        best += tl.max(tl.where(hit, float("-inf"), rows), axis=1)
    best = tl.reshape(best, (TOKENS, GROUPS))
    kept = tl.zeros((TOKENS, GROUPS), tl.int32)
    for _ in tl.static_range(TOPK_GROUP):
        _, _, hit = _best(best, tl.arange(0, GROUPS))
        kept = tl.where(hit, 1, kept)
        best = tl.where(hit, float("-inf"), best)
    rows = tl.where(tl.reshape(kept, (TOKENS * GROUPS,))[:, None] > 0, rows, float("-inf"))
    return tl.reshape(rows, (TOKENS, EXPERTS))


@quick
@triton.jit(do_not_specialize=["tokens"])
def _route_kernel(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    tokens,
    experts,
    scale,
    PARTS: tl.constexpr,
    TOPK: tl.constexpr,
    SHARED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_previous_kernel(OVERLAPS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    mask = (token < tokens)[:, None] & (expert < experts)[None, :]
    at = token.to(tl.int64)[:, None] * experts + expert[None, :]
    logits = tl.load(logits_ptr + at, mask=mask, other=float("-inf"))
    for part in tl.static_range(1, PARTS):
        logits += tl.load(logits_ptr + part * tokens * experts + at, mask=mask, other=0.0)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        top = tl.max(logits, axis=1)
        powers = tl.exp(logits - tl.where(token < tokens, top, 0.0)[:, None])
        scores = powers / tl.sum(powers, axis=1)[:, None]
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=expert < experts, other=0.0)[None, :]
    choice = tl.where(mask, choice, float("-inf"))
    if GROUPS > 1:
        choice = _among_groups(choice, GROUPS, TOPK_GROUP, GROUP_BEST)
    chosen = tl.zeros((TOKENS, SLOTS), tl.int32)
    weights = tl.zeros((TOKENS, SLOTS), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    for j in tl.static_range(TOPK):
        _, at_expert, hit = _best(choice, expert)
        weight = tl.sum(tl.where(hit, scores, 0.0), axis=1)
        chosen = tl.where((slot == j)[None, :], at_expert[:, None], chosen)
        weights = tl.where((slot == j)[None, :], weight[:, None], weights)
        choice = tl.where(hit, float("-inf"), choice)
        total += weight
    if NORMALIZE:
        weights = weights / (total + 1e-20)[:, None]
    shared = (slot >= TOPK)[None, :]
    weights = tl.where(shared, 1.0, weights * scale)
    chosen = tl.where(shared, experts + slot[None, :] - TOPK, chosen)
    at = token.to(tl.int64)[:, None] * (TOPK + SHARED) + slot[None, :]
    mask = (token < tokens)[:, None] & (slot < TOPK + SHARED)[None, :]
    tl.store(experts_ptr + at, chosen, mask=mask)
    tl.store(weights_ptr + at, weights, mask=mask)


def fits(experts: int, routing: Routing) -> bool:
    """Whether groups are what the kernel can cut registers into."""
    return routing.groups == 1 or (experts & (experts - 1) == 0 and experts % routing.groups == 0)


def moe_route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    experts: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Fill experts and weights (T, topk + shared) from contiguous logits, in parts (P, T, E)."""
    parts, tokens, count = logits.shape
    padded = next_power_of_2(count)
    together = max(1, _VALUES // padded) if parts == 1 else 1
    with current(logits.device):
        _route_kernel[(cdiv(tokens, together),)](
            logits,
            logits if bias is None else bias,
            experts,
            weights,
            tokens,
            count,
            routing.scale,
            PARTS=parts,
            TOPK=routing.topk,
            SHARED=routing.shared,
            GROUPS=routing.groups,
            TOPK_GROUP=routing.topk_group,
            GROUP_BEST=routing.group_best,
            SIGMOID=routing.scoring == "sigmoid",
            NORMALIZE=routing.normalize,
            HAS_BIAS=bias is not None,
            TOKENS=together,
            EXPERTS=padded,
            SLOTS=next_power_of_2(experts.shape[1]),
            num_warps=4,
            **overlap(logits.device),
        )


def logits_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Parts (P, T, E) of x (T, K) times weight (E, K), contiguous, for few tokens; both BF16 or both F16."""
    (tokens, width), experts = x.shape, weight.shape[0]
    steps = cdiv(width, _PARTS * _STEP)
    parts = cdiv(width, steps * _STEP)
    out = torch.empty((parts, tokens, experts), dtype=torch.float32, device=x.device)
    padded = max(16, next_power_of_2(experts))
    with current(x.device):
        _logits_kernel[(parts, cdiv(tokens, _TOKENS))](
            x,
            weight,
            out,
            tokens,
            experts,
            width,
            x.stride(0),
            STEPS=steps,
            STEP=_STEP,
            TOKENS=_TOKENS,
            EXPERTS=padded,
            num_warps=4 if padded <= 64 else 8,
            **overlap(x.device),
        )
    return out
