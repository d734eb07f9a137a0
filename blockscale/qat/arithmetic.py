"""In which arithmetic a model trains, and where it stops being finite.

With bfloat16 products the rest runs under PyTorch's autocast, weights and optimizer in float32. Routers are
taken out of it: they choose experts, and engines compute them in float32. Experts that are not trained
through their rounding are brought into it: autocast does not know grouped products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from blockscale.checkpoint.names import role_of
from blockscale.evaluate.subjects import watched
from blockscale.huggingface.modules import EXPERT_WEIGHTS, GATE, is_experts
from blockscale.qat import grouped

Arithmetic = Callable[[], AbstractContextManager[Any]]


def arithmetic_of(device: torch.device, compute: object) -> Arithmetic:
    """What forward passes run in."""
    if compute == torch.float32:
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def keep_routers_exact(model: nn.Module) -> None:
    """Let routers compute in float32 whatever surrounds them."""
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if any(role_of(f"{path}.{name}") == "router" for name in own):
            module.forward = _exact(module.forward)


def narrow_experts(model: nn.Module, device: torch.device) -> None:
    """Let experts that are still those of transformers multiply in bfloat16, all at once.

    With weights in float32 transformers would multiply in float32, one expert after the other, and ask the
    device how many tokens each of them has. Nothing changes where grouped products are not fast.
    """
    for module in model.modules():
        if grouped.is_fast(device) and is_experts(module):
            weights = [getattr(module, name) for name in EXPERT_WEIGHTS]
            if all(grouped.is_aligned(weight) for weight in weights):
                module.forward = _narrow(module)


def _narrow(module: Any) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        into, out_of = (getattr(module, name).bfloat16() for name in EXPERT_WEIGHTS)

        def compute(rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            hidden = getattr(module, GATE)(grouped.grouped_linear(rows, into, ends))
            return grouped.grouped_linear(hidden, out_of, ends)

        made = grouped.through_experts_at_once(x.bfloat16(), top_k_index, top_k_weights, len(into), compute)
        return made.to(x.dtype)

    return run


def _exact(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float(), *arguments, **options)

    return run


def first_not_finite(
    model: Any, predict: Callable[[torch.Tensor], object], parts: Sequence[torch.Tensor]
) -> str:
    """The first module whose output is NaN or Inf, else the first parameter whose gradient is.

    Args:
        model: sharded, all processes have to ask.
        predict: a forward pass of the training.
        parts: int64 (B, T) token ids of the step, all of which are looked at.
    """
    training, found = model.training, list[str]()
    model.eval()
    with torch.no_grad(), watched(model, found):
        for ids in parts:
            predict(ids)
    model.train(training)
    if found:
        return found[0]
    gradients = ((name, each.grad) for name, each in model.named_parameters() if each.grad is not None)
    worst = next((name for name, grad in gradients if not bool(_local(grad).isfinite().all())), None)
    return "the loss itself" if worst is None else f"the gradient of {worst}"


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
