"""In which arithmetic a model trains, and where it stops being finite.

With bfloat16 products the rest runs under PyTorch's autocast, weights and optimizer in float32. Routers are
taken out of it: they choose experts, and engines compute them in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from blockscale.checkpoint.names import role_of
from blockscale.evaluate.subjects import TransformersSubject

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


def _exact(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float(), *arguments, **options)

    return run


def first_not_finite(model: Any, parts: Sequence[torch.Tensor], arithmetic: Arithmetic) -> str:
    """The first module whose output is NaN or Inf, else the first parameter whose gradient is.

    Args:
        model: sharded, all processes have to ask.
        parts: int64 (B, T) token ids of the step, all of which are looked at.
        arithmetic: of forward passes.
    """
    training = model.training
    with arithmetic():
        found = [TransformersSubject("model", model).first_nonfinite(ids) for ids in parts]
    model.train(training)
    for name in found:
        if name is not None:
            return name
    gradients = ((name, each.grad) for name, each in model.named_parameters() if each.grad is not None)
    worst = next((name for name, grad in gradients if not bool(_local(grad).isfinite().all())), None)
    return "the loss itself" if worst is None else f"the gradient of {worst}"


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
