"""What training minimizes, with gradients made as the loss is: logits are seen once, in a few rows at a time.

    next token      mean over positions t of -log q(x[t+1] | x[..t])            d/dz = (q - onehot) / n
    divergence      mean over positions of sum_v p(v) (log p(v) - log q(v))     d/dz = (q - p) / n

with q = softmax of the model's logits z and p = softmax of the teacher's, all in float32, nats a token. The
gradient has the dtype of the logits, and needs no memory of float32 logits of the whole batch.

A multi-token prediction layer adds `MTP_WEIGHT` times the same of its drafts. Position i of them predicts
token i + 2, as the model does one position later: that token, or the teacher's prediction of it, is its
target.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

MTP_WEIGHT = 0.1  # that of the last third of DeepSeek-V3's training (arXiv:2412.19437, section 4.2)
_VALUES = 1 << 26  # logits in float32 at a time


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token, float32.

    Args:
        logits: (B, T, V).
        ids: int64 (B, T); the last position has no target.
    """
    loss: torch.Tensor = _NextToken.apply(logits, ids)
    return loss


def divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence of a teacher's predictions from a model's, float32; no gradient for the teacher.

    Args:
        logits: (B, T, V).
        teacher: its logits, the same shape.
    """
    loss: torch.Tensor = _Divergence.apply(logits, teacher)
    return loss


def _rows(logits: torch.Tensor) -> Iterator[slice]:
    """Sequences to be looked at together."""
    some = max(1, _VALUES // (logits.shape[1] * logits.shape[2]))
    for start in range(0, logits.shape[0], some):
        yield slice(start, start + some)


class _NextToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        count = ids.shape[0] * (ids.shape[1] - 1)
        grad = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits.device)
        for rows in _rows(logits):
            known = logits[rows, :-1].float().log_softmax(-1)
            targets = ids[rows, 1:, None]
            total -= known.gather(-1, targets).sum()
            if grad is not None:
                slope = known.exp_()
                slope.scatter_add_(-1, targets, slope.new_full((), -1.0).expand(targets.shape))
                grad[rows, :-1] = slope.div_(count).to(grad.dtype)
        ctx.save_for_backward(grad)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        count = logits.shape[0] * logits.shape[1]
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits.device)
        for rows in _rows(logits):
            found = logits[rows].float().log_softmax(-1)
            wanted = teacher[rows].float().log_softmax(-1)
            likely = wanted.exp()
            total += (likely * (wanted - found)).sum()
            if grad is not None:
                grad[rows] = found.exp_().sub_(likely).div_(count).to(grad.dtype)
        ctx.save_for_backward(grad)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None
