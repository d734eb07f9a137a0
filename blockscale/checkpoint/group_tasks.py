"""Strips of weights in formats of fewer than 8 bits: quantized and dequantized, here or on a GPU.

As their namesakes in `tasks.py`, for `Task.group`. Groups lie within rows, so a strip has any number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from blockscale import ops
from blockscale.checkpoint.lanes import STRIP_VALUES, Part, Tensors, Work, through
from blockscale.checkpoint.plan import Task
from blockscale.checkpoint.strips import Reader, Span, dtype_of, nonfinite_of, read_into, spans, strips
from blockscale.errors import NonFiniteError
from blockscale.group_formats import packed_width

if TYPE_CHECKING:
    from blockscale.checkpoint.tasks import Job

_FLAG: Part = ((1,), torch.int32)
_Strips = Iterator[tuple[Span, torch.Tensor]]


def quantized_in_groups(task: Task, reader: Reader, grid: torch.Tensor, job: Job) -> _Strips:
    """Packed codes, uint8 (rows, bytes), strip by strip; fills the scales, `grid` (experts, rows, groups)."""
    assert task.group is not None
    for span, strip in strips(task.source, reader):
        codes = torch.empty(span.rows, packed_width(strip.shape[-1], task.group.bits), dtype=torch.uint8)
        scale = grid[span.expert, span.row : span.row + span.rows]
        try:
            ops.quantize_group(strip, task.group, out=(codes, scale), threads=1)
        except NonFiniteError as error:
            raise nonfinite_of(task.source, reader) or error from None
        yield span, codes


def quantized_in_groups_there(task: Task, reader: Reader, grid: torch.Tensor, job: Job) -> _Strips:
    """The same on the device of the lanes."""
    assert job.lanes is not None
    assert task.group is not None
    group, columns = task.group, task.source.shape[-1]

    def parts(span: Span) -> tuple[list[Part], list[Part]]:
        scales = ((span.rows, grid.shape[-1]), grid.dtype)
        codes = ((span.rows, packed_width(columns, group.bits)), torch.uint8)
        return [((span.rows, columns), dtype_of(task.source))], [_FLAG, scales, codes]

    def load(span: Span, inputs: Tensors) -> None:
        read_into(reader, inputs[0], span.start)

    def compute(inputs: Tensors, outputs: Tensors) -> None:
        flag, scale, codes = outputs
        ops.quantize_group(inputs[0], group, out=(codes, scale), flag=flag)

    places = spans(task.source, 1, STRIP_VALUES)
    for span, _, (flag, scale, codes) in through(job.lanes, places, Work(parts, load, compute)):
        if flag:
            raise nonfinite_of(task.source, reader) or AssertionError("the scan found none")
        grid[span.expert, span.row : span.row + span.rows] = scale
        yield span, codes


def dequantized_from_groups(
    task: Task, reader: Reader, grid: torch.Tensor, job: Job, dtype: torch.dtype
) -> _Strips:
    """Weights (rows, K), strip by strip; finite scales and codes make no other values."""
    assert task.low is not None
    fmt, width = task.low.fmt, task.outputs[0].shape[-1]
    for span, stored in strips(task.source, reader):
        scale = grid[span.expert, span.row : span.row + span.rows].to(fmt.scale_dtype)
        codes = task.low.storage.packed(stored, width)
        yield span, ops.dequantize_group(codes, scale, fmt, width, dtype, threads=1)
