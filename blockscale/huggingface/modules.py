"""The layers that take the place of those of transformers: linear layers and fused experts, quantized.

Parameters have the names that transformers has for them, with the scale beside: `q_proj.weight` and
`q_proj.weight_scale_inv`, `experts.gate_up_proj` and `experts.gate_up_proj_scale_inv`. Scales have the ending
that they have in the checkpoint: `q_proj.weight_scale` is that of fewer than 8 bits in our own layout.

Codes of fewer than 8 bits are read as the layout of the checkpoint has them, and brought into ours by
`QuantizedLayer.convert`, one parameter after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from blockscale import ops
from blockscale.errors import BlockscaleError
from blockscale.formats import SAFETENSORS_DTYPES, BlockFP8, spell_block_size
from blockscale.group_spelling import spell_group_format
from blockscale.huggingface.linear import Compute, multiply, multiply_low
from blockscale.huggingface.stored import Stored

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
# What transformers gives all modules of experts, and calls in all its implementations of them.
GATE = "_apply_gate"


class QuantizedLayer(nn.Module):
    """Quantized weights, each with its scale.

    Attributes:
        fmt: block size and scale format of the FP8 weights; the scale format is that of activations.
        compute: see `BlockscaleConfig`.
        stored: quantized parameter -> how it is stored.
    """

    def __init__(self, fmt: BlockFP8, compute: Compute, stored: Mapping[str, Stored]) -> None:
        super().__init__()
        self.fmt, self.compute, self.stored = fmt, compute, dict(stored)
        self._widths: dict[str, int] = {}

    def scale_name(self, name: str) -> str:
        """Name of the scale of a quantized parameter."""
        return self.stored[name].scale_name(name)

    def _add(self, name: str, shape: torch.Size) -> None:
        """A quantized weight of this shape as the checkpoint has it, uninitialized, and its scale."""
        *experts, n, k = shape
        storage, count = self.stored[name].storage, self.stored[name].parts
        if storage is None:
            rows, columns = self.fmt.scale_shape((n // count, k))
            codes = torch.empty(shape, dtype=torch.float8_e4m3fn)
            scale = torch.empty((*experts, count * rows, columns), dtype=torch.float32)
        else:
            codes, scale = (
                torch.empty(size, dtype=SAFETENSORS_DTYPES[dtype])
                for dtype, size in storage.signatures(tuple(shape))
            )
        self._widths[name] = k
        self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        self.register_parameter(self.scale_name(name), nn.Parameter(scale, requires_grad=False))

    def convert(self) -> None:
        """Bring codes and scales as they were read into the form that products take, in place."""
        for name, stored in self.stored.items():
            storage = stored.storage
            if storage is not None:
                codes, scale = getattr(self, name), getattr(self, self.scale_name(name))
                codes.data = storage.packed(codes.data, self._widths[name])
                scale.data = storage.own_scale(scale.data)

    def quantized(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a high-precision weight, to become the parameter `name`."""
        stored = self.stored[name]
        if stored.group is not None:
            return ops.quantize_group(weight, stored.group)
        pieces = weight.chunk(stored.parts, dim=-2)
        made = [ops.quantize_weight(piece, self.fmt.block_size, self.fmt.scale_fmt) for piece in pieces]
        codes, scales = zip(*made, strict=True)
        return torch.cat(codes, -2), torch.cat(scales, -2)

    def multiply(
        self, name: str, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """(..., K) -> (..., N) by a matrix (N, K) that is stored as the parameter `name` is."""
        stored = self.stored[name]
        if stored.group is not None:
            return multiply_low(x, codes, scale, stored.group, self.fmt.scale_fmt, self.compute, bias)
        pieces = zip(codes.chunk(stored.parts), scale.chunk(stored.parts), strict=True)
        made = [multiply(x, *piece, self.fmt, self.compute, bias) for piece in pieces]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def fp8_scales(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameter name and values of the scale of every FP8 weight."""
        for name, stored in self.stored.items():
            if stored.group is None:
                yield self.scale_name(name), getattr(self, self.scale_name(name))

    def extra_repr(self) -> str:
        """The line that printing a model shows."""
        shapes = ", ".join(f"{name}={list(getattr(self, name).shape)}" for name in self.stored)
        groups = {spell_group_format(each.group): None for each in self.stored.values() if each.group}
        kind = ", ".join(groups) or f"{spell_block_size(self.fmt.block_size)} blocks"
        return f"{shapes}, {kind}, {self.fmt.scale_fmt} scales, compute={self.compute}"


class QuantizedLinear(QuantizedLayer):
    """A linear layer: weight (N, K), bias (N,) or None."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, original: nn.Linear, fmt: BlockFP8, compute: Compute, stored: Mapping[str, Stored]
    ) -> None:
        super().__init__(fmt, compute, stored)
        self.in_features, self.out_features = original.in_features, original.out_features
        self._add("weight", original.weight.shape)
        self.register_parameter("bias", original.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N), of the dtype of x."""
        return self.multiply("weight", x, self.weight, getattr(self, self.scale_name("weight")), self.bias)


class QuantizedExperts(QuantizedLayer):
    """The routed experts of a layer: gate_up_proj (E, 2I, K) over down_proj (E, K, I), one or both quantized.

    The activation function between the two is that of the module it replaces.

    Attributes:
        num_experts: E.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self, original: nn.Module, fmt: BlockFP8, compute: Compute, stored: Mapping[str, Stored]
    ) -> None:
        super().__init__(fmt, compute, stored)
        for name in EXPERT_WEIGHTS:
            weight = getattr(original, name)
            if name in stored:
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
        if name not in self.stored:
            return nn.functional.linear(x, weight)
        return self.multiply(name, x, weight, getattr(self, self.scale_name(name))[expert], None)


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


