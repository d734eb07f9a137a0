"""The tensors of a checkpoint, read one at a time to where they are computed with.

Every layer takes what it needs by Hugging Face's names, relative to its own. A weight's format is seen by its
dtype; FP8 weights come with their scales. Weights that share an input are put one below the other.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F

from blockscale import ops
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.precision import AS_STORED, Precision
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.strips import dtype_of
from blockscale.errors import BlockscaleError, CorruptCheckpointError, MissingScaleError, NonFiniteError
from blockscale.formats import BlockFP8, scale_name
from blockscale.model.linear import Compute, Linear

FP8 = torch.float8_e4m3fn
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """Tensors by Hugging Face's names, and what was read of them.

    Attributes:
        tensors: name -> entry.
        bytes_of: the bytes of an entry, on any device.
        read: names that were asked for.
        formats: linear layers by the dtype of their weights, after conversion.
        converted: how many were "quantized" or "dequantized" on the way.
    """

    tensors: Mapping[str, TensorEntry]
    bytes_of: Callable[[TensorEntry], torch.Tensor]
    read: set[str] = field(default_factory=set)
    formats: Counter[torch.dtype] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)


class Files:
    """The bytes of entries of a checkpoint's files."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._mapped: dict[str, np.memmap] = {}

    def bytes_of(self, entry: TensorEntry) -> torch.Tensor:
        """Bytes of a tensor; of a local file a view of it, not yet in memory."""
        if not self._source.is_local:
            data = bytearray(self._source.read(entry.file, entry.start, entry.nbytes))
            return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        if entry.file not in self._mapped:
            # Private: PyTorch wants memory that could be written to.
            self._mapped[entry.file] = np.memmap(self._source.path(entry.file), np.uint8, "c")
        return torch.from_numpy(self._mapped[entry.file][entry.start : entry.end])


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
        precision: that linear layers are converted to; without one they stay as stored.
    """

    store: Store
    device: torch.device
    dtype: torch.dtype
    fmt: BlockFP8
    compute: Compute = "fp8"
    on_missing_scale: Literal["error", "keep"] = "error"
    prefix: str = ""
    precision: Precision = AS_STORED

    def at(self, name: str) -> Weights:
        """The same, for names below `name`."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""
        return self.prefix + name in self.store.tensors

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
            BlockscaleError: a weight with NaN or Inf that is to be quantized.
        """
        weight_name = f"{name}.weight"
        weight = self._read(weight_name, (rows, columns))
        bias = self.tensor(f"{name}.bias", rows) if self.has(f"{name}.bias") else None
        scale = self._scale(weight_name, weight) if weight.dtype == FP8 else None
        weight, scale = self._converted(
            self.prefix + weight_name,
            weight.to(self.device),
            None if scale is None else scale.to(self.device),
        )
        self.store.formats[weight.dtype] += 1
        if scale is None:
            return Linear(weight.to(self.dtype), bias=bias, compute=self.compute)
        return Linear(weight, scale, self.fmt, bias, self.compute)

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

    def experts(
        self, count: int, hidden: int, width: int, shared: tuple[Linear | Parallel, Linear] | None = None
    ) -> tuple[Linear, Linear]:
        """As gate_up_down of `experts.0` to `experts.{count - 1}`, with weights (E, N, K).

        Behind them stand the shared ones, of gate_up_down, if they come apart into experts like these.

        Raises:
            CorruptCheckpointError: experts of one layer differ in format.
        """
        first = self.at("experts.0").gate_up_down(hidden, width)
        more = [] if shared is None else _apart(shared, first)
        both = [_room(layer, count + len(more), self.prefix) for layer in first]
        for expert in range(count + len(more)):
            layers: tuple[Linear | Parallel, Linear] = first
            if expert >= count:
                layers = more[expert - count]
            elif expert > 0:
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
        moved = "".join(f"; {count} {how} at load" for how, count in sorted(self.store.converted.items()))
        unused = [name for name in self.store.tensors if name not in self.store.read]
        left = f"; {len(unused)} tensors not used, the first {unused[0]}" if unused else ""
        return f"linear layers: {counts}{scaled}{moved}{left}"

    def _converted(
        self, where: str, weight: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A weight and its scale in the precision that `where` is to have."""
        wanted = self.precision.precision_of(where)
        if wanted == "fp8" and weight.dtype != FP8:
            self.store.converted["quantized"] += 1
            try:
                return ops.quantize_weight(weight, self.fmt.block_size, self.fmt.scale_fmt)
            except NonFiniteError as error:
                what = f"{error.count} NaN or Inf, which FP8 scales cannot represent"
                raise BlockscaleError(what, where=where, remedy="leave it out of the precision") from error
        if wanted == "bf16" and scale is not None:
            self.store.converted["dequantized"] += 1
            return ops.dequantize_weight(weight, scale, self.fmt.block_size, dtype=self.dtype), None
        return weight, scale

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
        entry = self.store.tensors.get(full)
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
    quantizes: ClassVar[None] = None  # each layer does that for itself

    def on(self, x: ops.Normed) -> torch.Tensor:
        """The product with a norm that is not quantized."""
        assert x.y is not None
        return self(x.y)

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


def _apart(
    wide: tuple[Linear | Parallel, Linear], like: tuple[Linear | Parallel, Linear]
) -> list[tuple[Linear, Linear]]:
    """Experts `like` one, of gate_up_down, that a wide one is the sum of; none where their formats differ.

    Nor where FP8 blocks reach over the edge between two of them, which filling up with zeros shows.
    """
    (gate_up, down), (one, one_down) = wide, like
    if isinstance(gate_up, Parallel) or isinstance(one, Parallel) or gate_up.bias is not None:
        return []
    size = one.weight.shape[0] // 2
    rows, columns = one.fmt.block_size if one.scale is not None else (1, 1)
    formats = {(layer.weight.dtype, layer.scale is None) for layer in (one, one_down, gate_up, down)}
    if len(formats) > 1 or gate_up.weight.shape[0] % (2 * size) or size % rows or size % columns:
        return []
    count = gate_up.weight.shape[0] // (2 * size)
    return [
        (
            _stacked([_part(gate_up, number + side * count, size, rows, 0) for side in (0, 1)]),
            _part(down, number, size, columns, 1),
        )
        for number in range(count)
    ]


def _part(layer: Linear, number: int, size: int, block: int, dim: int) -> Linear:
    """`size` rows (dim 0) or columns (dim 1) from number * size on; whole blocks if there are scales."""
    raw = layer.weight if layer.scale is None else layer.weight.view(torch.uint8)
    weight = raw.narrow(dim, number * size, size).contiguous().view(layer.weight.dtype)
    if layer.scale is None:
        return replace(layer, weight=weight)
    blocks = size // block
    return replace(layer, weight=weight, scale=layer.scale.narrow(dim, number * blocks, blocks).contiguous())


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
