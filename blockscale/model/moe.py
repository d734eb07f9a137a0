"""Feed-forward layers: the dense one, and the mixture of experts with its router."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from blockscale import ops
from blockscale.formats import ScaleFmt
from blockscale.model.architecture import ModelConfig
from blockscale.model.linear import GROUP, Linear, W4Experts
from blockscale.model.stack import Parallel
from blockscale.model.weights import FP8, Weights
from blockscale.reference import W4Weight
from blockscale.reference.routing import Routing

_FEW_TOKENS = 128  # up to which every expert gets room for all, and rows that count are not padded
# Tokens of an expert that products are made for: some get more than the average, up to what measured fastest.
_MOST_TYPICAL = 32


class MLP:
    """down(silu(gate x) * up x); with a part of the width between a summand of that."""

    def __init__(self, gate_up: Linear | Parallel, down: Linear) -> None:
        self._gate_up, self._down = gate_up, down

    @property
    def reads(self) -> tuple[ScaleFmt | None, bool]:
        """Scales of the activations it is to be called on, or None, and whether it wants them plain."""
        return self._gate_up.quantizes, self._gate_up.quantizes is None

    def __call__(self, x: ops.Normed) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        hidden = self._gate_up.on(x)
        if not self._down.is_fp8:
            return self._down(ops.silu_mul(hidden))
        scale_fmt = self._down.fmt.scale_fmt
        return self._down.multiply(*ops.silu_mul_quantize(hidden, GROUP, scale_fmt, "column"), hidden.dtype)


class Router:
    """Which experts a token goes to, and with what weights; all in float32."""

    def __init__(self, config: ModelConfig, weights: Weights, shared: int) -> None:
        experts, hidden, wide = config.n_routed_experts, config.hidden_size, torch.float32
        weight = weights.tensor("gate.weight", experts, hidden, dtype=wide)
        # Of BF16 factors tensor cores make exact products, which they add up in float32.
        narrow = weight.to(weights.dtype)
        exact = weight.is_cuda and weights.dtype == torch.bfloat16 and torch.equal(narrow.to(wide), weight)
        self._weight = narrow if exact else weight
        self._bias = None
        if config.topk_method == "noaux_tc":
            self._bias = weights.tensor("gate.e_score_correction_bias", experts, dtype=wide)
        self.routing = Routing(
            topk=config.num_experts_per_tok,
            scoring=config.scoring_func,
            groups=1 if config.topk_method == "greedy" else config.n_group,
            topk_group=config.topk_group,
            group_best=1 if self._bias is None else 2,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            shared=shared,
        )

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, hidden) -> experts int32 (T, topk + shared) and their weights float32 of the same shape."""
        return ops.moe_choose(x, self._weight, self._bias, self.routing)


