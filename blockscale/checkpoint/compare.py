"""Compare a tensor of a converted checkpoint with the one it was made from, in either direction.

What was copied is equal, what was dequantized is bit for bit what the codes and scales say, and FP8 weights
are the source's values rounded to the nearest code. Rounding x to E4M3 codes of scale s is off by at most
half a step,

    |dequantized - x| <= s * max(2**(floor(log2(|x| / s)) - 4), 2**-10)

(three mantissa bits; subnormal steps of 2**-9), up to float32 rounding of the division and the product.
A code that is one too high or low is beyond it.

Weights that a rounder has rounded (`rounded`) may be several steps away from the source in every value, for
what one value loses others make up for. Of them the relative error |dequantized - x| / |x| (Frobenius) is
bounded, in FP8 by 0.4: rounding to the nearest code leaves 0.026 and calibrated rounding 0.03 to 0.1. It may
also make up for inputs that other layers have changed: noise half as large as the inputs costs up to 0.23 in
all. Of fewer bits more is left: up to 0.28 of 4 bits and 0.54 of 3 bits was seen, bounded by 0.6 and 0.8.
Scales that are all off by a factor of two cost 0.5 or 1, another weight's codes 1.4.
What is smaller than that in a single block, `diagnose` finds, and a changed code the checksums.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from blockscale import ops
from blockscale.checkpoint.decide import FP8, scale_of
from blockscale.checkpoint.deviation import Deviation
from blockscale.checkpoint.families import family_of, stored_block_size
from blockscale.checkpoint.group_compare import deviation_in_groups, from_groups
from blockscale.checkpoint.group_storage import LowBitWeight
from blockscale.checkpoint.groups import low_bit_weights
from blockscale.checkpoint.index import CheckpointIndex, TensorEntry, read_index
from blockscale.checkpoint.model_config import read_config
from blockscale.checkpoint.plan import signatures
from blockscale.checkpoint.rounded import calibrated_names
from blockscale.checkpoint.scales import per_expert, read_scale
from blockscale.checkpoint.source import Source, open_source
from blockscale.checkpoint.strips import Reader, chunks, read_codes, strips
from blockscale.errors import BlockscaleError, CorruptCheckpointError
from blockscale.formats import HIGH_PRECISION
from blockscale.quantization_config import Quantization, parse_quantization_config

# Two float32 roundings (division, product), each up to 2**-19 of the half step, on top of it.
_ROUNDING_SLACK = 1 + 2.0**-17
# Relative error of a weight that a rounder has rounded, by its bits; beyond it something is wrong.
_CALIBRATED_BOUND = {8: 0.4, 4: 0.6, 3: 0.8}
_EXPONENT_BITS = 0x7F800000


@dataclass(frozen=True)
class TensorError:
    """Error of one FP8 weight: relative (Frobenius), and the largest single one over half a step."""

    name: str
    relative: float
    worst_over_bound: float


@dataclass(frozen=True)
class Side:
    """One checkpoint of a comparison: where it is, what it holds, and how its FP8 weights are stored.

    Those that are `calibrated` were rounded by a rounder, not to the nearest code; those that are `low` have
    fewer than 8 bits, and are found by the names of their codes.
    """

    source: Source
    index: CheckpointIndex
    config: dict[str, Any]
    quantization: Quantization | None
    calibrated: frozenset[str] = frozenset()
    low: Mapping[str, LowBitWeight] = field(default_factory=dict)

    def weight(self, name: str) -> str:
        """The weight that a tensor holds, or has the codes of."""
        return self.low[name].name if name in self.low else name

    @functools.cached_property
    def holders(self) -> dict[str, TensorEntry]:
        """Weight -> the tensor that holds it, or its codes; without scales and the like."""
        return {
            self.weight(name): entry for name, entry in self.index.tensors.items() if not self.is_scale(name)
        }

    def is_scale(self, name: str) -> bool:
        """Whether a tensor is a scale, or something else that is stored beside codes."""
        return name in self._companions

    @functools.cached_property
    def _companions(self) -> frozenset[str]:
        tensors = self.index.tensors
        fp8 = (scale_of(name, tensors) for name, entry in tensors.items() if entry.dtype == FP8)
        low = (name for each in self.low.values() for name in each.companions)
        return frozenset(name for name in (*fp8, *low) if name is not None)

    def scale(self, entry: TensorEntry) -> torch.Tensor:
        name = scale_of(entry.name, self.index.tensors)
        if name is None:
            raise CorruptCheckpointError("FP8 weight without a scale", where=entry.name)
        return read_scale(self.index.tensors[name], self.source)

    def stored_block(self, entry: TensorEntry) -> tuple[int, int]:
        if self.quantization is None:
            raise BlockscaleError("cannot be compared", where=entry.name, expected="block FP8 in config.json")
        return stored_block_size(
            self.quantization.block_size_of(entry.name), entry.shape, family_of(self.config)
        )


def open_side(spec: str | os.PathLike[str]) -> Side:
    """Open a checkpoint, also one whose config.json is wrong: then its FP8 weights cannot be compared."""
    source = open_source(spec)
    config = read_config(source)
    try:
        quantization = parse_quantization_config(config)
    except BlockscaleError:
        quantization = None
    index = read_index(source)
    low = low_bit_weights(signatures(index), quantization)
    return Side(source, index, config, quantization, calibrated_names(source), low)


def compare(
    entry: TensorEntry, reader: Reader, side: Side, twin: TensorEntry, twin_reader: Reader, other: Side
) -> tuple[str | None, TensorError | None]:
    """Compare a tensor with its twin in the source; returns (what is wrong, error of an FP8 weight)."""
    shapes = [
        owner.low[each.name].storage.shape(each.shape) if each.name in owner.low else each.shape
        for owner, each in ((side, entry), (other, twin))
    ]
    if shapes[0] != shapes[1]:
        return f"shape differs from the source: expected {list(shapes[1])}, got {list(shapes[0])}", None
    if entry.dtype == twin.dtype and entry.name == twin.name:
        pairs = zip(chunks(entry, reader), chunks(twin, twin_reader), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            return f"differs from the source ({entry.dtype} in both)", None
        return None, None
    if entry.dtype == FP8 and twin.dtype in HIGH_PRECISION:
        return _compare_quantized(entry, reader, side, twin, twin_reader)
    if entry.name in side.low and twin.dtype in HIGH_PRECISION:
        found = deviation_in_groups(entry, reader, side, twin, twin_reader, side.low[entry.name])
        return _judge(entry, side, found)
    if entry.dtype in HIGH_PRECISION and twin.name in other.low:
        return from_groups(entry, reader, twin, twin_reader, other, other.low[twin.name]), None
    if entry.dtype in HIGH_PRECISION and twin.dtype == FP8:
        return _compare_dequantized(entry, reader, twin, twin_reader, other), None
    return f"dtype is {entry.dtype}, which no conversion makes of {twin.dtype}", None


def _compare_quantized(
    entry: TensorEntry, reader: Reader, side: Side, twin: TensorEntry, twin_reader: Reader
) -> tuple[str | None, TensorError | None]:
    scale, block = side.scale(entry), side.stored_block(entry)
    grid, found = per_expert(scale), Deviation()
    for span, strip in strips(twin, twin_reader, block[0]):
        expert, row = span.expert, span.row
        rows, columns = strip.shape
        if not strip.numel():
            continue
        start = entry.start + (expert * entry.shape[-2] + row) * columns
        codes = read_codes(reader, start, rows, columns)
        part = grid[expert, row // block[0] : math.ceil((row + rows) / block[0])]
        exact = strip.float()
        error = ops.dequantize_weight(codes, part, block, torch.float32, threads=1).sub_(exact).abs_()
        scales = part.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        binade = (exact.abs() / scales).view(torch.int32).bitwise_and_(_EXPONENT_BITS).view(torch.float32)
        found.add(error, exact, binade.mul_(2.0**-4).clamp_min_(2.0**-10).mul_(scales), (expert, row))
    return _judge(entry, side, found)


def _judge(entry: TensorEntry, side: Side, found: Deviation) -> tuple[str | None, TensorError | None]:
    message, relative, worst = None, found.relative, found.worst
    name = side.weight(entry.name)
    if name in side.calibrated:
        bits = side.low[entry.name].fmt.bits if entry.name in side.low else 8
        bound = _CALIBRATED_BOUND[bits]
        if not relative <= bound:
            limit = f"a calibrated weight of {bits} bits has at most {bound:.0%}"
            message = f"is not the source: relative error {relative:.1%}, {limit}"
    elif not worst <= _ROUNDING_SLACK:
        place = list(found.at[-len(entry.shape) :])
        message = f"is not the source rounded to its codes: error at {place} is {worst:.4g} times half a step"
    return message, TensorError(name, relative, worst) if math.isfinite(relative + worst) else None


def _compare_dequantized(
    entry: TensorEntry, reader: Reader, twin: TensorEntry, twin_reader: Reader, other: Side
) -> str | None:
    scale, block = other.scale(twin), other.stored_block(twin)
    grid = per_expert(scale)
    for span, strip in strips(entry, reader, block[0]):
        expert, row = span.expert, span.row
        rows, columns = strip.shape
        codes = read_codes(twin_reader, twin.start + (expert * twin.shape[-2] + row) * columns, rows, columns)
        part = grid[expert, row // block[0] : math.ceil((row + rows) / block[0])]
        expected = ops.dequantize_weight(codes, part, block, strip.dtype, threads=1)
        if not torch.equal(expected.view(torch.uint8), strip.contiguous().view(torch.uint8)):
            at = int((expected.view(torch.uint8) != strip.view(torch.uint8)).flatten().byte().argmax())
            where = [row + at // (columns * strip.itemsize), at // strip.itemsize % columns]
            return f"is not the dequantized source: first difference at {where}"
    return None
