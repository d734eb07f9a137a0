"""Stations of a decoder layer: the points where tensors reach linear layers that are to be rounded.

Linear layers that are given the same tensor (q, k and v, gate and up) form one station and share one sum of
moments; the routed experts of a layer form one of their own. Stations come in the order in which the layer
calls them, and what arrives at one depends on those before it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from blockscale.calibrate.formats import QuantizedFormat
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8


@dataclass(frozen=True)
class Wanted:
    """How a parameter is to be rounded.

    Attributes:
        fmt: of the weight.
        inputs: of its inputs, which are quantized in groups of block_k.
        parts: how many matrices with blocks of their own lie in it one below the other.
    """

    fmt: QuantizedFormat
    inputs: BlockFP8
    parts: int = 1


@dataclass
class Chunk:
    """Some calibration sequences on their way through the model.

    Attributes:
        original: (B, T, hidden) in the original model, before the next decoder layer.
        quantized: the same in the quantized model.
        keywords: what the decoder layers to come are called with beside hidden states; the next one first.
        outputs: of modules of the layer at hand, in the original and in the quantized model: those that do
            not change any more, by their paths.
    """

    original: torch.Tensor
    quantized: torch.Tensor
    keywords: list[dict[str, Any]]
    outputs: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))


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
    formats: dict[str, BlockFP8] = {name.rpartition(".")[0]: each.inputs for name, each in wanted.items()}
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
    layer: nn.Module, path: str, hidden: torch.Tensor, keywords: dict[str, Any], until: str | None = None
) -> tuple[torch.Tensor, ...]:
    """What a module of the layer is called with; nothing is computed after it, or after module `until`."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.append(arguments)
        if until is None:
            raise _Reached

    def after(*_: object) -> None:
        raise _Reached

    hooks: list[Any] = [layer.get_submodule(path).register_forward_pre_hook(before, prepend=True)]
    if until is not None:
        hooks.append(layer.get_submodule(until).register_forward_hook(after))
    with _removed(hooks), suppress(_Reached):
        run(layer, hidden, keywords)
    if not seen:
        raise BlockscaleError("a linear layer is not always called", where=path)
    return seen[0]


def finished_modules(
    layer: nn.Module, past: Sequence[Sequence[str]], ahead: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    """The outermost modules with stations of which all are past; single linear layers not.

    What they give does not change any more.
    """

    def has(module: str, stations: Sequence[Sequence[str]]) -> bool:
        return any(f"{path}.".startswith(f"{module}.") for paths in stations for path in paths)

    found: list[str] = []
    for name, module in layer.named_modules():
        whole = name and not isinstance(module, nn.Linear) and has(name, past) and not has(name, ahead)
        if whole and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return tuple(found)


@contextmanager
def given(layer: nn.Module, paths: Sequence[str], outputs: dict[str, Any]) -> Iterator[None]:
    """Modules of a layer give the outputs that are known, and what others give becomes known.

    Args:
        layer: which is run once.
        paths: of modules whose outputs do not change any more.
        outputs: path -> output, on the host; those of `paths` that are missing are put there.
    """
    host, here = torch.device("cpu"), next(layer.parameters()).device
    replaced = [(layer.get_submodule(path), output) for path, output in outputs.items()]

    def keep(path: str) -> Callable[..., None]:
        def after(_: nn.Module, __: object, output: Any) -> None:
            for inner in [each for each in outputs if each.startswith(f"{path}.")]:
                del outputs[inner]
            outputs[path] = moved(output, host, copy=True)  # whoever called may write into it

        return after

    hooks = [
        layer.get_submodule(path).register_forward_hook(keep(path)) for path in paths if path not in outputs
    ]
    for module, output in replaced:
        module.forward = lambda *_, output=output, **__: moved(output, here, copy=True)
    try:
        with _removed(hooks):
            yield
    finally:
        for module, _ in replaced:
            del module.forward  # that of its class is back


def run(layer: nn.Module, hidden: torch.Tensor, keywords: dict[str, Any]) -> torch.Tensor:
    """The hidden states after a decoder layer."""
    with _EqualHeads():
        result = layer(hidden, **keywords)
    return result[0] if isinstance(result, tuple) else result


class _EqualHeads(TorchFunctionMode):
    """Attention on a CPU gets values as wide as its keys: only so it does not keep all probabilities."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention or len(args) != 3:
            return func(*args, **kwargs)
        query, key, value = args
        width = value.shape[-1]
        if query.device.type != "cpu" or width >= key.shape[-1]:
            return func(*args, **kwargs)
        wide = nn.functional.pad(value, (0, key.shape[-1] - width))
        return func(query, key, wide, **kwargs)[..., :width]


def moved(value: Any, device: torch.device, *, copy: bool = False) -> Any:
    """Tensors, and tensors in containers, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=copy)
    if isinstance(value, dict):
        return {key: moved(each, device, copy=copy) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(each, device, copy=copy) for each in value)
    return value


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
