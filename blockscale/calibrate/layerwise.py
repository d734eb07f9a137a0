"""Calibrated rounding of a transformers decoder, one decoder layer after another.

Two streams of hidden states go through the model: that of the original one, and that of the quantized one,
with quantized weights and quantized activations. A layer runs on the first stream once, and the inputs of its
linear layers are kept. Then it runs on the second stream, and each linear layer is rounded at the moment it
is called: its inputs then come from layers that are already rounded, and its output from its own new weight.
Linear layers that are given the same tensor (q, k and v, gate and up) share one sum of moments.

Memory, besides the model: both streams, and the linear inputs and moments of one decoder layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from blockscale import ops
from blockscale.calibrate.hessian import Moments, add_tokens, no_moments
from blockscale.calibrate.rounding import Search, round_weight
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8, ScaleFmt


class Rounded(NamedTuple):
    """Codes and scale of one weight, as reference.quantize_weight gives them."""

    codes: torch.Tensor
    scale: torch.Tensor


class _Stop(Exception):
    """Ends a forward pass once the inputs of the first decoder layer are known."""


@torch.no_grad()
def round_decoder(
    model: nn.Module,
    token_ids: torch.Tensor,
    fmt: BlockFP8,
    choose: Callable[[str], bool] = lambda name: True,
    search: Search | None = None,
) -> dict[str, Rounded]:
    """Round the linear layers of a decoder, in place, so that its outputs stay as they were.

    Args:
        model: a transformers causal LM in evaluation mode; float32, or the moments lose digits. The weights
            that are rounded hold their dequantized values afterwards.
        token_ids: int64 (B, T), the calibration tokens.
        fmt: block size and scale format of weights; activations are quantized in groups of block_k.
        choose: by the name of a weight, whether to round it; others keep full-precision inputs too.
        search: of the rounding.

    Returns:
        Name of the weight -> codes and scale, of every nn.Linear of the decoder layers that `choose` takes.

    Raises:
        BlockscaleError: no decoder layers, or what round_weight refuses.
    """
    layers, prefix = decoder_layers(model)
    original, keywords = _first_inputs(model, layers, token_ids)
    quantized = original.clone()
    found: dict[str, Rounded] = {}
    for number, layer in enumerate(layers):
        linears = {
            module: f"{prefix}.{number}.{name}.weight"
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and choose(f"{prefix}.{number}.{name}.weight")
        }
        inputs: dict[nn.Linear, torch.Tensor] = {}
        original = _run(layer, original, keywords, linears, inputs.__setitem__)
        rounder = _Rounder(linears, inputs, fmt, search, found)
        quantized = _run(layer, quantized, keywords, linears, rounder)
    return found


def quantized_inputs(x: torch.Tensor, group_size: int, scale_fmt: ScaleFmt) -> torch.Tensor:
    """float32 (..., K): x (..., K) after quantize_activation and back, as a GEMM sees it."""
    codes, scale = ops.quantize_activation(x.reshape(-1, x.shape[-1]), group_size, scale_fmt)
    # A group of activations is a block of one row, and of weights there is a fast dequantizer.
    return ops.dequantize_weight(codes, scale, (1, group_size), torch.float32).view(x.shape)


class _Rounder:
    """Rounds a linear layer when it is about to be called, and hands it quantized inputs."""

    def __init__(
        self,
        names: dict[nn.Linear, str],
        inputs: dict[nn.Linear, torch.Tensor],
        fmt: BlockFP8,
        search: Search | None,
        found: dict[str, Rounded],
    ) -> None:
        self.names, self.inputs, self.fmt, self.search, self.found = names, inputs, fmt, search, found
        self.last: tuple[torch.Tensor, torch.Tensor, Moments] | None = None

    def __call__(self, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        name = self.names[module]
        if name in self.found:
            raise BlockscaleError("a linear layer is called twice in a decoder layer", where=name)
        if self.last is None or self.last[0] is not x:
            group = self.fmt.block_size[1]
            xq = quantized_inputs(x, group, self.fmt.scale_fmt)
            self.last = x, xq, add_tokens(no_moments(x.shape[-1], x.device), self.inputs[module], xq)
        _, xq, moments = self.last
        del self.inputs[module]
        rounded = Rounded(*round_weight(module.weight, moments, self.fmt, self.search))
        values = ops.dequantize_weight(*rounded, self.fmt.block_size, torch.float32)
        module.weight.copy_(values)
        self.found[name] = rounded
        return xq.to(x.dtype)


def _run(
    layer: nn.Module,
    hidden: torch.Tensor,
    keywords: dict[str, Any],
    linears: dict[nn.Linear, str],
    before: Callable[[nn.Linear, torch.Tensor], torch.Tensor | None],
) -> torch.Tensor:
    """The layer's output, with `before` called on every chosen linear layer and its inputs."""
    hooks = [
        module.register_forward_pre_hook(lambda module, arguments: before(module, arguments[0]))
        for module in linears
    ]
    try:
        result = layer(hidden, **keywords)
    finally:
        for hook in hooks:
            hook.remove()
    return result[0] if isinstance(result, tuple) else result


def decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, str]:
    """The decoder layers of a transformers causal LM, and the name of their list.

    Raises:
        BlockscaleError: there is no list of modules named `layers`.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers"
    }
    if not lists:
        raise BlockscaleError("model has no decoder layers", where=type(model).__name__)
    name = max(lists, key=lambda each: len(lists[each]))
    return lists[name], name


def _first_inputs(
    model: nn.Module, layers: nn.ModuleList, token_ids: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Hidden states before the first decoder layer, and what else every decoder layer is called with."""
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append((arguments[0], keywords))
        raise _Stop

    hook = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=token_ids, use_cache=False)
    except _Stop:
        return seen[0]
    finally:
        hook.remove()
    raise BlockscaleError("model does not call its decoder layers", where=type(model).__name__)