class MoE:
    """Routed experts, and shared ones that every token goes to, from the tensors under `mlp`.

    Shared experts of the routed ones' format are computed with them, as experts that are always chosen. Of
    several ranks each has some of the routed experts whole, and a part of the width of the shared ones.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        hidden, width, count = config.hidden_size, config.moe_intermediate_size, config.n_shared_experts
        own, self._world = weights.share(config.n_routed_experts).indices, weights.ranks.world
        shared = None
        if count:
            shared = weights.at("shared_experts").gate_up_down(hidden, weights.share_width(count * width))
        self._gate_up: Linear | W4Experts
        self._down: Linear | W4Experts
        self._gate_up, self._down = weights.experts(own, hidden, width, shared if self._world == 1 else None)
        self._first, self._experts = own.start, self._gate_up.weight.shape[0]
        together = self._experts > len(own)
        self._router = Router(config, weights, count if together else 0)
        self._shared = None if shared is None or together else MLP(*shared)

    @property
    def reads(self) -> tuple[ScaleFmt | None, bool]:
        """Scales of the activations it is to be called on, or None, and whether it wants them plain."""
        return self._gate_up.quantizes if self._is_fp8 else None, True

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device in a call: where experts are multiplied one by one.

        Those are experts that are dequantized on the way, and on GPUs such in another dtype than BF16, of
        which `torch.nn.functional.grouped_mm` takes no other there.
        """
        if self._is_fp8:
            return False
        weight, other = self._gate_up.weight, self._down.weight
        if isinstance(weight, W4Weight) or isinstance(other, W4Weight):
            return True
        low = FP8 in (weight.dtype, other.dtype)
        return low or (weight.is_cuda and weight.dtype != torch.bfloat16)

    @property
    def _is_fp8(self) -> bool:
        return self._gate_up.is_fp8 and self._down.is_fp8

    def __call__(self, x: ops.Normed) -> torch.Tensor:
        """(T, hidden) -> this rank's summand of (T, hidden)."""
        assert x.y is not None
        experts, weights = self._router(x.y)
        if self._first:
            experts = experts - self._first  # those of other ranks are out of range, and get no row
        if self._is_fp8:
            few = len(experts) <= _FEW_TOKENS
            rows, positions = self._few(x, experts) if few else self._many(x, experts)
        else:
            rows, positions = self._high(x.y, experts)
        routed = ops.moe_unpermute(rows, positions, weights)
        if self._shared is None:
            return routed
        return routed + self._shared(x if self._shared.reads[0] == self.reads[0] else x._replace(codes=None))

    def _few(self, x: ops.Normed, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the chosen experts' outputs, and where those of each token are."""
        assert x.codes is not None
        gate_up, down = self._gate_up, self._down
        moved = ops.moe_permute_masked(x.codes, experts, self._experts, x.scale)
        typical = min(_MOST_TYPICAL, 5 * experts.numel() // (2 * self._experts * self._world) + 1)
        hidden = _masked(moved.rows, moved.scale, gate_up, moved.masked_m, typical, x.hidden.dtype)
        codes, scale = ops.silu_mul_quantize(
            hidden.flatten(0, 1), GROUP, down.fmt.scale_fmt, "column", rows=moved.positions
        )
        room = moved.rows.shape[:2]
        codes, scale = codes.unflatten(0, room), scale.unflatten(0, room)
        rows = _masked(codes, scale, down, moved.masked_m, typical, x.hidden.dtype)
        return rows.flatten(0, 1), moved.positions

    def _many(self, x: ops.Normed, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, rows of an expert together and padded."""
        assert x.codes is not None
        gate_up, down = self._gate_up, self._down
        moved = ops.moe_permute(x.codes, experts, self._experts, x.scale)
        hidden = _contiguous(moved.rows, moved.scale, gate_up, moved.m_indices, x.hidden.dtype)
        codes, scale = ops.silu_mul_quantize(
            hidden, GROUP, down.fmt.scale_fmt, "column", rows=moved.positions
        )
        rows = _contiguous(codes, scale, down, moved.m_indices, x.hidden.dtype)
        return rows, moved.positions

    def _high(self, x: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with activations as they are."""
        moved = ops.moe_permute(x, experts, self._experts, alignment=1)
        numbers = torch.arange(self._experts, device=x.device)
        slots = experts.view(-1, 1)
        ends = ((slots <= numbers) & (slots >= 0)).sum(0, dtype=torch.int32)
        multiply = _by_expert if self.waits else _grouped
        hidden = multiply(moved.rows, self._gate_up, ends)
        return multiply(ops.silu_mul(hidden), self._down, ends), moved.positions


def _masked(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    layer: Linear | W4Experts,
    masked_m: torch.Tensor,
    typical: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """FP8 product of (E, Mmax, K) with the experts' weights: (E, Mmax, N) in `dtype`."""
    assert scale is not None
    out = torch.empty(*codes.shape[:2], layer.weight.shape[1], dtype=dtype, device=codes.device)
    if isinstance(layer, W4Experts):
        return ops.m_grouped_w4a8_gemm_nt_masked(codes, scale, layer.weight, masked_m, typical, out=out)
    assert layer.scale is not None
    return ops.m_grouped_fp8_gemm_nt_masked(
        codes, scale, layer.weight, layer.scale, masked_m, typical, out=out
    )


def _contiguous(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    layer: Linear | W4Experts,
    m_indices: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """FP8 product of rows (M, K) with their experts' weights: (M, N) in `dtype`."""
    assert scale is not None
    out = torch.empty(codes.shape[0], layer.weight.shape[1], dtype=dtype, device=codes.device)
    if isinstance(layer, W4Experts):
        return ops.m_grouped_w4a8_gemm_nt_contiguous(codes, scale, layer.weight, m_indices, out=out)
    assert layer.scale is not None
    return ops.m_grouped_fp8_gemm_nt_contiguous(codes, scale, layer.weight, layer.scale, m_indices, out=out)


def _grouped(rows: torch.Tensor, layer: Linear | W4Experts, ends: torch.Tensor) -> torch.Tensor:
    """Product (M, N) of rows (M, K), those of an expert up to its end, with weights as they are stored."""
    assert isinstance(layer, Linear)
    return F.grouped_mm(rows, layer.weight.transpose(1, 2), offs=ends)


def _by_expert(rows: torch.Tensor, layer: Linear | W4Experts, ends: torch.Tensor) -> torch.Tensor:
    """The same, one expert after the other, dequantized if need be; the host waits for their ends."""
    out, first = rows.new_zeros(rows.shape[0], layer.weight.shape[1]), 0
    for expert, end in enumerate(ends.tolist()):
        if end > first:
            out[first:end] = F.linear(rows[first:end], _dequantized(layer, expert, rows.dtype))
        first = end
    return out


def _dequantized(layer: Linear | W4Experts, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) of an expert."""
    if isinstance(layer, W4Experts):
        return ops.dequantize_w4(layer.weight[expert], dtype)
    scale = None if layer.scale is None else layer.scale[expert]
    return replace(layer, weight=layer.weight[expert], scale=scale).dequantized(dtype)
