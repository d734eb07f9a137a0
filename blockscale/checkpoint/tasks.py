"""The work on one tensor: read a strip of rows, quantize, dequantize, cut or copy it, hash it, write it.

Strips bound the memory of a worker to a few times `CHUNK_BYTES` (with a GPU, to what `lanes` says), whatever
the size of the tensor. They are whole blocks high, so every block lies in one strip and the result does not
depend on the strip height.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from blockscale import ops
from blockscale.checkpoint.group_storage import amax_of, companion
from blockscale.checkpoint.group_tasks import (
    dequantized_from_groups,
    quantized_in_groups,
    quantized_in_groups_there,
)
from blockscale.checkpoint.lanes import STRIP_VALUES, Lanes, Part, Tensors, Work, through
from blockscale.checkpoint.plan import Task
from blockscale.checkpoint.rounded import Rounded
from blockscale.checkpoint.scales import per_expert, read_scale
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.strips import (
    CHUNK_BYTES,
    Reader,
    Span,
    chunks,
    cut,
    dtype_of,
    nonfinite_of,
    open_reader,
    read_codes,
    read_into,
    rows_of,
    spans,
    strips,
    tensor_bytes,
)
from blockscale.checkpoint.writer import ShardFile, write_at
from blockscale.errors import BlockscaleError, CorruptCheckpointError, NonFiniteError
from blockscale.formats import E4M3_MAX, SAFETENSORS_DTYPES, ScaleFmt

Strips = Iterator[tuple[Span, torch.Tensor]]
# What a kernel says about the values of a strip comes back in front of the result.
_FLAG: Part = ((1,), torch.int32)


@dataclass(frozen=True)
class Job:
    """What the tasks of a conversion have in common.

    Attributes:
        source: where scales of other shards are read.
        scale_fmt: format of the scales that quantizing writes.
        on_nonfinite: what NaN codes in a weight to be dequantized do (quantizing always refuses).
        device: where the arithmetic runs: "cpu" or "cuda".
        rounded: weights that are rounded already; their codes and scales are taken over.
        lanes: to that device and back; None to compute in place. The engine opens them.
        tick: called with the bytes read after each strip; may raise to stop the run.
    """

    source: Source
    scale_fmt: ScaleFmt = "float32"
    on_nonfinite: Literal["error", "keep"] = "error"
    device: str = "cpu"
    rounded: Rounded | None = None
    lanes: Lanes | None = None
    tick: Callable[[int], None] = lambda _: None


def run_task(task: Task, reader: Reader, shard: ShardFile, job: Job) -> dict[str, str]:
    """Do one task; returns output tensor name -> SHA-256 of its bytes."""
    run = {"copy": _copy, "dequantize": _dequantize}.get(task.action, _quantize)
    return run(task, reader, shard, job)


def _quantize(task: Task, reader: Reader, shard: ShardFile, job: Job) -> dict[str, str]:
    codes_out, scale_out = task.outputs[:2]
    digest, height, rows = hashlib.sha256(), codes_out.shape[-2], math.prod(codes_out.shape[:-1])
    columns = task.source.shape[-1]
    made = SAFETENSORS_DTYPES[scale_out.dtype] if task.group is None else task.group.scale_dtype
    scale = torch.empty(scale_out.shape, dtype=made)
    quantized = _quantized if job.lanes is None else _quantized_there
    if task.action == "requantize":
        quantized = _requantized
    elif job.rounded is not None and task.source.name in job.rounded.weights:
        quantized = _taken_over
    elif task.group is not None:
        quantized = quantized_in_groups if job.lanes is None else quantized_in_groups_there
    for span, codes in quantized(task, reader, per_expert(scale), job):
        data = tensor_bytes(codes if task.low is None else task.low.storage.stored(codes, columns))
        digest.update(data)
        write_at(shard, codes_out.name, (span.expert * height + span.row) * codes_out.nbytes // rows, data)
        job.tick(span.rows * task.input_bytes // rows)
    hashes = {codes_out.name: digest.hexdigest()}
    whole = {scale_out.name: scale if task.low is None else task.low.storage.stored_scale(scale)}
    for output in task.outputs[2:]:
        whole[output.name] = companion(output.name, task.source.shape, input_amax(task, job))
    for name, tensor in whole.items():
        write_at(shard, name, 0, tensor_bytes(tensor))
        hashes[name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
    return hashes


def input_amax(task: Task, job: Job) -> float | None:
    """The largest absolute input of the weight of a task, if a rounder tells."""
    return None if job.rounded is None else amax_of(task.source.name, job.rounded.input_amax)


def _quantized(task: Task, reader: Reader, grid: torch.Tensor, job: Job) -> Strips:
    """Codes, strip by strip; fills the scales, `grid` (experts, rows, columns)."""
    for span, strip, codes in _buffered(task, reader, torch.float8_e4m3fn):
        scale = grid[span.expert, _grid_rows(span, task)]
        try:
            ops.quantize_weight(strip, task.block_size, job.scale_fmt, out=(codes, scale), threads=1)
        except NonFiniteError as error:
            raise nonfinite_of(task.source, reader) or error from None
        yield span, codes


def _taken_over(task: Task, reader: Reader, grid: torch.Tensor, job: Job) -> Strips:
    """As `_quantized`, of a weight that is rounded already: the source is not read."""
    assert job.rounded is not None
    weight = job.rounded.weights[task.source.name]
    grid.copy_(per_expert(read_scale(weight.scale, job.rounded.folder)))
    with open_reader(job.rounded.path(weight.codes)) as own:
        for span, codes in strips(weight.codes, own):
            if task.group is None and ops.find_nonfinite(codes)[0]:
                raise job.rounded.refusal("rounded weight has NaN codes", weight.codes)
            yield span, codes


def _requantized(task: Task, reader: Reader, grid: torch.Tensor, job: Job) -> Strips:
    """As `_quantized`, of a window of an FP8 weight: dequantized in float32, then on a grid of its own."""
    assert task.scale is not None
    assert task.window is not None
    stored, block_size = read_scale(task.scale, job.source), task.block_size
    rows, columns, width = task.window.rows, task.window.columns, task.source.shape[1]
    for span in spans(rows_of(task.source, rows), block_size[0], CHUNK_BYTES // 4):
        # From the edge of a stored block on, which may be above the strip.
        first = rows.start + span.row
        above = first % block_size[0]
        codes = read_codes(reader, span.start - above * width, above + span.rows, width)
        part = stored[first // block_size[0] : math.ceil((first + span.rows) / block_size[0])]
        weight = ops.dequantize_weight(codes, part, block_size, torch.float32, threads=1)[above:]
        weight = weight if columns is None else weight[:, columns.start : columns.stop]
        scale, codes = grid[0, _grid_rows(span, task)], torch.empty(weight.shape, dtype=codes.dtype)
        try:
            ops.quantize_weight(weight, block_size, job.scale_fmt, out=(codes, scale), threads=1)
        except NonFiniteError as error:
            found = nonfinite_of(task.source, reader) or error
            raise CorruptCheckpointError(
                f"{found.count} NaN or Inf, the first at {list(found.position)}: cannot be requantized",
                where=f"{task.source.name} in {task.source.file}",
            ) from None
        yield span, codes


def _quantized_there(task: Task, reader: Reader, grid: torch.Tensor, job: Job) -> Strips:
    """As `_quantized`, on the device of the lanes."""
    assert job.lanes is not None
    columns, block_size = task.source.shape[-1], task.block_size

    def parts(span: Span) -> tuple[list[Part], list[Part]]:
        shape, scales = (span.rows, columns), tuple(grid[span.expert, _grid_rows(span, task)].shape)
        back = [_FLAG, (scales, torch.float32), (shape, torch.float8_e4m3fn)]
        return [(shape, dtype_of(task.source))], back

    def load(span: Span, inputs: Tensors) -> None:
        read_into(reader, inputs[0], span.start)

    def compute(inputs: Tensors, outputs: Tensors) -> None:
        flag, scale, codes = outputs
        ops.quantize_weight(inputs[0], block_size, job.scale_fmt, out=(codes, scale), flag=flag)

    places = spans(task.source, block_size[0], STRIP_VALUES)
    for span, _, (flag, scale, codes) in through(job.lanes, places, Work(parts, load, compute)):
        if flag:
            raise nonfinite_of(task.source, reader) or AssertionError("the scan found none")
        grid[span.expert, _grid_rows(span, task)] = scale
        yield span, codes


def _dequantize(task: Task, reader: Reader, shard: ShardFile, job: Job) -> dict[str, str]:
    assert task.scale is not None
    (output,) = task.outputs
    dtype = SAFETENSORS_DTYPES[output.dtype]
    assert dtype is not None
    storage = None if task.low is None else task.low.storage
    grid = per_expert(read_scale(task.scale, job.source, storage))
    digest, (rows, columns) = hashlib.sha256(), output.shape[-2:]
    dequantized = _dequantized if job.lanes is None else _dequantized_there
    if task.group is not None:
        dequantized = dequantized_from_groups
    for span, weight in dequantized(task, reader, grid, job, dtype):
        data = tensor_bytes(weight)
        digest.update(data)
        write_at(shard, output.name, (span.expert * rows + span.row) * columns * dtype.itemsize, data)
        job.tick(span.rows * task.source.shape[-1])
    return {output.name: digest.hexdigest()}


def _dequantized(task: Task, reader: Reader, grid: torch.Tensor, job: Job, dtype: torch.dtype) -> Strips:
    """Weights, strip by strip."""
    refuse_nonfinite = job.on_nonfinite == "error"
    may_overflow = bool((grid * E4M3_MAX > torch.finfo(dtype).max).any())
    for span, codes, weight in _buffered(task, reader, dtype):
        if refuse_nonfinite and ops.find_nonfinite(codes)[0]:
            raise _nonfinite_result(task, reader, codes)
        scale = grid[span.expert, _grid_rows(span, task)]
        ops.dequantize_weight(codes, scale, task.block_size, dtype, out=weight, threads=1)
        if refuse_nonfinite and may_overflow and ops.find_nonfinite(weight)[0]:
            raise _nonfinite_result(task, reader, codes)
        yield span, weight


def _dequantized_there(
    task: Task, reader: Reader, grid: torch.Tensor, job: Job, dtype: torch.dtype
) -> Strips:
    """As `_dequantized`, on the device of the lanes."""
    assert job.lanes is not None
    columns, block_size = task.source.shape[-1], task.block_size

    def parts(span: Span) -> tuple[list[Part], list[Part]]:
        shape, scales = (span.rows, columns), tuple(grid[span.expert, _grid_rows(span, task)].shape)
        return [(shape, torch.float8_e4m3fn), (scales, torch.float32)], [_FLAG, (shape, dtype)]

    def load(span: Span, inputs: Tensors) -> None:
        codes, scale = inputs
        read_into(reader, codes, span.start)
        scale.copy_(grid[span.expert, _grid_rows(span, task)])

    def compute(inputs: Tensors, outputs: Tensors) -> None:
        (codes, scale), (flag, weight) = inputs, outputs
        ops.dequantize_weight(codes, scale, block_size, dtype, out=weight)
        ops.flag_nonfinite(weight, flag)

    places = spans(task.source, block_size[0], STRIP_VALUES)
    for span, (codes, _), (flag, weight) in through(job.lanes, places, Work(parts, load, compute)):
        if flag and job.on_nonfinite == "error":
            raise _nonfinite_result(task, reader, codes)
        yield span, weight


def _nonfinite_result(task: Task, reader: Reader, codes: torch.Tensor) -> BlockscaleError:
    """Why a strip does not dequantize to finite values: a NaN code or, scales being finite, the dtype."""
    error = nonfinite_of(task.source, reader) if ops.find_nonfinite(codes)[0] else None
    if error is not None:
        return error
    (output,) = task.outputs
    return CorruptCheckpointError(
        f"dequantized values are beyond the largest of {output.dtype}",
        where=f"{output.name} in {task.source.file}",
        remedy="choose a dtype of more range, or let them become Inf: --on-nonfinite keep",
    )


def _buffered(
    task: Task, reader: Reader, dtype: torch.dtype
) -> Iterator[tuple[Span, torch.Tensor, torch.Tensor]]:
    """Strips of the source, each with room for its result of this dtype, which the next step writes over."""
    buffer: torch.Tensor | None = None
    for span, strip in strips(task.source, reader, task.block_size[0]):
        # The first strip is the highest. One buffer for all keeps the heap from growing with the model.
        buffer = torch.empty(strip.shape, dtype=dtype) if buffer is None else buffer
        yield span, strip, buffer[: span.rows]


def _grid_rows(span: Span, task: Task) -> slice:
    """The rows of the scale grid that belong to a strip."""
    block_n = task.block_size[0]
    return slice(span.row // block_n, math.ceil((span.row + span.rows) / block_n))


def _copy(task: Task, reader: Reader, shard: ShardFile, job: Job) -> dict[str, str]:
    (output,), digest, offset = task.outputs, hashlib.sha256(), 0
    window = task.window
    parts = cut(task.source, reader, window.rows, window.columns) if window else chunks(task.source, reader)
    for part in parts:
        data = tensor_bytes(part)
        digest.update(data)
        write_at(shard, output.name, offset, data)
        offset += part.nbytes
        job.tick(part.nbytes)
    return {output.name: digest.hexdigest()}
