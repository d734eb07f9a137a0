"""Experts of a layer all at once, by grouped products, where `through_experts` takes one after the other.

    rows = x[token of every choice], sorted by expert      out[t] = sum over j of p[t, j] y[place[t, j]]

y is `compute(rows)`. The host reads nothing of the device, so a step can be captured. Sums are in the order
of choices, forward and backward, and never of threads: results can be repeated bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import grouped_mm

_ALIGNMENT = 8  # BF16 values in 16 bytes: what rows of the operands, and of their gradients, are multiples of


def is_fast(device: torch.device) -> bool:
    """Whether `grouped_linear` is one kernel that gives the right gradients.

    Before Hopper, PyTorch takes the groups one by one and reads their sizes on the host; on Blackwell experts
    without tokens get gradients that are not zero (https://github.com/pytorch/pytorch/issues/172439).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def is_aligned(weight: torch.Tensor) -> bool:
    """Whether `grouped_linear` takes a weight (E, N, K) of BF16 numbers."""
    return not any(size % _ALIGNMENT for size in weight.shape[1:])


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Every row times the weight of its expert, with gradients.

    Args:
        rows: (M, K), sorted by expert.
        weight: (E, N, K), of the same dtype.
        ends: int32 (E,), where the rows of every expert end.

    Returns:
        (M, N), of that dtype.
    """
    return grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def through_experts_at_once(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: int,
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Every token through its experts, summed by their weights.

    Args:
        x: (T, K).
        top_k_index: int64 (T, k), expert of every choice of a token.
        top_k_weights: (T, k).
        experts: E.
        compute: of rows (T k, K) that are sorted by expert, and their ends as of `grouped_linear`.

    Returns:
        (T, K), of the widest dtype of the two.
    """
    choices = top_k_index.shape[1]
    chosen, order = top_k_index.flatten().sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    each = torch.arange(experts, device=order.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, each, right=True, out_int32=True)
    products = compute(_Rows.apply(x, order, place, choices), ends)
    apart = _Rows.apply(products, place, order, 1).unflatten(0, (-1, choices))
    return (apart * top_k_weights[..., None]).sum(dim=1)


class _Rows(torch.autograd.Function):
    """Rows of x in another order, each as often as it was chosen; gradients are summed choice by choice."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, back: torch.Tensor, choices: int
    ) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.choices = choices
        return x.index_select(0, order if choices == 1 else order // choices)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        moved = grads[0].index_select(0, ctx.saved_tensors[0])
        return moved if ctx.choices == 1 else moved.unflatten(0, (-1, ctx.choices)).sum(1), None, None, None
