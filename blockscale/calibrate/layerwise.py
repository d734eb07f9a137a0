"""Calibrated rounding of a transformers decoder, one decoder layer after another.

Two streams of hidden states go through the model: that of the original one, and that of the quantized one,
with quantized weights and quantized activations. At every station of a layer (see stations.py) the inputs of
both are summed to moments, chunk by chunk, then the station's linear layers are rounded: the inputs of the
next station come from layers that are rounded already. When all are, both streams move on to the next layer.

Memory, beside the model: both streams; a decoder layer twice, a chunk's inputs, and the moments of one
station. The layer is run up to each station anew, about three forward passes of each stream: so no inputs of
whole streams are kept, but those of routed experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from blockscale import ops
from blockscale.calibrate.activations import quantized_inputs
from blockscale.calibrate.experts import Call, RoundedExperts, round_experts
from blockscale.calibrate.hessian import add_tokens, no_moments
from blockscale.calibrate.rounding import Rounding, Search, round_weight
from blockscale.calibrate.stations import (
    Chunk,
    Wanted,
    find_stations,
    inputs_of,
    run,
)


class Place(NamedTuple):
    """A matrix in a parameter of a layer: of which expert, and which of the parts one below the other."""

    parameter: str
    expert: int | None = None
    part: int = 0


Roundings = dict[Place, Rounding]


@torch.no_grad()
def round_layer(
    layer: nn.Module,
    chunks: Sequence[Chunk],
    wanted: Mapping[str, Wanted],
    search: Search | None = None,
    known: Mapping[Place, Rounding] | None = None,
) -> Roundings:
    """Round a decoder layer in place, and move both streams on to the next one.

    Args:
        layer: float32, on the device where it is to run.
        chunks: both streams, which are replaced.
        wanted: path of a parameter in the layer -> how it is to be rounded: the weight of a linear layer, or
            one of fused experts.
        search: of the rounding.
        known: what an earlier call found; nothing is rounded then.

    Returns:
        Codes and scale of every matrix. Linear layers that are never called are not there.

    Raises:
        BlockscaleError: a linear layer is called twice, or what round_weight refuses.
    """
    original = copy.deepcopy(layer)
    found: Roundings = {}
    with _quantizing(layer) as quantize:
        for paths in find_stations(original, _there(chunks[0], layer), wanted):
            mine = {name: each for name, each in wanted.items() if name.rpartition(".")[0] in paths}
            if known is not None:
                found |= {place: rounding for place, rounding in known.items() if place.parameter in mine}
                _put(layer, mine, found)
            elif isinstance(layer.get_submodule(paths[0]), nn.Linear):
                found |= _round_linears(layer, original, chunks, mine, search)
            else:
                found |= _round_experts(layer, original, chunks, paths[0], mine, search)
            quantize(paths, mine)
        for chunk in chunks:
            here = _there(chunk, layer)
            chunk.original = run(original, here.original, here.keywords[0]).to(chunk.original.device)
            chunk.quantized = run(layer, here.quantized, here.keywords[0]).to(chunk.quantized.device)
            chunk.keywords = chunk.keywords[1:]
    return found


def _round_linears(
    layer: nn.Module,
    original: nn.Module,
    chunks: Sequence[Chunk],
    wanted: Mapping[str, Wanted],
    search: Search | None,
) -> Roundings:
    """Round linear layers that are given the same tensor."""
    name, fmt = next((name, each.fmt) for name, each in wanted.items())
    path, weight = name.rpartition(".")[0], layer.get_parameter(name)
    moments = no_moments(weight.shape[1], weight.device)
    for chunk in chunks:
        here = _there(chunk, layer)
        x = inputs_of(original, path, here.original, here.keywords[0])[0]
        xq = quantized_inputs(inputs_of(layer, path, here.quantized, here.keywords[0])[0], fmt)
        moments = add_tokens(moments, x, xq)
    found: Roundings = {}
    for name in wanted:
        weight = layer.get_parameter(name)
        rounding = found[Place(name)] = round_weight(weight, moments, fmt, search)
        weight.copy_(ops.dequantize_weight(*rounding, fmt.block_size, torch.float32))
    return found


def _round_experts(
    layer: nn.Module,
    original: nn.Module,
    chunks: Sequence[Chunk],
    path: str,
    wanted: Mapping[str, Wanted],
    search: Search | None,
) -> Roundings:
    """Round the routed experts of the layer."""
    calls = []
    for chunk in chunks:
        here = _there(chunk, layer)
        x = inputs_of(original, path, here.original, here.keywords[0])[0]
        y, index = inputs_of(layer, path, here.quantized, here.keywords[0])[:2]
        calls.append(Call(x.to(chunk.original.device), y.to(chunk.original.device), index))
    leaves = {name.rpartition(".")[2]: each for name, each in wanted.items()}
    twin = original.get_submodule(path)
    rounded = round_experts(layer.get_submodule(path), twin, calls, leaves, search)
    return {Place(f"{path}.{leaf}", *where): rounding for (leaf, *where), rounding in rounded.items()}


def _put(layer: nn.Module, wanted: Mapping[str, Wanted], roundings: Roundings) -> None:
    """Put known codes and scales into the weights of the layer."""
    for place, rounding in roundings.items():
        if place.parameter in wanted:
            each, weight = wanted[place.parameter], layer.get_parameter(place.parameter)
            part = weight if place.expert is None else weight[place.expert].chunk(each.parts)[place.part]
            made = (rounding.codes.to(weight.device), rounding.scale.to(weight.device))
            part.copy_(ops.dequantize_weight(*made, each.fmt.block_size, torch.float32))


@contextmanager
def _quantizing(layer: nn.Module) -> Iterator[Callable[[Sequence[str], Mapping[str, Wanted]], None]]:
    """Modules of a layer, once they are named, quantize their inputs until the end."""
    hooks, replaced = [], {}

    def quantize(paths: Sequence[str], wanted: Mapping[str, Wanted]) -> None:
        for path in paths:
            module = layer.get_submodule(path)
            if isinstance(module, nn.Linear):
                fmt = wanted[f"{path}.weight"].fmt
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda _, inputs, fmt=fmt: (quantized_inputs(inputs[0], fmt),)
                    )
                )
            else:
                leaves = {name.rpartition(".")[2]: each for name, each in wanted.items()}
                replaced[path] = module
                layer.set_submodule(path, RoundedExperts(module, leaves))

    try:
        yield quantize
    finally:
        for hook in hooks:
            hook.remove()
        for path, module in replaced.items():
            layer.set_submodule(path, module)


def _there(chunk: Chunk, layer: nn.Module) -> Chunk:
    """The chunk where the layer is."""
    device = next(layer.parameters()).device
    keywords = [_moved(each, device) for each in chunk.keywords[:1]]
    return Chunk(chunk.original.to(device), chunk.quantized.to(device), keywords)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(each, device) for each in value)
    return value
