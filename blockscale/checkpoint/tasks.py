"""The work on one tensor: read a strip of rows, quantize, dequantize or copy it, hash it, write it.

Strips bound the memory of a worker to a few times `CHUNK_BYTES`, whatever the size of the tensor. They are
whole blocks high, so every block lies in one strip and the result does not depend on the strip height.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from blockscale import ops
from blockscale.checkpoint.decide import SCALE_DTYPES
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.plan import Task
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.writer import ShardFile, drop_cached, write_at
from blockscale.errors import CorruptCheckpointError, NonFiniteError
from blockscale.formats import E4M3_MAX, SAFETENSORS_DTYPES, ScaleFmt

CHUNK_BYTES = 2 << 20
# The kernel's own read-ahead (128 KiB) leaves the disk idle while a strip is computed.
_AHEAD_BYTES = 8 << 20


@dataclass(frozen=True)
class Job:
    """What the tasks of a conversion have in common.

    Attributes:
        source: where scales of other shards are read.
        scale_fmt: format of the scales that quantizing writes.
        on_nonfinite: what NaN codes in a weight to be dequantized do (quantizing always refuses).
        device: "cpu", or "cuda" to quantize there.
        tick: called with the bytes read after each strip; may raise to stop the run.
    """

    source: Source
    scale_fmt: ScaleFmt = "float32"
    on_nonfinite: Literal["error", "keep"] = "error"
    device: str = "cpu"
    tick: Callable[[int], None] = lambda _: None


@dataclass(frozen=True)
class Reader:
    """An open source file."""

    fd: int
    path: Path


@contextmanager
def open_reader(path: Path) -> Iterator[Reader]:
    """Open a source file for reading from several threads."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Reader(fd, path)
    finally:
        os.close(fd)


def run_task(task: Task, reader: Reader, shard: ShardFile, job: Job) -> dict[str, str]:
    """Do one task; returns output tensor name -> SHA-256 of its bytes."""
    run = {"copy": _copy, "quantize": _quantize, "dequantize": _dequantize}[task.action]
    return run(task, reader, shard, job)


def read_codes(reader: Reader, start: int, rows: int, columns: int) -> torch.Tensor:
    """Read (rows, columns) E4M3 codes from an absolute offset."""
    buffer = torch.empty(rows * columns, dtype=torch.uint8)
    _read_into(reader, buffer, start)
    return buffer.view(torch.float8_e4m3fn).view(rows, columns)


def chunks(entry: TensorEntry, reader: Reader) -> Iterator[torch.Tensor]:
    """Read a tensor's bytes as uint8 pieces of at most `CHUNK_BYTES`, views of one reused buffer."""
    buffer = torch.empty(min(CHUNK_BYTES, entry.nbytes), dtype=torch.uint8)
    for offset in range(0, entry.nbytes, CHUNK_BYTES):
        part = buffer[: min(CHUNK_BYTES, entry.nbytes - offset)]
        _read_into(reader, part, entry.start + offset)
        yield part


