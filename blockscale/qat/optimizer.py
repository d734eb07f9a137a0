"""AdamW in groups, its rate over time, and its moments by the names of parameters.

The rate rises linearly over the first steps, then falls as half a cosine to zero,

    rate(i) = peak (i + 1) / w            for i < w
    rate(i) = peak (1 + cos(pi (i - w) / (n - w))) / 2

for step i of n, w of which are the warm-up. It ends at zero so that codes settle: a weight that lies between
two of them is thrown back and forth by steps of the peak's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from blockscale.qat.modules import scale_shift_name
from blockscale.qat.sharding import fill, whole

BETAS = (0.9, 0.95)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SHIFT = scale_shift_name("")


def rate_at(step: int, steps: int, warmup: int) -> float:
    """Share of the peak for step `step`, counted from 0, of `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def make_optimizer(model: nn.Module, lr: float, scale_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW of all that trains: matrices decay, vectors do not; learned scales have a rate of their own.

    Each group remembers its peak as `peak`.
    """
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    scales = [each for name, each in trained if name.endswith(_SHIFT)]
    matrices = [each for name, each in trained if each.dim() > 1 and not name.endswith(_SHIFT)]
    vectors = [each for name, each in trained if each.dim() < 2 and not name.endswith(_SHIFT)]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "peak": lr},
        {"params": vectors, "weight_decay": 0.0, "peak": lr},
        {"params": scales, "weight_decay": 0.0, "peak": scale_lr},
    ]
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW([each for each in groups if each["params"]], lr=lr, betas=BETAS, fused=fused)


def set_rate(optimizer: torch.optim.AdamW, share: float) -> None:
    """Every group's rate, as a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]


def whole_moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """`name.exp_avg` and `name.exp_avg_sq` -> whole tensor on the CPU, of what has been updated."""
    return {
        f"{name}.{kind}": whole(state[kind]).cpu()
        for name, state in _states(model, optimizer)
        for kind in _MOMENTS
        if kind in state
    }


def fill_moments(
    model: nn.Module, optimizer: torch.optim.AdamW, moments: Mapping[str, torch.Tensor], step: int
) -> None:
    """Set what `whole_moments` gave after so many steps."""
    fused = bool(optimizer.param_groups[0]["fused"])
    for name, each in model.named_parameters():
        if f"{name}.{_MOMENTS[0]}" not in moments:
            continue
        made = {kind: torch.zeros_like(each, memory_format=torch.preserve_format) for kind in _MOMENTS}
        for kind, target in made.items():
            fill(target.detach(), moments[f"{name}.{kind}"])
        count = torch.tensor(float(step), device=each.device if fused else "cpu")
        optimizer.state[each] = {"step": count, **{kind: target.detach() for kind, target in made.items()}}


def _states(model: nn.Module, optimizer: torch.optim.AdamW) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, each in model.named_parameters():
        if each in optimizer.state:
            yield name, optimizer.state[each]