def can_quantize(module: nn.Module, parameter: str) -> bool:
    """Whether a `QuantizedLayer` can stand for the module with this parameter quantized."""
    return (type(module) is nn.Linear and parameter == "weight") or (
        is_experts(module) and parameter in EXPERT_WEIGHTS
    )


def quantized_layer(
    module: nn.Module,
    fmt: BlockFP8,
    compute: Compute,
    stored: Mapping[str, Stored],
    where: str | None = None,
) -> QuantizedLayer:
    """The layer that stands for a module, its quantized weights uninitialized; experts give up their own.

    Args:
        module: linear layer or fused experts.
        fmt: block size and scale format.
        compute: see `BlockscaleConfig`.
        stored: parameter that becomes quantized -> how it is stored.
        where: what an error is about.

    Raises:
        BlockscaleError: no layer can stand for it.
    """
    if not all(can_quantize(module, name) for name in stored):
        raise BlockscaleError(
            f"{type(module).__name__} cannot run on quantized weights",
            where=where,
            expected="torch.nn.Linear, or experts of gate_up_proj (E, 2I, K) and down_proj without bias",
            remedy="leave it out of what is quantized, or dequantize the checkpoint",
        )
    if isinstance(module, nn.Linear):
        return QuantizedLinear(module, fmt, compute, stored)
    return QuantizedExperts(module, fmt, compute, stored)


def is_experts(module: nn.Module) -> bool:
    """Whether `QuantizedExperts` computes the same: gate over up in (E, out, in), no bias, no norm behind."""
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


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Full path and module of every layer with quantized weights."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield path, module


def quantized_layers(model: nn.Module) -> tuple[str, ...]:
    """Full names of the quantized parameters of a model: `model.layers.0.self_attn.q_proj.weight`."""
    return tuple(f"{path}.{name}" for path, layer in quantized_modules(model) for name in layer.stored)


def kept_layers(model: nn.Module) -> tuple[str, ...]:
    """Full paths of the linear layers and fused experts of a model that have no quantized weight."""
    return tuple(
        path for path, module in model.named_modules() if type(module) is nn.Linear or is_experts(module)
    )


def format_summary(model: nn.Module) -> str:
    """How the linear layers of a model are stored, in a line; every expert's gate, up and down count."""
    counts: Counter[str] = Counter()
    layers = dict(quantized_modules(model))
    for path in (*layers, *kept_layers(model)):
        module = model.get_submodule(path)
        for name in ("weight", *EXPERT_WEIGHTS):
            weight = getattr(module, name, None)
            if weight is not None:
                experts = weight.shape[0] if weight.dim() == 3 else 1
                stored = getattr(module, "stored", {}).get(name, Stored()).group
                kind = (
                    str(weight.dtype).removeprefix("torch.") if stored is None else spell_group_format(stored)
                )
                counts[kind] += experts * (2 if name == "gate_up_proj" else 1)
    named = ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))
    line = f"linear layers: {named or 'none'}"
    if not layers:
        return line
    first = next(iter(layers.values()))
    block = "x".join(map(str, first.fmt.block_size))
    return f"{line}; FP8 blocks of {block}, {first.fmt.scale_fmt} scales; compute {first.compute}"