def strips(
    entry: TensorEntry, reader: Reader, rows_per_block: int = 1
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Read a (N, K) or (E, N, K) tensor as (expert, first row, (rows, K) strip).

    Strips are whole blocks high. Each is a view of one buffer that the next step overwrites.
    """
    experts = math.prod(entry.shape[:-2])
    rows, columns = entry.shape[-2:]
    dtype = SAFETENSORS_DTYPES[entry.dtype]
    assert dtype is not None
    row_bytes = columns * dtype.itemsize
    height = max(1, CHUNK_BYTES // max(1, row_bytes * rows_per_block)) * rows_per_block
    buffer = torch.empty(min(height, rows) * row_bytes, dtype=torch.uint8)
    for expert in range(experts):
        for row in range(0, rows, height):
            count = min(height, rows - row)
            part = buffer[: count * row_bytes]
            _read_into(reader, part, entry.start + (expert * rows + row) * row_bytes)
            yield expert, row, part.view(dtype).view(count, columns)


def nonfinite_of(entry: TensorEntry, reader: Reader) -> NonFiniteError | None:
    """Scan a whole weight for NaN and Inf."""
    total, first = 0, None
    for expert, row, strip in strips(entry, reader):
        count, index = ops.find_nonfinite(strip)
        if count and first is None:
            row, column = row + index // strip.shape[1], index % strip.shape[1]
            first = (row, column) if len(entry.shape) == 2 else (expert, row, column)
        total += count
    return NonFiniteError(total, first, where=f"{entry.name} in {entry.file}") if first is not None else None


def _quantize(task: Task, reader: Reader, shard: ShardFile, job: Job) -> dict[str, str]:
    codes_out, scale_out = task.outputs
    digest, (block_n, _) = hashlib.sha256(), task.block_size
    rows, columns = task.source.shape[-2:]
    scale = torch.empty(scale_out.shape, dtype=torch.float32)
    grid = per_expert(scale)
    buffer: torch.Tensor | None = None
    for expert, row, strip in strips(task.source, reader, block_n):
        scale_rows = grid[expert, row // block_n : math.ceil((row + strip.shape[0]) / block_n)]
        # The first strip is the highest. One buffer for all keeps the heap from growing with the model.
        buffer = torch.empty(strip.shape, dtype=torch.float8_e4m3fn) if buffer is None else buffer
        try:
            codes = _quantize_strip(strip, buffer[: strip.shape[0]], scale_rows, task.block_size, job)
        except NonFiniteError as error:
            raise nonfinite_of(task.source, reader) or error from None
        data = tensor_bytes(codes)
        digest.update(data)
        write_at(shard, codes_out.name, (expert * rows + row) * columns, data)
        job.tick(strip.nbytes)
    write_at(shard, scale_out.name, 0, tensor_bytes(scale))
    return {
        codes_out.name: digest.hexdigest(),
        scale_out.name: hashlib.sha256(tensor_bytes(scale)).hexdigest(),
    }


def _quantize_strip(
    strip: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], job: Job
) -> torch.Tensor:
    if job.device == "cpu":
        return ops.quantize_weight(strip, block_size, job.scale_fmt, out=(codes, scale), threads=1)[0]
    moved, found = ops.quantize_weight(strip.to(job.device), block_size, job.scale_fmt)
    scale.copy_(found)
    return codes.copy_(moved)


def _dequantize(task: Task, reader: Reader, shard: ShardFile, job: Job) -> dict[str, str]:
    assert task.scale is not None
    (output,) = task.outputs
    dtype = SAFETENSORS_DTYPES[output.dtype]
    assert dtype is not None
    scale = read_scale(task.scale, job.source)
    grid = per_expert(scale)
    refuse_nonfinite = job.on_nonfinite == "error"
    may_overflow = bool((scale * E4M3_MAX > torch.finfo(dtype).max).any())
    digest, (block_n, _) = hashlib.sha256(), task.block_size
    rows, columns = task.source.shape[-2:]
    buffer: torch.Tensor | None = None
    for expert, row, strip in strips(task.source, reader, block_n):
        if refuse_nonfinite and ops.find_nonfinite(strip)[0]:
            raise nonfinite_of(task.source, reader) or AssertionError("the scan found none")
        scale_rows = grid[expert, row // block_n : math.ceil((row + strip.shape[0]) / block_n)]
        buffer = torch.empty(strip.shape, dtype=dtype) if buffer is None else buffer
        weight = buffer[: strip.shape[0]]
        if job.device == "cpu":
            ops.dequantize_weight(strip, scale_rows, task.block_size, dtype, out=weight, threads=1)
        else:
            moved = strip.to(job.device), scale_rows.to(job.device)
            weight.copy_(ops.dequantize_weight(*moved, task.block_size, dtype))
        if refuse_nonfinite and may_overflow and ops.find_nonfinite(weight)[0]:
            raise CorruptCheckpointError(
                f"dequantized values are beyond the largest of {output.dtype}",
                where=f"{output.name} in {task.source.file}",
                remedy="choose a dtype of more range, or let them become Inf: --on-nonfinite keep",
            )
        data = tensor_bytes(weight)
        digest.update(data)
        write_at(shard, output.name, (expert * rows + row) * columns * dtype.itemsize, data)
        job.tick(strip.nbytes)
    return {output.name: digest.hexdigest()}


def read_scale(entry: TensorEntry, source: Source) -> torch.Tensor:
    """Read a scale from whatever shard holds it, as float32.

    Raises:
        CorruptCheckpointError: a wrong dtype, or a scale that is not a positive finite number.
    """
    dtype = SAFETENSORS_DTYPES[entry.dtype] if entry.dtype in SCALE_DTYPES else None
    if dtype is None:
        raise CorruptCheckpointError(
            "scale has a wrong dtype", where=entry.name, expected=" | ".join(SCALE_DTYPES), got=entry.dtype
        )
    raw = bytearray(source.read(entry.file, entry.start, entry.nbytes))
    if len(raw) != entry.nbytes:
        raise CorruptCheckpointError(
            "file became shorter while it was read", where=entry.file, remedy="fetch the file again"
        )
    scale = (
        (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype))
        .reshape(entry.shape)
        .float()
    )
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bad.any():
        position = bad.nonzero()[0].tolist()
        raise CorruptCheckpointError(
            f"{int(bad.sum())} scales are not positive finite numbers",
            where=f"{entry.name} in {entry.file}",
            got=f"{scale[tuple(position)].item()} at {position}",
        )
    return scale


def per_expert(scale: torch.Tensor) -> torch.Tensor:
    """A scale grid, of 2-D or fused 3-D weights, as (experts, rows, columns)."""
    return scale.view(math.prod(scale.shape[:-2]), *scale.shape[-2:])


def _copy(task: Task, reader: Reader, shard: ShardFile, job: Job) -> dict[str, str]:
    entry, digest, offset = task.source, hashlib.sha256(), 0
    for part in chunks(entry, reader):
        data = tensor_bytes(part)
        digest.update(data)
        write_at(shard, entry.name, offset, data)
        offset += part.nbytes
        job.tick(part.nbytes)
    return {entry.name: digest.hexdigest()}


def _read_into(reader: Reader, buffer: torch.Tensor, offset: int) -> None:
    view: Any = tensor_bytes(buffer)
    start, length = offset, len(view)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(reader.fd, offset + _AHEAD_BYTES, len(view), os.POSIX_FADV_WILLNEED)
    while view:
        count = os.preadv(reader.fd, [view], offset)
        if count == 0:
            raise CorruptCheckpointError(
                "file became shorter while it was read", where=reader.path, remedy="fetch the file again"
            )
        view, offset = view[count:], offset + count
    drop_cached(reader.fd, start, length)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy if it is contiguous."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
