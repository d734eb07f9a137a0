"""Compare a weight of fewer than 8 bits with the one it was made from; see `compare.py`.

Rounding to the nearest code is off by at most half a step of the codes at |x| / scale, times the scale, up to
float32 rounding of the division and the product.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from blockscale import ops
from blockscale.checkpoint.deviation import Deviation
from blockscale.checkpoint.group_storage import LowBitWeight, check_companions
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.scales import per_expert, read_scale
from blockscale.checkpoint.strips import Reader, Span, dtype_of, read_into, strips
from blockscale.group_formats import MXFP4
from blockscale.group_spelling import WrittenFormat

if TYPE_CHECKING:
    from blockscale.checkpoint.compare import Side


def deviation_in_groups(
    entry: TensorEntry, reader: Reader, side: Side, twin: TensorEntry, twin_reader: Reader, low: LowBitWeight
) -> Deviation:
    """How far a quantized weight, of which `entry` has the codes, is from its twin in high precision."""
    grid, found, fmt = _grid(low, side), Deviation(), low.fmt
    for span, strip in strips(twin, twin_reader):
        scale = grid[span.expert, span.row : span.row + span.rows]
        exact = strip.float()
        codes = _codes(entry, reader, span, low, exact.shape[1])
        values = ops.dequantize_group(codes, scale, fmt, exact.shape[1], torch.float32, threads=1)
        step = scale.float().repeat_interleave(fmt.group_size, 1)[:, : exact.shape[1]]
        found.add(
            (values - exact).abs_(), exact, _half_step(exact, step, fmt) * step, (span.expert, span.row)
        )
    return found


def from_groups(
    entry: TensorEntry,
    reader: Reader,
    twin: TensorEntry,
    twin_reader: Reader,
    other: Side,
    low: LowBitWeight,
) -> str | None:
    """What is wrong with a dequantized weight, of which `twin` has the codes."""
    grid = _grid(low, other)
    for span, strip in strips(entry, reader):
        codes = _codes(twin, twin_reader, span, low, strip.shape[1])
        scale = grid[span.expert, span.row : span.row + span.rows]
        expected = ops.dequantize_group(codes, scale, low.fmt, strip.shape[1], strip.dtype, threads=1)
        if not torch.equal(expected.view(torch.uint8), strip.contiguous().view(torch.uint8)):
            row, column = (expected.view(torch.uint8) != strip.view(torch.uint8)).nonzero()[0].tolist()
            place = [span.row + row, column // strip.itemsize]
            return f"is not the dequantized source: first difference at {place}"
    return None


def _half_step(exact: torch.Tensor, step: torch.Tensor, fmt: WrittenFormat) -> torch.Tensor | float:
    if not isinstance(fmt, MXFP4):
        return 0.5
    size = exact.abs() / step  # 0, 0.5, 1, 1.5, 2, 3, 4, 6
    return 0.25 + 0.25 * (size > 2) + 0.5 * (size > 4)


def _grid(low: LowBitWeight, side: Side) -> torch.Tensor:
    names = (low.codes, low.scale)
    both = {name: side.index.tensors[name] for name in names if name in side.index.tensors}
    check_companions(low, {name: (each.dtype, each.shape) for name, each in both.items()})
    scale = read_scale(both[low.scale], side.source, low.storage)
    return per_expert(scale).to(low.fmt.scale_dtype)


def _codes(entry: TensorEntry, reader: Reader, span: Span, low: LowBitWeight, width: int) -> torch.Tensor:
    """Our packed codes of the rows of a span of the weight, whatever the layout."""
    row_bytes = entry.nbytes // math.prod(entry.shape[:-1])
    stored = torch.empty(span.rows, entry.shape[-1], dtype=dtype_of(entry))
    read_into(reader, stored, entry.start + (span.expert * entry.shape[-2] + span.row) * row_bytes)
    return low.storage.packed(stored, width)
