"""Read tensors of an open source file piece by piece: chunks of bytes, or strips of whole rows and blocks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blockscale import ops
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.writer import drop_cached
from blockscale.errors import CorruptCheckpointError, NonFiniteError
from blockscale.formats import SAFETENSORS_DTYPES

CHUNK_BYTES = 2 << 20
# The kernel's own read-ahead (128 KiB) leaves the disk idle while a strip is computed.
_AHEAD_BYTES = 8 << 20


@dataclass(frozen=True)
class Reader:
    """An open source file."""

    fd: int
    path: Path


@dataclass(frozen=True)
class Span:
    """Where a strip lies: rows `row` to `row + rows` of an expert, from byte `start` of the file on."""

    expert: int
    row: int
    rows: int
    start: int


@contextmanager
def open_reader(path: Path) -> Iterator[Reader]:
    """Open a source file for reading from several threads."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Reader(fd, path)
    finally:
        os.close(fd)


def read_codes(reader: Reader, start: int, rows: int, columns: int) -> torch.Tensor:
    """Read (rows, columns) E4M3 codes from an absolute offset."""
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    read_into(reader, codes, start)
    return codes


def chunks(entry: TensorEntry, reader: Reader) -> Iterator[torch.Tensor]:
    """Read a tensor's bytes as uint8 pieces of at most `CHUNK_BYTES`, views of one reused buffer."""
    buffer = torch.empty(min(CHUNK_BYTES, entry.nbytes), dtype=torch.uint8)
    for offset in range(0, entry.nbytes, CHUNK_BYTES):
        part = buffer[: min(CHUNK_BYTES, entry.nbytes - offset)]
        read_into(reader, part, entry.start + offset)
        yield part


def spans(entry: TensorEntry, rows_per_block: int, values: int) -> Iterator[Span]:
    """Cut a (N, K) or (E, N, K) tensor into strips of whole blocks: the first is the highest.

    A strip has at most `values` values, but at least one row of blocks.
    """
    rows, columns = entry.shape[-2:]
    height = max(1, values // max(1, columns * rows_per_block)) * rows_per_block
    row_bytes = columns * dtype_of(entry).itemsize
    for expert in range(math.prod(entry.shape[:-2])):
        for row in range(0, rows, height):
            start = entry.start + (expert * rows + row) * row_bytes
            yield Span(expert, row, min(height, rows - row), start)


def strips(
    entry: TensorEntry, reader: Reader, rows_per_block: int = 1
) -> Iterator[tuple[Span, torch.Tensor]]:
    """Read a (N, K) or (E, N, K) tensor as strips (rows, K), each with where it lies.

    Strips are whole blocks high. Each is a view of one buffer that the next step overwrites.
    """
    dtype, buffer = dtype_of(entry), None
    for span in spans(entry, rows_per_block, CHUNK_BYTES // dtype.itemsize):
        if buffer is None:
            buffer = torch.empty(span.rows, entry.shape[-1], dtype=dtype)
        strip = buffer[: span.rows]
        read_into(reader, strip, span.start)
        yield span, strip


def cut(entry: TensorEntry, reader: Reader, rows: range, columns: range | None) -> Iterator[torch.Tensor]:
    """Read some rows of a tensor, and of a matrix some columns (None: all), piece by piece in order.

    Pieces are of the tensor's dtype or uint8, and overwritten by the next step. Whole rows are read.
    """
    part = rows_of(entry, rows)
    if columns is None:
        yield from chunks(part, reader)
        return
    for _, strip in strips(part, reader):
        yield strip[:, columns.start : columns.stop]


def rows_of(entry: TensorEntry, rows: range) -> TensorEntry:
    """The rows (indices along the first dimension) of a tensor, as if they were one of their own."""
    row_bytes = entry.nbytes // max(1, entry.shape[0])
    start = entry.start + rows.start * row_bytes
    return replace(entry, shape=(len(rows), *entry.shape[1:]), start=start, end=start + len(rows) * row_bytes)


def nonfinite_of(entry: TensorEntry, reader: Reader) -> NonFiniteError | None:
    """Scan a whole weight for NaN and Inf."""
    total, first = 0, None
    for span, strip in strips(entry, reader):
        count, index = ops.find_nonfinite(strip)
        if count and first is None:
            row, column = span.row + index // strip.shape[1], index % strip.shape[1]
            first = (row, column) if len(entry.shape) == 2 else (span.expert, row, column)
        total += count
    return NonFiniteError(total, first, where=f"{entry.name} in {entry.file}") if first is not None else None


def read_into(reader: Reader, buffer: torch.Tensor, offset: int) -> None:
    """Fill a contiguous CPU tensor with the bytes from an absolute offset on."""
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
    # Before Python 3.12 no type says that an array has a buffer.
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """PyTorch's name of a tensor's dtype, which must be one that PyTorch has."""
    dtype = SAFETENSORS_DTYPES[entry.dtype]
    assert dtype is not None
    return dtype
