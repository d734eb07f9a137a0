"""The tensors of a checkpoint, read one at a time to where they are computed with.

Every layer takes what it needs by Hugging Face's names, relative to its own. A weight's format is seen by its
dtype; FP8 weights come with their scales. Weights that share an input are put one below the other.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from blockscale.checkpoint.index import TensorEntry, read_index
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.strips import dtype_of
from blockscale.errors import BlockscaleError, CorruptCheckpointError, MissingScaleError
from blockscale.formats import BlockFP8, scale_name
from blockscale.model.linear import Compute, Linear

FP8 = torch.float8_e4m3fn
_logger = logging.getLogger(__name__)


class Store:
    """A checkpoint that is open, and what was read of it."""

    def __init__(self, source: Source) -> None:
        """Read its headers.

        Raises:
            CorruptCheckpointError: a header or the index is wrong.
        """
        self.source, self.index = source, read_index(source)
        self.read: set[str] = set()
        self.formats: Counter[torch.dtype] = Counter()
        self._files: dict[str, np.memmap] = {}

    def bytes_of(self, entry: TensorEntry) -> torch.Tensor:
        """The bytes of a tensor; of a local file a view of it, not yet in memory."""
        if not self.source.is_local:
            data = bytearray(self.source.read(entry.file, entry.start, entry.nbytes))
            return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        if entry.file not in self._files:
            # Private: PyTorch wants memory that could be written to.
            self._files[entry.file] = np.memmap(self.source.path(entry.file), np.uint8, "c")
        return torch.from_numpy(self._files[entry.file][entry.start : entry.end])


@dataclass(frozen=True)
class Weights:
    """What a layer is built from.

    Attributes:
        device: where tensors go.
        dtype: of the model: of its activations and of weights that are not FP8.
        fmt: block size and scale format of FP8 weights, from the config.
        compute: how FP8 weights are multiplied, see `Linear`.
        on_missing_scale: refuse an FP8 weight without a scale, or use its values as they are.
        prefix: put before every name.
    """

    store: Store
    device: torch.device
    dtype: torch.dtype
    fmt: BlockFP8
    compute: Compute = "fp8"
    on_missing_scale: Literal["error", "keep"] = "error"
    prefix: str = ""

    def at(self, name: str) -> Weights:
        """The same, for names below `name`."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""
        return self.prefix + name in self.store.index.tensors

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor in the dtype of the model, or in `dtype`.

        Raises:
            CorruptCheckpointError: the checkpoint has no such tensor, or it is not of this shape.
        """
        return self._read(name, shape).to(self.device, dtype or self.dtype)

    def linear(self, name: str, rows: int, columns: int) -> Linear:
        """The layer `name` with `rows` outputs and `columns` inputs.

        Raises:
            CorruptCheckpointError: a missing tensor or a wrong shape, of the weight or of its scale.
            MissingScaleError: an FP8 weight without a scale.
        """
        weight_name = f"{name}.weight"
        weight = self._read(weight_name, (rows, columns))
        bias = self.tensor(f"{name}.bias", rows) if self.has(f"{name}.bias") else None
        self.store.formats[weight.dtype] += 1
        scale = self._scale(weight_name, weight) if weight.dtype == FP8 else None
        if scale is None:
            return Linear(weight.to(self.device, self.dtype), bias=bias, compute=self.compute)
        return Linear(weight.to(self.device), scale.to(self.device), self.fmt, bias, self.compute)

    def beside(self, rows: Mapping[str, int], columns: int) -> Linear | Parallel:
        """Layers of the same input, their outputs side by side; rows: of each, by name."""
        layers = [self.linear(name, each, columns) for name, each in rows.items()]
        block_n = self.fmt.block_size[0]
        aligned = all(layer.weight.shape[0] % block_n == 0 for layer in layers[:-1])
        same = len({layer.scale is None for layer in layers}) == 1
        if not same or not (aligned or layers[0].scale is None):
            return Parallel(tuple(layers))
        return _stacked(layers)

    def gate_up_down(self, hidden: int, width: int) -> tuple[Linear | Parallel, Linear]:
        """`gate_proj` above `up_proj`, and `down_proj`, of `width` between.

        FP8 rows of gate and up are filled up with zeros to whole blocks; silu(0) * 0 = 0 changes no product.
        """
        gate, up = (self.linear(f"{name}_proj", width, hidden) for name in ("gate", "up"))
        down = self.linear("down_proj", hidden, width)
        if (gate.scale is None) != (up.scale is None):
            return Parallel((gate, up)), down
        if gate.scale is not None:
            more = -gate.weight.shape[0] % self.fmt.block_size[0]
            gate, up, down = _rows(gate, more), _rows(up, more), _columns(down, more, self.fmt)
        return _stacked([gate, up]), down

    def experts(self, count: int, hidden: int, width: int) -> tuple[Linear, Linear]:
        """As gate_up_down of `experts.0` to `experts.{count - 1}`, with weights (E, N, K).

        Raises:
            CorruptCheckpointError: experts of one layer differ in format.
        """
        first = self.at("experts.0").gate_up_down(hidden, width)
        both = [_room(layer, count, self.prefix) for layer in first]
        for expert in range(count):
            layers = first
            if expert > 0:
                layers = self.at(f"experts.{expert}").gate_up_down(hidden, width)
            for room, layer in zip(both, layers, strict=True):
                _fill(room, layer, expert, f"{self.prefix}experts.{expert}")
        return both[0], both[1]

    @property
    def has_fp8(self) -> bool:
        """Whether an FP8 weight was read."""
        return FP8 in self.store.formats

    def summary(self) -> str:
        """What was found, in a line: layers of each format, blocks and scales, and what nobody asked for."""
        formats = {str(dtype).removeprefix("torch."): count for dtype, count in self.store.formats.items()}
        counts = ", ".join(f"{count} in {name}" for name, count in sorted(formats.items()))
        block = "x".join(map(str, self.fmt.block_size))
        scaled = f"; FP8 blocks of {block}, {self.fmt.scale_fmt} scales" if self.has_fp8 else ""
        unused = [name for name in self.store.index.tensors if name not in self.store.read]
        left = f"; {len(unused)} tensors not used, the first {unused[0]}" if unused else ""
        return f"linear layers: {counts}{scaled}{left}"

    def _scale(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        stored = scale_name(name)
        where = self.prefix + name
        if not self.has(stored):
            if self.on_missing_scale == "error":
                remedy = "requantize it, or use --on-missing-scale keep"
                raise MissingScaleError(f"FP8 weight without {stored}", where=where, remedy=remedy)
            _logger.warning("%s is FP8 without a scale: its values are taken as they are", where)
            return None
        scale = self._read(stored, None).float()
        expected = self.fmt.scale_shape(tuple(weight.shape))
        if tuple(scale.shape) != expected:
            block = "x".join(map(str, self.fmt.block_size))
            raise CorruptCheckpointError(
                f"scale does not fit blocks of {block}, which the config names",
                where=self.prefix + stored,
                expected=expected,
                got=tuple(scale.shape),
            )
        return scale

    def _read(self, name: str, shape: tuple[int, ...] | None) -> torch.Tensor:
        full = self.prefix + name
        entry = self.store.index.tensors.get(full)
        remedy = "does the config belong to this checkpoint?"
        if entry is None:
            raise CorruptCheckpointError("tensor is missing", where=full, remedy=remedy)
        if shape is not None and entry.shape != shape:
            raise CorruptCheckpointError(
                "shape is not that of the config", where=full, expected=shape, got=entry.shape, remedy=remedy
            )
        self.store.read.add(full)
        return self.store.bytes_of(entry).view(dtype_of(entry)).view(entry.shape)


@dataclass(frozen=True)
class Parallel:
    """Layers of the same input that cannot be one, for their formats or block edges; outputs side by side."""

    layers: tuple[Linear, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, K) -> (T, N), the sum of all N."""
        return torch.cat([layer(x) for layer in self.layers], -1)


