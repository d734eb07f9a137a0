"""Calibrated rounding of a transformers decoder, one decoder layer after another.

Two streams of hidden states go through the model: that of the original one, and that of the quantized one,
with quantized weights and quantized activations. At every station of a layer (see stations.py) the inputs of
both are summed to moments, chunk by chunk, then the station's linear layers are rounded: the inputs of the
next station come from layers that are rounded already. When all are, both streams move on to the next layer.

Memory, beside the weights: both streams; a decoder layer twice, a chunk's inputs, and the moments of one
station. The layer is run up to each station anew, so that no inputs of whole streams are kept, but those of
routed experts. What attention and experts give once all of their stations are rounded is kept on the host,
each as much as the streams, and computed no more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from blockscale.calibrate.activations import quantized_inputs
from blockscale.calibrate.experts import Call, RoundedExperts, count_tokens, round_experts
from blockscale.calibrate.formats import Rounding, values_of
from blockscale.calibrate.hessian import add_tokens, no_moments
from blockscale.calibrate.rounding import Search, round_weight
from blockscale.calibrate.stations import (
    Chunk,
    Wanted,
    find_stations,
    finished_modules,
    given,
    inputs_of,
    moved,
    run,
)
from blockscale.huggingface.modules import EXPERT_WEIGHTS


class Place(NamedTuple):
    """A matrix in a parameter of a layer: of which expert, and which of the parts one below the other."""

    parameter: str
    expert: int | None = None
    part: int = 0


Roundings = dict[Place, Rounding]


class RoundedLayer(NamedTuple):
    """What became of a decoder layer.

    Attributes:
        roundings: codes and scale of every matrix.
        tokens: path of routed experts -> tokens that each of them was given.
        amax: (parameter of routed experts, expert) -> the largest absolute value of its inputs.
    """

    roundings: Roundings
    tokens: dict[str, tuple[int, ...]]
    amax: dict[tuple[str, int], float]


@torch.no_grad()
def round_layer(
    layer: nn.Module,
    chunks: Sequence[Chunk],
    wanted: Mapping[str, Wanted],
    search: Search | None = None,
    known: Mapping[Place, Rounding] | None = None,
) -> RoundedLayer:
    """Round a decoder layer in place, and move both streams on to the next one.

    Args:
        layer: float32, on the device where it is to run.
        chunks: both streams, which are replaced.
        wanted: path of a parameter in the layer -> how it is to be rounded: the weight of a linear layer, or
            one of fused experts.
        search: of the rounding.
        known: what an earlier call found; nothing is rounded then, and no tokens are counted.

    Returns:
        Codes and scale of every matrix; linear layers that are never called are not there.

    Raises:
        BlockscaleError: a linear layer is called twice, or what round_weight refuses.
    """
    original = copy.deepcopy(layer)
    made = RoundedLayer({}, {}, {})
    with _quantizing(layer) as quantize:
        stations = find_stations(original, _there(chunks[0], layer), wanted)
        for number, paths in enumerate(stations):
            mine = {name: each for name, each in wanted.items() if name.rpartition(".")[0] in paths}
            if known is not None:
                made.roundings.update(
                    (place, rounding) for place, rounding in known.items() if place.parameter in mine
                )
                _put(layer, mine, made.roundings)
            else:
                before, after = (
                    finished_modules(layer, stations[:end], stations[end:]) for end in (number, number + 1)
                )
                station = _Station(paths[0], before, after, original, layer)
                if isinstance(layer.get_submodule(paths[0]), nn.Linear):
                    made.roundings.update(_round_linears(station, chunks, mine, search))
                else:
                    of_experts = _round_experts(station, chunks, mine, search)
                    made.roundings.update(of_experts.roundings)
                    made.tokens.update(of_experts.tokens)
                    made.amax.update(of_experts.amax)
            quantize(paths, mine)
        _move_on(original, layer, chunks)
    return made


def _move_on(original: nn.Module, layer: nn.Module, chunks: Sequence[Chunk]) -> None:
    """Both streams through the layer."""
    for chunk in chunks:
        here = _there(chunk, layer)
        with given(original, (), chunk.outputs[0]), given(layer, (), chunk.outputs[1]):
            x = run(original, here.original, here.keywords[0])
            y = run(layer, here.quantized, here.keywords[0])
        chunk.original, chunk.quantized = x.to(chunk.original.device), y.to(chunk.quantized.device)
        chunk.keywords, chunk.outputs = chunk.keywords[1:], ({}, {})


class _Station(NamedTuple):
    """A station that is to be rounded.

    Attributes:
        path: of one of its modules.
        before: modules whose outputs do not change any more.
        after: the same, when the station is rounded: in the original model they do not change now.
        original: the layer as it was.
        layer: the layer, rounded and quantizing up to here.
    """

    path: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    original: nn.Module
    layer: nn.Module

    def inputs(self, chunk: Chunk) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """What the module is called with for a chunk, in the original and in the quantized model."""
        here, path = _there(chunk, self.layer), self.path
        until = next((each for each in self.after if f"{path}.".startswith(f"{each}.")), None)
        with given(self.original, self.after, chunk.outputs[0]):
            x = inputs_of(self.original, path, here.original, here.keywords[0], until)
        with given(self.layer, self.before, chunk.outputs[1]):
            return x, inputs_of(self.layer, path, here.quantized, here.keywords[0])


def _round_linears(
    station: _Station, chunks: Sequence[Chunk], wanted: Mapping[str, Wanted], search: Search | None
) -> Roundings:
    """Round linear layers that are given the same tensor."""
    layer, inputs = station.layer, next(iter(wanted.values())).inputs
    weight = layer.get_parameter(next(iter(wanted)))
    moments = no_moments(weight.shape[1], weight.device)
    for chunk in chunks:
        (x, *_), (y, *_) = station.inputs(chunk)
        moments = add_tokens(moments, x, quantized_inputs(y, inputs))
    found: Roundings = {}
    for name, each in wanted.items():
        weight = layer.get_parameter(name)
        rounding = found[Place(name)] = round_weight(weight, moments, each.fmt, search)
        weight.copy_(values_of(rounding, each.fmt, weight.shape[1]))
    return found


def _round_experts(
    station: _Station, chunks: Sequence[Chunk], wanted: Mapping[str, Wanted], search: Search | None
) -> RoundedLayer:
    """Round the routed experts of the layer."""
    calls = []
    for chunk in chunks:
        (x, *_), (y, index, *_) = station.inputs(chunk)
        calls.append(Call(x.to(chunk.original.device), y.to(chunk.original.device), index))
    leaves = {name.rpartition(".")[2]: each for name, each in wanted.items()}
    module, twin = (each.get_submodule(station.path) for each in (station.layer, station.original))
    rounded = round_experts(module, twin, calls, leaves, search)
    return RoundedLayer(
        {Place(f"{station.path}.{leaf}", *where): each for (leaf, *where), each in rounded.roundings.items()},
        {station.path: count_tokens(calls, len(getattr(module, EXPERT_WEIGHTS[0])))},
        {(f"{station.path}.{leaf}", expert): each for (leaf, expert), each in rounded.amax.items()},
    )


def _put(layer: nn.Module, wanted: Mapping[str, Wanted], roundings: Roundings) -> None:
    """Put known codes and scales into the weights of the layer."""
    for place, rounding in roundings.items():
        if place.parameter in wanted:
            each, weight = wanted[place.parameter], layer.get_parameter(place.parameter)
            part = weight if place.expert is None else weight[place.expert].chunk(each.parts)[place.part]
            made = Rounding(rounding.codes.to(weight.device), rounding.scale.to(weight.device))
            part.copy_(values_of(made, each.fmt, part.shape[1]))


@contextmanager
def _quantizing(layer: nn.Module) -> Iterator[Callable[[Sequence[str], Mapping[str, Wanted]], None]]:
    """Modules of a layer, once they are named, quantize their inputs until the end."""
    hooks, replaced = [], {}

    def quantize(paths: Sequence[str], wanted: Mapping[str, Wanted]) -> None:
        for path in paths:
            module = layer.get_submodule(path)
            if isinstance(module, nn.Linear):
                inputs = wanted[f"{path}.weight"].inputs
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda _, x, inputs=inputs: (quantized_inputs(x[0], inputs),)
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
    keywords = [moved(each, device) for each in chunk.keywords[:1]]
    return Chunk(chunk.original.to(device), chunk.quantized.to(device), keywords)
