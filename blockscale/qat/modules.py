"""The layers that take the place of those of transformers in training: linear layers and fused experts.

    y = q(x) w'^T + b        w' = fake_quantize(weight), q = fake_quantize_input

Both operands are those that the exported checkpoint is run with: logits differ by the order of sums alone.

Parameters keep the names that transformers has for them, so optimizers, FSDP2 and `state_dict` see the model
that they know. Scales that are not dynamic lie beside: of `weight` the buffer `weight_start_scale`, and where
they are learned the parameter `weight_scale_shift`, in octaves, zeros in the beginning:

    scale = storable(start_scale * 2**scale_shift)

so that scales stay positive, one learning rate suits those of all blocks however large their weights are, and
weight decay pulls them back to where they were. Both have the shape
of the scales of the matrices that have blocks of their own: of gate_up_proj (E, 2I, K), whose gate and up are
apart in a checkpoint, (2E, ceil(I / rows), ceil(K / columns)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from blockscale.calibrate.formats import QuantizedFormat, round_plainly
from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.formats import BlockFP8
from blockscale.huggingface.modules import EXPERT_WEIGHTS, GATE, can_quantize, through_experts
from blockscale.qat import grouped
from blockscale.qat.fake_quant import fake_quantize, fake_quantize_input, fake_quantize_scaled, storable
from blockscale.qat.fp8_products import fp8_linear, takes_fp8
from blockscale.qat.options import QatOptions as QatOptions
from blockscale.qat.products import Rule, exact_linear, fake_quant_linear, result_dtype


@dataclass(frozen=True)
class Trained:
    """A weight that trains through its rounding.

    Attributes:
        name: of the parameter in the model, for messages.
        fmt: of the weight in the checkpoint.
        inputs: of what it is multiplied with; None leaves it as it is.
        parts: matrices with blocks of their own that lie in it one below the other.
    """

    name: str
    fmt: QuantizedFormat
    inputs: BlockFP8 | None
    parts: int = 1

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight, with those matrices apart: (E, 2I, K) -> (2E, I, K) where there are two."""
        if self.parts == 1:
            return weight
        return weight.reshape(-1, weight.shape[-2] // self.parts, weight.shape[-1])


def start_scale_name(leaf: str) -> str:
    """Name of the buffer with the scales that a weight begins with."""
    return f"{leaf}_start_scale"


def scale_shift_name(leaf: str) -> str:
    """Name of the parameter by which learned scales differ from those: log2 of their ratio."""
    return f"{leaf}_scale_shift"


def storable_scale(start: torch.Tensor, shift: torch.Tensor | None, fmt: QuantizedFormat) -> torch.Tensor:
    """The scales that a buffer and a parameter stand for, see the module; without the latter as they were."""
    return storable(start.float() if shift is None else start.float() * torch.exp2(shift.float()), fmt)


class FakeQuantLayer(nn.Module):
    """Weights that train through their rounding.

    Attributes:
        options: how.
        recipe: what the model was prepared with.
        trained: parameter -> what becomes of it.
    """

    def __init__(self, options: QatOptions, recipe: Recipe, trained: Mapping[str, Trained]) -> None:
        super().__init__()
        self.options, self.recipe, self.trained = options, recipe, dict(trained)

    def _take(self, name: str, parameter: nn.Parameter) -> None:
        """A parameter of the layer that this one stands for; a new one where its dtype is another."""
        masters = self.options.masters
        if name in self.trained and parameter.dtype != masters:
            parameter = nn.Parameter(parameter.detach().to(masters))
        self.register_parameter(name, parameter)
        if name not in self.trained or self.options.scales == "dynamic":
            return
        own = self.trained[name]
        try:
            scale = round_plainly(own.matrices(parameter.detach()), own.fmt).scale.float()
        except NonFiniteError as error:
            raise NonFiniteError(error.count, error.position, where=own.name) from None
        self.register_buffer(start_scale_name(name), scale)
        if self.options.scales == "learned":
            self.register_parameter(scale_shift_name(name), nn.Parameter(torch.zeros_like(scale)))

    def scale(self, name: str) -> torch.Tensor | None:
        """The scales of a weight as they are stored, float32; None if they are dynamic."""
        start = getattr(self, start_scale_name(name), None)
        if start is None:
            return None
        return storable_scale(start, getattr(self, scale_shift_name(name), None), self.trained[name].fmt)

    @property
    def compute(self) -> torch.dtype:
        """Dtype of operands that are not multiplied as codes."""
        return torch.bfloat16 if self.options.compute == "fp8" else self.options.compute

    def multiplies_codes(self, name: str) -> bool:
        """Whether products with a weight are those of `fp8_linear`."""
        own = self.trained[name]
        return self.options.compute == "fp8" and takes_fp8(getattr(self, name).shape, own.fmt, own.inputs)

    def fake_quantized(self, name: str) -> torch.Tensor:
        """A weight as the checkpoint will have it, of its shape; float32, or the dtype of its products.

        Blocks with NaN or Inf are NaN: a training step is told by its loss, and waits for no weight.
        """
        own, weight, scale = self.trained[name], getattr(self, name), self.scale(name)
        matrices, dtype = own.matrices(weight), torch.float32 if self.multiplies_codes(name) else self.compute
        if scale is None:
            return fake_quantize(matrices, own.fmt, dtype).view(weight.shape)
        return fake_quantize_scaled(matrices, scale, own.fmt, dtype).view(weight.shape)

    def rounded_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What a weight is multiplied with, of the dtype of the products."""
        inputs = self.trained[name].inputs
        return x.to(self.compute) if inputs is None else fake_quantize_input(x, inputs, self.compute)

    def extra_repr(self) -> str:
        """The line that printing a model shows."""
        shapes = ", ".join(f"{name}={list(getattr(self, name).shape)}" for name in self.trained)
        formats = ", ".join(str(fmt) for fmt in {each.fmt: None for each in self.trained.values()})
        codes = any(self.multiplies_codes(name) for name in self.trained)
        compute = "fp8" if codes else str(self.compute).removeprefix("torch.")
        return f"{shapes}, {formats}, {self.options.scales} scales, products in {compute}"


class FakeQuantLinear(FakeQuantLayer):
    """A linear layer: weight (N, K), bias (N,) or None."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, original: nn.Linear, options: QatOptions, recipe: Recipe, trained: Mapping[str, Trained]
    ) -> None:
        super().__init__(options, recipe, trained)
        self.in_features, self.out_features = original.in_features, original.out_features
        self._take("weight", original.get_parameter("weight"))
        self.register_parameter("bias", original.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N), of the dtype of x, or of autocast."""
        own, scale = self.trained["weight"], self.scale("weight")
        if self.multiplies_codes("weight"):
            assert isinstance(own.fmt, BlockFP8)
            return fp8_linear(x, self.weight, scale, self.bias, own.fmt)
        return fake_quant_linear(x, self.weight, scale, self.bias, Rule(own.fmt, own.inputs, self.compute))


class FakeQuantExperts(FakeQuantLayer):
    """The routed experts of a layer: gate_up_proj (E, 2I, K) over down_proj (E, K, I), one or both trained.

    Attributes:
        num_experts: E.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self, original: nn.Module, options: QatOptions, recipe: Recipe, trained: Mapping[str, Trained]
    ) -> None:
        super().__init__(options, recipe, trained)
        for name in EXPERT_WEIGHTS:
            self._take(name, original.get_parameter(name))
        self.num_experts = self.gate_up_proj.shape[0]
        # A bound method: its module gives up the weights, and is no part of this one.
        original._parameters.clear()
        self._gate: Callable[[torch.Tensor], torch.Tensor] = getattr(original, GATE)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `through_experts`."""
        if self._takes_all_at_once(hidden_states):
            return self.all_at_once(hidden_states, top_k_index, top_k_weights)
        # Taken apart by `unbind`: the gradient of an index is as large as all experts together.
        weights = {name: self._matrices(name).unbind(0) for name in EXPERT_WEIGHTS}
        dtype = result_dtype(hidden_states, self.compute)

        def product(name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
            weight = weights[name][expert]
            if name not in self.trained:
                return linear(x, weight)
            return exact_linear(self.rounded_input(name, x), weight).to(dtype)

        def compute(expert: int, x: torch.Tensor) -> torch.Tensor:
            return product("down_proj", expert, self._gate(product("gate_up_proj", expert, x)))

        return through_experts(hidden_states, top_k_index, top_k_weights, compute)

    def all_at_once(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The same, by grouped products of all experts, both of whose weights train."""
        weights = {name: self.fake_quantized(name) for name in EXPERT_WEIGHTS}
        dtype = result_dtype(hidden_states, self.compute)

        def compute(rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            hidden = self._gate(grouped.grouped_linear(rows, weights["gate_up_proj"], ends).to(dtype))
            rounded = self.rounded_input("down_proj", hidden)
            return grouped.grouped_linear(rounded, weights["down_proj"], ends).to(dtype)

        rounded = self.rounded_input("gate_up_proj", hidden_states)  # once for all experts of a token
        made = grouped.through_experts_at_once(rounded, top_k_index, top_k_weights, self.num_experts, compute)
        return made.to(hidden_states.dtype)

    def _takes_all_at_once(self, x: torch.Tensor) -> bool:
        both = len(self.trained) == len(EXPERT_WEIGHTS) and self.compute == torch.bfloat16
        aligned = all(grouped.is_aligned(getattr(self, name)) for name in EXPERT_WEIGHTS)
        return both and aligned and bool(len(x)) and grouped.is_fast(x.device)

    def _matrices(self, name: str) -> torch.Tensor:
        return self.fake_quantized(name) if name in self.trained else getattr(self, name)


def check_replaceable(module: nn.Module, trained: Mapping[str, Trained]) -> None:
    """Refuse a module that no layer can stand for with these parameters trained.

    Raises:
        BlockscaleError: as said.
    """
    if not all(can_quantize(module, name) for name in trained):
        raise BlockscaleError(
            f"{type(module).__name__} cannot train through the rounding of its weights",
            where=next(iter(trained.values())).name,
            expected="torch.nn.Linear, or experts of gate_up_proj (E, 2I, K) and down_proj without bias",
            remedy="leave it out of what the recipe quantizes",
        )


def fake_quant_layer(
    module: nn.Module, options: QatOptions, recipe: Recipe, trained: Mapping[str, Trained]
) -> FakeQuantLayer:
    """The layer that stands for one that is replaceable, with its parameters.

    Raises:
        NonFiniteError: a weight whose scales are to be fixed holds NaN or Inf.
    """
    if isinstance(module, nn.Linear):
        return FakeQuantLinear(module, options, recipe, trained)
    return FakeQuantExperts(module, options, recipe, trained)


def fake_quant_layers(model: nn.Module) -> Iterator[tuple[str, FakeQuantLayer]]:
    """Full path and layer of every one in a model."""
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantLayer):
            yield path, module


@torch.no_grad()
def fake_quantized_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Full parameter name and values, float32 or bfloat16, of every weight as the checkpoint will have it."""
    for path, layer in fake_quant_layers(model):
        for name in layer.trained:
            yield f"{path}.{name}", layer.fake_quantized(name)
