"""Stations of a decoder layer: the points where tensors reach linear layers that are to be rounded.

Linear layers that are given the same tensor (q, k and v, gate and up) form one station and share one sum of
moments; the routed experts of a layer form one of their own. Stations come in the order in which the layer
calls them, and what arrives at one depends on those before it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8


@dataclass(frozen=True)
class Wanted:
    """How a parameter is to be rounded.

    Attributes:
        fmt: block size and scale format.
        parts: how many matrices with blocks of their own lie in it one below the other.
    """

    fmt: BlockFP8
    parts: int = 1


@dataclass
class Chunk:
    """Some calibration sequences on their way through the model.

    Attributes:
        original: (B, T, hidden) in the original model, before the next decoder layer.
        quantized: the same in the quantized model.
        keywords: what the decoder layers to come are called with beside hidden states; the next one first.
    """

    original: torch.Tensor
    quantized: torch.Tensor
    keywords: list[dict[str, Any]]


class _Reached(Exception):
    """Ends a forward pass where the inputs that are looked for are known."""


def find_stations(layer: nn.Module, chunk: Chunk, wanted: Mapping[str, Wanted]) -> list[tuple[str, ...]]:
    """Paths of the modules of every station; modules that the layer does not call are in none.

    Args:
        layer: the decoder layer.
        chunk: what it is tried on.
        wanted: path of a parameter in the layer -> how it is to be rounded.

    Raises:
        BlockscaleError: a module is called twice.
    """
    formats: dict[str, BlockFP8] = {name.rpartition(".")[0]: each.fmt for name, each in wanted.items()}
    # The tensors are kept, or another one could get the identity of one that is gone.
    found: list[tuple[torch.Tensor, BlockFP8, list[str]]] = []

    def reached(path: str) -> Callable[..., None]:
        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if any(path in paths for _, _, paths in found):
                raise BlockscaleError("a linear layer is called twice in a decoder layer", where=path)
            for tensor, fmt, paths in found:
                if tensor is arguments[0] and fmt == formats[path] and isinstance(module, nn.Linear):
                    paths.append(path)
                    return
            found.append((arguments[0], formats[path], [path]))

        return before

    hooks = [layer.get_submodule(path).register_forward_pre_hook(reached(path)) for path in formats]
    with _removed(hooks):
        run(layer, chunk.original, chunk.keywords[0])
    return [tuple(paths) for _, _, paths in found]


def inputs_of(
    layer: nn.Module, path: str, hidden: torch.Tensor, keywords: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """What a module of the layer is called with; nothing after it is computed."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.append(arguments)
        raise _Reached

    with _removed([layer.get_submodule(path).register_forward_pre_hook(before, prepend=True)]):
        try:
            run(layer, hidden, keywords)
        except _Reached:
            return seen[0]
    raise BlockscaleError("a linear layer is not always called", where=path)


def run(layer: nn.Module, hidden: torch.Tensor, keywords: dict[str, Any]) -> torch.Tensor:
    """The hidden states after a decoder layer."""
    result = layer(hidden, **keywords)
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def _removed(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


@torch.no_grad()
def first_chunks(model: nn.Module, layers: nn.ModuleList, token_ids: torch.Tensor, rows: int) -> list[Chunk]:
    """Hidden states of token ids (B, T) before the first decoder layer, `rows` sequences to a chunk.

    Raises:
        BlockscaleError: the model does not call its decoder layers in their order.
    """
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def passed_on(hidden: torch.Tensor, **keywords: Any) -> torch.Tensor:
        seen.append((hidden, keywords))
        if len(seen) == len(layers):
            raise _Reached  # the logits are not needed
        return hidden

    chunks = []
    try:
        for layer in layers:
            layer.forward = passed_on
        for some in token_ids.split(rows):
            seen.clear()
            with suppress(_Reached):
                model(input_ids=some, use_cache=False)
            if len(seen) != len(layers):
                raise BlockscaleError("model does not call its decoder layers", where=type(model).__name__)
            hidden = seen[0][0].float()
            chunks.append(Chunk(hidden, hidden.clone(), [keywords for _, keywords in seen]))
    finally:
        for layer in layers:
            del layer.forward  # that of its class is back
    return chunks
