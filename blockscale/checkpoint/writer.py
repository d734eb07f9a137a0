"""Write a safetensors file as a stream: the header first, then every tensor's bytes at their final offsets.

Nothing is held back, so memory is bounded by what the caller holds, and threads may write different tensors
of one file at once. The layout is canonical (alignment, then name) and the bytes depend on nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blockscale.checkpoint.plan import OutputTensor
from blockscale.errors import BlockscaleError
from blockscale.formats import dtype_bits


@dataclass(frozen=True)
class ShardFile:
    """An open output file: descriptor, path, absolute offset of every tensor, total bytes."""

    fd: int
    path: Path
    offsets: dict[str, int]
    size: int


def open_shard(path: Path, outputs: Iterable[OutputTensor], metadata: dict[str, str]) -> ShardFile:
    """Create `path`, write its header and give it its final size.

    Tensors are laid out by falling element size, then name, so that each is aligned to its element.
    """
    ordered = sorted(outputs, key=lambda output: (-dtype_bits(output.dtype), output.name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position, offsets = 0, {}
    for output in ordered:
        end = position + output.nbytes
        header[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [position, end],
        }
        offsets[output.name] = position
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with io_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    shard = ShardFile(fd, path, {name: start + offset for name, offset in offsets.items()}, start + position)
    try:
        with io_errors(path):
            os.truncate(fd, shard.size)
        _pwrite(shard, struct.pack("<Q", len(text)) + text, 0)
    except BlockscaleError:
        os.close(fd)
        raise
    return shard


def write_at(shard: ShardFile, name: str, offset: int, data: memoryview) -> None:
    """Write bytes of tensor `name` from `offset` bytes into it."""
    _pwrite(shard, data, shard.offsets[name] + offset)


def flush(shard: ShardFile) -> None:
    """Push what is written so far to the disk, and give its page cache back.

    The next pages are then those just freed: no other process loses its cache to a file larger than memory,
    and a virtual machine need not ask its host for new pages, which can cost more than the writing.
    """
    with io_errors(shard.path):
        os.fdatasync(shard.fd)
    drop_cached(shard.fd, 0, 0)


def drop_cached(fd: int, offset: int, length: int) -> None:
    """Give back the page cache of a range (to the end where `length` is 0); dirty pages stay."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def close_shard(shard: ShardFile) -> None:
    """Sync and close."""
    try:
        with io_errors(shard.path):
            os.fsync(shard.fd)
    finally:
        os.close(shard.fd)


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file whole and sync it."""
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Sync a folder, so that renames in it survive a power cut."""
    with io_errors(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _pwrite(shard: ShardFile, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    with io_errors(shard.path):
        while view:
            written = os.pwrite(shard.fd, view, offset)
            view, offset = view[written:], offset + written


@contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """Tells a failure to write `path` in one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise BlockscaleError(
            "disk is full" if full else f"cannot be written: {error.strerror}",
            where=path,
            remedy="free some space and run the same command again: finished shards are kept"
            if full
            else None,
        ) from error
