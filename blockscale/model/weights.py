"""The tensors of a checkpoint, read one at a time to where they are computed with.

Every layer takes what it needs by Hugging Face's names, relative to its own. A weight's format is seen by its
dtype; FP8 weights come with their scales. Weights that share an input are put one below the other.

A size may be a `Part`: then the tensor is this rank's part of what all ranks share.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from blockscale import ops
from blockscale.checkpoint.decide import scale_of
from blockscale.checkpoint.group_storage import LowBitWeight
from blockscale.checkpoint.precision import AS_STORED, Precision
from blockscale.checkpoint.strips import dtype_of
from blockscale.errors import BlockscaleError, CorruptCheckpointError, MissingScaleError, NonFiniteError
from blockscale.formats import BlockFP8, scale_name
from blockscale.model import low_bits
from blockscale.model.linear import Compute, Linear, W4Experts
from blockscale.model.ranks import ONE, Ranks
from blockscale.model.slices import Part, narrowed, share
from blockscale.model.stack import Parallel, more_columns, more_rows, put, room_for, split_up, stacked
from blockscale.model.store import Store

FP8 = torch.float8_e4m3fn
Size = int | Part
_logger = logging.getLogger(__name__)


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
        ranks: that share the model.
        low: weights of fewer than 8 bits, by their names before quantization.
    """

    store: Store
    device: torch.device
    dtype: torch.dtype
    fmt: BlockFP8
    compute: Compute = "fp8"
    on_missing_scale: Literal["error", "keep"] = "error"
    prefix: str = ""
    precision: Precision = AS_STORED
    ranks: Ranks = ONE
    low: Mapping[str, LowBitWeight] = field(default_factory=dict)

    def at(self, name: str) -> Weights:
        """The same, for names below `name`."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""
        return self.prefix + name in self.store.tensors or self.prefix + name in self.low

    def names(self) -> list[str]:
        """Names of all tensors of the checkpoint, of weights those before quantization."""
        codes = {each.codes: name for name, each in self.low.items()}
        return [codes.get(name, name) for name in self.store.tensors]

    def share(self, size: int, block: int = 1) -> Part:
        """This rank's part of a dimension, of whole blocks; as the files have it, if they were divided."""
        return share(size, self.ranks, 1 if self.store.divided else block)

    def share_width(self, width: int) -> Part:
        """This rank's part of the width between two layers, either of which may be in FP8 blocks."""
        return self.share(width, math.lcm(*self.fmt.block_size))

    def tensor(self, name: str, *shape: Size, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor in the dtype of the model, or in `dtype`.

        Raises:
            CorruptCheckpointError: the checkpoint has no such tensor, or it is not of this shape.
        """
        parts = self._parts(*shape)
        own = narrowed(self.read(name, parts), [part.indices for part in parts])
        return own.to(self.device, dtype or self.dtype)

    def linear(self, name: str, rows: Size, columns: Size) -> Linear:
        """The layer `name` with `rows` outputs and `columns` inputs.

        With a part of the inputs it is a summand of the layer, whose bias rank 0 adds.

        Raises:
            CorruptCheckpointError: a missing tensor or a wrong shape, of the weight or of its scale.
            MissingScaleError: an FP8 weight without a scale.
            BlockscaleError: a weight with NaN or Inf that is to be quantized.
        """
        weight_name = f"{name}.weight"
        bias = self.tensor(f"{name}.bias", rows) if self.has(f"{name}.bias") else None
        if isinstance(columns, Part) and columns.rank > 0:
            bias = None
        weight, scale = self._own(weight_name, *self._parts(rows, columns))
        self.store.formats[weight.dtype] += 1
        if scale is None:
            return Linear(weight.to(self.dtype), bias=bias, compute=self.compute)
        return Linear(weight, scale, self.fmt, bias, self.compute)

    def beside(self, rows: Mapping[str, Size], columns: Size) -> Linear | Parallel:
        """Layers of the same input, their outputs side by side; rows: of each, by name."""
        layers = [self.linear(name, each, columns) for name, each in rows.items()]
        block_n = self.fmt.block_size[0]
        aligned = all(layer.weight.shape[0] % block_n == 0 for layer in layers[:-1])
        same = len({layer.scale is None for layer in layers}) == 1
        if not same or not (aligned or layers[0].scale is None):
            return Parallel(tuple(layers))
        return stacked(layers)

    def gate_up_down(self, hidden: int, width: Size) -> tuple[Linear | Parallel, Linear]:
        """`gate_proj` above `up_proj`, and `down_proj`, of `width` between.

        FP8 rows of gate and up are filled up with zeros to whole blocks; silu(0) * 0 = 0 changes no product.
        """
        gate, up = (self.linear(f"{name}_proj", width, hidden) for name in ("gate", "up"))
        down = self.linear("down_proj", hidden, width)
        if (gate.scale is None) != (up.scale is None):
            return Parallel((gate, up)), down
        if gate.scale is not None:
            more = -gate.weight.shape[0] % self.fmt.block_size[0]
            gate, up, down = more_rows(gate, more), more_rows(up, more), more_columns(down, more, self.fmt)
        return stacked([gate, up]), down

    def experts(
        self, numbers: range, hidden: int, width: int, shared: tuple[Linear | Parallel, Linear] | None = None
    ) -> tuple[Linear, Linear] | tuple[W4Experts, W4Experts]:
        """As gate_up_down of those `experts.*` that `numbers` names, with weights (E, N, K).

        Behind them stand the shared ones, of gate_up_down, if they come apart into experts like these.

        Raises:
            CorruptCheckpointError: experts of one layer differ in format.
        """
        first_name = f"experts.{numbers.start}"
        low = self.low.get(f"{self.prefix}{first_name}.gate_proj.weight")
        if low is not None and low_bits.stays(self, first_name, low.fmt, hidden, width):
            return low_bits.w4_experts(self, numbers, hidden, width, low.fmt)
        first = self.at(first_name).gate_up_down(hidden, width)
        more = [] if shared is None else split_up(shared, first)
        count = len(numbers)
        both = [room_for(layer, count + len(more), self.prefix + first_name) for layer in first]
        for place in range(count + len(more)):
            layers: tuple[Linear | Parallel, Linear] = first
            name = f"experts.{numbers.start + place}"
            if place >= count:
                layers = more[place - count]
            elif place > 0:
                layers = self.at(name).gate_up_down(hidden, width)
            for room, layer in zip(both, layers, strict=True):
                put(room, layer, place, self.prefix + name)
        return both[0], both[1]

    @property
    def has_fp8(self) -> bool:
        """Whether an FP8 weight was read."""
        return FP8 in self.store.formats

    def summary(self) -> str:
        """What was found, in a line: layers of each format, blocks and scales, and what nobody asked for."""
        formats = {str(kind).removeprefix("torch."): count for kind, count in self.store.formats.items()}
        counts = ", ".join(f"{count} in {name}" for name, count in sorted(formats.items()))
        block = "x".join(map(str, self.fmt.block_size))
        scaled = f"; FP8 blocks of {block}, {self.fmt.scale_fmt} scales" if self.has_fp8 else ""
        moved = "".join(f"; {count} {how} at load" for how, count in sorted(self.store.converted.items()))
        # Layers of multi-token prediction are read on request, and never their copies of embedding and head.
        mark = "eh_proj.weight"
        apart = tuple(name.removesuffix(mark) for name in self.names() if name.endswith(f".{mark}"))
        unused = [
            name for name in self.store.tensors if name not in self.store.read and not name.startswith(apart)
        ]
        left = f"; {len(unused)} tensors not used, the first {unused[0]}" if unused else ""
        return f"linear layers: {counts}{scaled}{moved}{left}"

    def _parts(self, *shape: Size) -> tuple[Part, ...]:
        """This rank's parts of a tensor of the files; divided files have no more than them."""
        parts = (each if isinstance(each, Part) else Part((each,)) for each in shape)
        return tuple(part.alone if self.store.divided else part for part in parts)

    def _own(self, name: str, rows: Part, columns: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's part of a weight, in the precision that it is to have, and its scale if it has one."""
        parts, sides, where = (rows, columns), self.fmt.block_size, self.prefix + name
        low, wanted = self.low.get(where), self.precision.precision_of(where)
        weight = self.read(name, parts) if low is None else low_bits.dequantized(self, name, low.fmt, parts)
        scale = self._scale(name, weight) if weight.dtype == FP8 else None
        if scale is None and (wanted != "fp8" or weight.dtype == FP8):
            return narrowed(weight, [part.indices for part in parts]).to(self.device), None
        # Blocks are those of the whole weight, whichever ranks there are.
        sided = list(zip(parts, sides, strict=True))
        cover = [part.cover(side) for part, side in sided]
        codes = narrowed(weight, cover).to(self.device)
        if scale is None:
            codes, scale = self._quantized(codes, where)
        else:
            scale = narrowed(scale, [part.blocks(side) for part, side in sided]).to(self.device)
        inside = [
            range(part.start - around.start, part.stop - around.start)
            for part, around in zip(parts, cover, strict=True)
        ]
        cut_through = any(part.cuts_through(side) for part, side in sided)
        if not cut_through and wanted != "bf16":
            return narrowed(codes, inside), scale
        why = "" if wanted == "bf16" else ", because ranks cut through their blocks,"
        self.store.converted[f"dequantized{why}"] += 1
        return narrowed(ops.dequantize_weight(codes, scale, sides, dtype=self.dtype), inside), None

    def _quantized(self, weight: torch.Tensor, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        self.store.converted["quantized"] += 1
        try:
            return ops.quantize_weight(weight, self.fmt.block_size, self.fmt.scale_fmt)
        except NonFiniteError as error:
            what = f"{error.count} NaN or Inf, which FP8 scales cannot represent"
            raise BlockscaleError(what, where=where, remedy="leave it out of the precision") from error

    def _scale(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        where = self.prefix + name
        found = scale_of(where, self.store.tensors)
        if found is None:
            if self.on_missing_scale == "error":
                remedy = "requantize it, or use --on-missing-scale keep"
                raise MissingScaleError(f"FP8 weight without {scale_name(name)}", where=where, remedy=remedy)
            _logger.warning("%s is FP8 without a scale: its values are taken as they are", where)
            return None
        scale = self.read(found.removeprefix(self.prefix)).float()
        expected = self.fmt.scale_shape(tuple(weight.shape))
        if tuple(scale.shape) != expected:
            block = "x".join(map(str, self.fmt.block_size))
            raise CorruptCheckpointError(
                f"scale does not fit blocks of {block}, which the config names",
                where=found,
                expected=expected,
                got=tuple(scale.shape),
            )
        return scale

    def read(self, name: str, parts: tuple[Part, ...] | None = None) -> torch.Tensor:
        """A tensor on the host, of the sizes of these parts, if they are given.

        Raises:
            CorruptCheckpointError: the checkpoint has no such tensor, or it is not of this shape.
        """
        full = self.prefix + name
        entry = self.store.tensors.get(full)
        remedy = "does the config belong to this checkpoint?"
        if entry is None:
            raise CorruptCheckpointError("tensor is missing", where=full, remedy=remedy)
        shape = entry.shape if parts is None else tuple(part.size for part in parts)
        if entry.shape != shape:
            raise CorruptCheckpointError(
                "shape is not that of the config", where=full, expected=shape, got=entry.shape, remedy=remedy
            )
        self.store.read.add(full)
        return self.store.bytes_of(entry).view(dtype_of(entry)).view(entry.shape)