def _stacked(layers: Sequence[Linear]) -> Linear:
    first = layers[0]
    scale = None if first.scale is None else _below([layer.scale for layer in layers])
    bias = None if first.bias is None else _below([layer.bias for layer in layers])
    return replace(first, weight=_below([layer.weight for layer in layers]), scale=scale, bias=bias)


def _below(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    parts = [each for each in tensors if each is not None]
    raw = torch.cat([_bytes(each) for each in parts])  # FP8 tensors cannot be concatenated everywhere
    return raw.view(parts[0].dtype).view(-1, *parts[0].shape[1:])


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _rows(layer: Linear, more: int) -> Linear:
    """With `more` rows of zeros below; the scales cover them."""
    weight = F.pad(layer.weight.view(torch.uint8), (0, 0, 0, more)).view(FP8)
    bias = None if layer.bias is None else F.pad(layer.bias, (0, more))
    return replace(layer, weight=weight, bias=bias)


def _columns(layer: Linear, more: int, fmt: BlockFP8) -> Linear:
    """With `more` columns of zeros at the right; one scale more a row where the last block is full."""
    if layer.scale is None:
        return replace(layer, weight=F.pad(layer.weight, (0, more)))
    weight = F.pad(layer.weight.view(torch.uint8), (0, more)).view(FP8)
    missing = fmt.scale_shape(tuple(weight.shape))[1] - layer.scale.shape[1]
    return replace(layer, weight=weight, scale=F.pad(layer.scale, (0, missing), value=1.0))


def _room(layer: Linear | Parallel, count: int, where: str) -> Linear:
    """For the same layer of `count` experts."""
    if isinstance(layer, Parallel) or layer.bias is not None:
        where = f"{where}experts.0"
        raise BlockscaleError("gate_proj and up_proj of an expert differ in format", where=where)
    scale = None if layer.scale is None else layer.scale.new_empty(count, *layer.scale.shape)
    return replace(layer, weight=layer.weight.new_empty(count, *layer.weight.shape), scale=scale)


def _fill(room: Linear, layer: Linear | Parallel, expert: int, where: str) -> None:
    if isinstance(layer, Parallel) or layer.weight.dtype != room.weight.dtype:
        raise CorruptCheckpointError(
            "experts of a layer differ in format",
            where=where,
            expected=str(room.weight.dtype),
            got=str(layer.layers if isinstance(layer, Parallel) else layer.weight.dtype),
        )
    room.weight[expert].copy_(layer.weight)
    if room.scale is not None and layer.scale is not None:
        room.scale[expert].copy_(layer.scale)
