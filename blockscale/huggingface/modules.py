"""The layers that take the place of those of transformers: linear layers and fused experts with FP8 weights.

Parameters have the names that transformers has for them, with the scale beside: `q_proj.weight` and
`q_proj.weight_scale_inv`, `experts.gate_up_proj` and `experts.gate_up_proj_scale_inv`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from blockscale import ops
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8, scale_name
from blockscale.huggingface.linear import Compute, multiply

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
# What transformers gives all modules of experts, and calls in all its implementations of them.
GATE = "_apply_gate"


class FP8Layer(nn.Module):
    """Weights in FP8, each with its scale.

    Attributes:
        fmt: block size and scale format of the FP8 weights.
        compute: see `BlockscaleConfig`.
        parts: FP8 weight -> how many matrices lie in it one below the other, each with its own grid of
            blocks: 2 where a checkpoint has gate and up apart, since no block reaches across two tensors.
    """

    def __init__(self, fmt: BlockFP8, compute: Compute, parts: Mapping[str, int]) -> None:
        super().__init__()
        self.fmt, self.compute, self.parts = fmt, compute, dict(parts)

    def _add(self, name: str, shape: torch.Size) -> None:
        """An FP8 weight of this shape, uninitialized, and its scale."""
        *experts, n, k = shape
        count = self.parts[name]
        rows, columns = self.fmt.scale_shape((n // count, k))
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn)
        scale = torch.empty((*experts, count * rows, columns), dtype=torch.float32)
        self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        self.register_parameter(scale_name(name), nn.Parameter(scale, requires_grad=False))

    def quantized(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a high-precision weight, to become the parameter `name`."""
        pieces = weight.chunk(self.parts[name], dim=-2)
        made = [ops.quantize_weight(piece, self.fmt.block_size, self.fmt.scale_fmt) for piece in pieces]
        codes, scales = zip(*made, strict=True)
        return torch.cat(codes, -2), torch.cat(scales, -2)

    def scales(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameter name and values of every scale."""
        for name in self.parts:
            yield scale_name(name), getattr(self, scale_name(name))

    def extra_repr(self) -> str:
        """The line that printing a model shows."""
        shapes = ", ".join(f"{name}={list(getattr(self, name).shape)}" for name in self.parts)
        block = "x".join(map(str, self.fmt.block_size))
        return f"{shapes}, {block} blocks, {self.fmt.scale_fmt} scales, compute={self.compute}"


class FP8Linear(FP8Layer):
    """A linear layer: weight (N, K), bias (N,) or None."""

    weight: nn.Parameter
    weight_scale_inv: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, original: nn.Linear, fmt: BlockFP8, compute: Compute) -> None:
        super().__init__(fmt, compute, {"weight": 1})
        self.in_features, self.out_features = original.in_features, original.out_features
        self._add("weight", original.weight.shape)
        self.register_parameter("bias", original.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N), of the dtype of x."""
        return multiply(x, self.weight, self.weight_scale_inv, self.fmt, self.compute, self.bias)


class FP8Experts(FP8Layer):
    """The routed experts of a layer: gate_up_proj (E, 2I, K) over down_proj (E, K, I), one or both in FP8.

    The activation function between the two is that of the module it replaces.

    Attributes:
        num_experts: E.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self, original: nn.Module, fmt: BlockFP8, compute: Compute, parts: Mapping[str, int]
    ) -> None:
        super().__init__(fmt, compute, parts)
        for name in EXPERT_WEIGHTS:
            weight = getattr(original, name)
            if name in parts:
                self._add(name, weight.shape)
            else:
                self.register_parameter(name, weight)
        self.num_experts = self.gate_up_proj.shape[0]
        # A bound method: its module gives up the weights, and is no part of this one.
        original._parameters.clear()
        self._gate: Callable[[torch.Tensor], torch.Tensor] = getattr(original, GATE)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `through_experts`."""

        def compute(expert: int, x: torch.Tensor) -> torch.Tensor:
            return self._product("down_proj", expert, self._gate(self._product("gate_up_proj", expert, x)))

        return through_experts(hidden_states, top_k_index, top_k_weights, compute)

    def _product(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(self, name)[expert]
        if name not in self.parts:
            return nn.functional.linear(x, weight)
        scale = getattr(self, scale_name(name))[expert]
        pieces = zip(weight.chunk(self.parts[name]), scale.chunk(self.parts[name]), strict=True)
        return torch.cat([multiply(x, *piece, self.fmt, self.compute) for piece in pieces], dim=-1)


def through_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    compute: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Every token through its experts, summed by their weights.

    Args:
        hidden_states: (T, K).
        top_k_index: (T, k), expert of every choice of a token.
        top_k_weights: (T, k).
        compute: an expert on its tokens (T_e, K).

    Returns:
        (T, K), of the dtype of hidden_states.
    """
    # A place for every choice: summed in one order, whichever experts come first.
    wide = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
    out = hidden_states.new_zeros((*top_k_index.shape, hidden_states.shape[-1]), dtype=wide)
    for expert in top_k_index.unique().tolist():
        token, choice = (top_k_index == expert).nonzero(as_tuple=True)
        product = compute(expert, hidden_states[token])
        out[token, choice] = (product * top_k_weights[token, choice, None]).to(wide)
    return out.sum(dim=1).to(hidden_states.dtype)


def takes_fp8(module: nn.Module, parameter: str) -> bool:
    """Whether an `FP8Layer` can stand for the module with this parameter in FP8."""
    return (type(module) is nn.Linear and parameter == "weight") or (
        is_experts(module) and parameter in EXPERT_WEIGHTS
    )


def fp8_layer(
    module: nn.Module, fmt: BlockFP8, compute: Compute, parts: Mapping[str, int], where: str | None = None
) -> FP8Layer:
    """The layer that stands for a module, its FP8 weights uninitialized; experts give up their own.

    Args:
        module: linear layer or fused experts.
        fmt: block size and scale format.
        compute: see `BlockscaleConfig`.
        parts: parameter that becomes FP8 -> how many matrices lie in it one below the other.
        where: what an error is about.

    Raises:
        BlockscaleError: no layer can stand for it.
    """
    if not all(takes_fp8(module, name) for name in parts):
        raise BlockscaleError(
            f"{type(module).__name__} cannot run on FP8 weights",
            where=where,
            expected="torch.nn.Linear, or experts of gate_up_proj (E, 2I, K) and down_proj without bias",
            remedy="leave it out of what is quantized, or dequantize the checkpoint",
        )
    if isinstance(module, nn.Linear):
        return FP8Linear(module, fmt, compute)
    return FP8Experts(module, fmt, compute, parts)


def is_experts(module: nn.Module) -> bool:
    """Whether `FP8Experts` computes the same: gate over up in (E, out, in), no bias, nothing after down."""
    expected = {
        "has_gate": True,
        "is_concatenated": True,
        "is_transposed": False,
        "has_bias": False,
        "has_post_expert_norm": False,
    }
    weights = all(isinstance(getattr(module, name, None), nn.Parameter) for name in EXPERT_WEIGHTS)
    return (
        weights
        and len(module._parameters) == len(EXPERT_WEIGHTS)
        and hasattr(module, GATE)
        and all(getattr(module, name, None) is value for name, value in expected.items())
    )


def fp8_layers(model: nn.Module) -> Iterator[tuple[str, FP8Layer]]:
    """Full path and module of every layer with FP8 weights."""
    for path, module in model.named_modules():
        if isinstance(module, FP8Layer):
            yield path, module


def quantized_layers(model: nn.Module) -> tuple[str, ...]:
    """Full names of the FP8 parameters of a model: `model.layers.0.self_attn.q_proj.weight`."""
    return tuple(f"{path}.{name}" for path, layer in fp8_layers(model) for name in layer.parts)


def kept_layers(model: nn.Module) -> tuple[str, ...]:
    """Full paths of the linear layers and fused experts of a model that have no FP8 weight."""
    return tuple(
        path for path, module in model.named_modules() if type(module) is nn.Linear or is_experts(module)
    )


def format_summary(model: nn.Module) -> str:
    """How the linear layers of a model are stored, in a line; every expert's gate, up and down count."""
    counts: Counter[torch.dtype] = Counter()
    layers = dict(fp8_layers(model))
    for path in (*layers, *kept_layers(model)):
        module = model.get_submodule(path)
        for name in ("weight", *EXPERT_WEIGHTS):
            weight = getattr(module, name, None)
            if weight is not None:
                experts = weight.shape[0] if weight.dim() == 3 else 1
                counts[weight.dtype] += experts * (2 if name == "gate_up_proj" else 1)
    named = sorted((str(dtype).removeprefix("torch."), count) for dtype, count in counts.items())
    line = "linear layers: " + (", ".join(f"{count} in {name}" for name, count in named) or "none")
    if not layers:
        return line
    first = next(iter(layers.values()))
    block = "x".join(map(str, first.fmt.block_size))
    return f"{line}; FP8 blocks of {block}, {first.fmt.scale_fmt} scales; compute {first.compute}"
