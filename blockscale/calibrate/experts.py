"""Calibrated rounding of the routed experts of a layer: gate_up_proj (E, 2I, K) over down_proj (E, K, I).

Every expert has moments of its own, of the tokens that the router of the quantized model sends it; the
original stream gives the same tokens. An expert that sees fewer tokens than it has inputs says too little
about itself: it is rounded plainly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from blockscale.calibrate.activations import quantized_inputs
from blockscale.calibrate.formats import Rounding, round_plainly, values_of
from blockscale.calibrate.hessian import add_tokens, no_moments
from blockscale.calibrate.rounding import Search, round_weight
from blockscale.calibrate.stations import Wanted
from blockscale.huggingface.modules import EXPERT_WEIGHTS, GATE, through_experts


class RoundedExpertWeights(NamedTuple):
    """What became of the experts of a layer.

    Attributes:
        roundings: (parameter, expert, part) -> codes and scale.
        amax: (parameter, expert) -> the largest absolute value of its inputs in the quantized model, before
            they are quantized; 0 of an expert without tokens.
    """

    roundings: dict[tuple[str, int, int], Rounding]
    amax: dict[tuple[str, int], float]


class Call(NamedTuple):
    """What the experts are called with: hidden states (T, K) of both models, and experts (T, k) of tokens."""

    original: torch.Tensor
    quantized: torch.Tensor
    experts: torch.Tensor


@torch.no_grad()
def round_experts(
    module: nn.Module,
    original: nn.Module,
    calls: Sequence[Call],
    wanted: Mapping[str, Wanted],
    search: Search | None = None,
) -> RoundedExpertWeights:
    """Round the experts of a module in place, one after another.

    Args:
        module: experts as transformers has them; see huggingface.modules.is_experts.
        original: the same, which stays as it is.
        calls: of all calibration tokens.
        wanted: "gate_up_proj" or "down_proj" -> how it is to be rounded; one that is missing is left alone.
        search: of the rounding.
    """
    found = RoundedExpertWeights({}, {})
    for expert in range(len(getattr(module, EXPERT_WEIGHTS[0]))):
        x, y = _tokens(calls, expert)
        for name in EXPERT_WEIGHTS:
            before, weight = getattr(original, name)[expert], getattr(module, name)[expert]
            if name in wanted:
                found.amax[name, expert] = float(y.abs().max()) if len(y) else 0.0
                y = quantized_inputs(y, wanted[name].inputs)
                for part, rounding in enumerate(_round(weight, x, y, wanted[name], search)):
                    found.roundings[name, expert, part] = rounding
            x, y = nn.functional.linear(x, before), nn.functional.linear(y, weight)
            if name == EXPERT_WEIGHTS[0]:
                x, y = getattr(original, GATE)(x), getattr(module, GATE)(y)
    return found


def count_tokens(calls: Sequence[Call], experts: int) -> tuple[int, ...]:
    """How many tokens each of so many experts is given."""
    counts = torch.zeros(experts, dtype=torch.int64)
    for call in calls:
        counts += torch.bincount(call.experts.flatten().cpu(), minlength=experts)
    return tuple(counts.tolist())


class RoundedExperts(nn.Module):
    """Experts that quantize their activations; called as those they stand for."""

    def __init__(self, experts: nn.Module, wanted: Mapping[str, Wanted]) -> None:
        super().__init__()
        self.experts, self._wanted = experts, dict(wanted)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `huggingface.modules.through_experts`."""

        def compute(expert: int, y: torch.Tensor) -> torch.Tensor:
            for name in EXPERT_WEIGHTS:
                y = quantized_inputs(y, self._wanted[name].inputs) if name in self._wanted else y
                y = nn.functional.linear(y, getattr(self.experts, name)[expert])
                y = getattr(self.experts, GATE)(y) if name == EXPERT_WEIGHTS[0] else y
            return y

        return through_experts(hidden_states, top_k_index, top_k_weights, compute)


def _tokens(calls: Sequence[Call], expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of an expert, float32 (T_e, K), in the original and in the quantized model."""
    mine = [(call, (call.experts == expert).any(1).to(call.original.device)) for call in calls]
    device = calls[0].experts.device
    x = torch.cat([call.original[rows] for call, rows in mine]).to(device)
    return x, torch.cat([call.quantized[rows] for call, rows in mine]).to(device)


def _round(
    weight: torch.Tensor, x: torch.Tensor, xq: torch.Tensor, wanted: Wanted, search: Search | None
) -> list[Rounding]:
    """Round the parts of a weight (N, K), in place."""
    fmt, width = wanted.fmt, weight.shape[1]
    enough = len(x) >= width
    moments = add_tokens(no_moments(width, weight.device), x, xq) if enough else None
    found = []
    for part in weight.chunk(wanted.parts):
        if moments is None:
            rounding = round_plainly(part, fmt)
        else:
            rounding = round_weight(part, moments, fmt, search)
        part.copy_(values_of(rounding, fmt, width))
        found.append(rounding)
    return found
