"""Feed-forward layers: the dense one, and the mixture of experts with its router."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from blockscale import ops
from blockscale.model.architecture import ModelConfig
from blockscale.model.linear import GROUP, Linear
from blockscale.model.weights import Weights
from blockscale.reference.fused import silu_mul


class MLP:
    """down(silu(gate x) * up x), from `gate_proj`, `up_proj` and `down_proj`."""

    def __init__(self, weights: Weights, hidden: int, width: int) -> None:
        self._gate_up, self._down = weights.gate_up_down(hidden, width)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        hidden = self._gate_up(x)
        if not self._down.is_fp8:
            return self._down(silu_mul(hidden))
        scale_fmt = self._down.fmt.scale_fmt
        return self._down.multiply(*ops.silu_mul_quantize(hidden, GROUP, scale_fmt, "column"), x.dtype)


class Router:
    """Which experts a token goes to, and with what weights; all in float32.

    Scores are a sigmoid or softmax of the router's logits. A correction bias, where the checkpoint has one,
    counts in the choice and not in the weights. Experts stand in groups: of a group counts the sum of its two
    best (with a correction bias) or its best, and only experts of the best groups are chosen.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._config = config
        experts, hidden, wide = config.n_routed_experts, config.hidden_size, torch.float32
        self._weight = weights.tensor("gate.weight", experts, hidden, dtype=wide)
        self._bias = None
        if config.topk_method == "noaux_tc":
            self._bias = weights.tensor("gate.e_score_correction_bias", experts, dtype=wide)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, hidden) -> experts int64 (T, topk) and their weights float32 (T, topk)."""
        config = self._config
        logits = F.linear(x.float(), self._weight)
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        choice = scores if self._bias is None else scores + self._bias
        if config.n_group > 1 and config.topk_method != "greedy":
            grouped = choice.view(len(choice), config.n_group, -1)
            best = grouped.topk(1 if self._bias is None else 2).values.sum(-1)
            chosen = best.topk(config.topk_group, sorted=False).indices
            out = torch.ones_like(best, dtype=torch.bool).scatter(1, chosen, value=False)
            choice = grouped.masked_fill(out[..., None], -torch.inf).flatten(1)
        experts = choice.topk(config.num_experts_per_tok, sorted=False).indices
        weights = scores.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * config.routed_scaling_factor


class MoE:
    """Routed experts, and shared ones that every token goes to, from the tensors under `mlp`."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._experts = config.n_routed_experts
        self._router = Router(config, weights)
        hidden, width, shared = config.hidden_size, config.moe_intermediate_size, config.n_shared_experts
        self._gate_up, self._down = weights.experts(self._experts, hidden, width)
        self._shared = MLP(weights.at("shared_experts"), hidden, shared * width) if shared else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        experts, weights = self._router(x)
        routed = self._routed(x, experts, weights)
        return routed if self._shared is None else routed + self._shared(x)

    def _routed(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate_up, down = self._gate_up, self._down
        if gate_up.is_fp8 and down.is_fp8:
            codes, scale = gate_up.quantize(x)
            moved = ops.moe_permute(codes, experts, self._experts, scale)
            hidden = _grouped(moved.rows, moved.scale, gate_up, moved.m_indices, x.dtype)
            codes, scale = ops.silu_mul_quantize(hidden, GROUP, down.fmt.scale_fmt, "column")
            rows = _grouped(codes, scale, down, moved.m_indices, x.dtype)
        else:
            moved = ops.moe_permute(x, experts, self._experts, alignment=1)
            hidden = _by_expert(moved.rows, gate_up, moved.m_indices)
            rows = _by_expert(silu_mul(hidden), down, moved.m_indices)
        return ops.moe_unpermute(rows, moved.positions, weights)


def _grouped(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    layer: Linear,
    m_indices: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """FP8 product of rows (M, K) with their experts' weights: (M, N) in `dtype`."""
    assert scale is not None
    assert layer.scale is not None
    out = torch.empty(codes.shape[0], layer.weight.shape[1], dtype=dtype, device=codes.device)
    return ops.m_grouped_fp8_gemm_nt_contiguous(codes, scale, layer.weight, layer.scale, m_indices, out=out)


def _by_expert(rows: torch.Tensor, layer: Linear, m_indices: torch.Tensor) -> torch.Tensor:
    """The same with weights in high precision, expert by expert; the host waits for the segments."""
    out = rows.new_zeros(rows.shape[0], layer.weight.shape[1])
    counts = torch.bincount(m_indices[m_indices >= 0], minlength=layer.weight.shape[0])
    first = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            scale = None if layer.scale is None else layer.scale[expert]
            one = replace(layer, weight=layer.weight[expert], scale=scale, compute="high")
            out[first : first + count] = one(rows[first : first + count])
        first += count
    return out
