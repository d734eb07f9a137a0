"""Compare a weight of fewer than 8 bits with the one it was made from; see `compare.py`.

Rounding to the nearest code is off by at most half a step of the codes at |x| / scale, times the scale, up to
float32 rounding of the division and the product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blockscale import ops
from blockscale.checkpoint.deviation import Deviation
from blockscale.checkpoint.groups import check_group_scale, group_scale_name
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.scales import per_expert, read_scale
from blockscale.checkpoint.strips import Reader, Span, read_into, strips
from blockscale.formats import SAFETENSORS_DTYPES
from blockscale.group_formats import MXFP4
from blockscale.group_spelling import WrittenFormat

if TYPE_CHECKING:
    from blockscale.checkpoint.compare import Side


def deviation_in_groups(
    entry: TensorEntry, reader: Reader, side: Side, twin: TensorEntry, twin_reader: Reader, fmt: WrittenFormat
) -> Deviation:
    """How far a quantized weight is from its twin in high precision."""
    grid, found = _grid(entry, side, fmt), Deviation()
    for span, strip in strips(twin, twin_reader):
        scale = grid[span.expert, span.row : span.row + span.rows]
        exact = strip.float()
        codes = _codes(entry, reader, span)
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
    fmt: WrittenFormat,
) -> str | None:
    """What is wrong with a dequantized weight, of which `twin` has the codes."""
    grid = _grid(twin, other, fmt)
    for span, strip in strips(entry, reader):
        codes = _codes(twin, twin_reader, span)
        scale = grid[span.expert, span.row : span.row + span.rows]
        expected = ops.dequantize_group(codes, scale, fmt, strip.shape[1], strip.dtype, threads=1)
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


def _grid(entry: TensorEntry, side: Side, fmt: WrittenFormat) -> torch.Tensor:
    names = (entry.name, group_scale_name(entry.name))
    both = {name: side.index.tensors[name] for name in names if name in side.index.tensors}
    check_group_scale(entry.name, fmt, {name: (each.dtype, each.shape) for name, each in both.items()})
    scale = both[names[1]]
    return per_expert(read_scale(scale, side.source)).to(SAFETENSORS_DTYPES[scale.dtype])


def _codes(entry: TensorEntry, reader: Reader, span: Span) -> torch.Tensor:
    codes = torch.empty(span.rows, entry.shape[-1], dtype=torch.uint8)
    read_into(reader, codes, entry.start + (span.expert * entry.shape[-2] + span.row) * entry.shape[-1])
    return codes
