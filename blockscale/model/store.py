"""The tensors that a model is read from, by Hugging Face's names."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.source import Source

_AHEAD = 1 << 27  # bytes of a file that are asked for before they are used
_PIECE = 1 << 24  # bytes read at a time


@dataclass(frozen=True)
class Store:
    """Tensors, and what was read of them.

    Attributes:
        tensors: name -> entry.
        bytes_of: the bytes of an entry, on any device.
        divided: what ranks share was cut when the files were made: a tensor is this rank's part.
        read: names that were asked for.
        formats: linear layers by the dtype of their weights, after conversion, or by their format in groups.
        converted: how many were "quantized" or "dequantized" on the way, and why if it was not asked for.
    """

    tensors: Mapping[str, TensorEntry]
    bytes_of: Callable[[TensorEntry], torch.Tensor]
    divided: bool = False
    read: set[str] = field(default_factory=set)
    formats: Counter[torch.dtype | str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)


class Files:
    """The bytes of entries of a checkpoint's files."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._mapped: dict[str, mmap.mmap] = {}
        # Advice (MADV_WILLNEED) on the maps left the disk idle a fifth of the time.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="blockscale-read-ahead")
        self._asked: dict[str, int] = {}

    def bytes_of(self, entry: TensorEntry) -> torch.Tensor:
        """Bytes of a tensor; of a local file a view of it, not yet in memory."""
        if entry.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if not self._source.is_local:
            data = bytearray(self._source.read(entry.file, entry.start, entry.nbytes))
            return torch.frombuffer(data, dtype=torch.uint8)
        if entry.file not in self._mapped:
            with open(self._source.path(entry.file), "rb") as file:
                # Private: PyTorch wants memory that could be written to.
                self._mapped[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = self._mapped[entry.file]
        self._read_ahead(entry)
        return torch.frombuffer(mapped, dtype=torch.uint8, offset=entry.start, count=entry.nbytes)

    def _read_ahead(self, entry: TensorEntry) -> None:
        """Have what follows an entry read into the system's cache, while what came before is copied."""
        asked = self._asked.get(entry.file, 0)
        if entry.end + _AHEAD // 2 > asked:
            self._asked[entry.file] = last = entry.end + _AHEAD
            self._reader.submit(_read, self._source.path(entry.file), max(entry.start, asked), last)


def _read(path: str, first: int, last: int) -> None:
    """Read bytes of a file and forget them; what cannot be read shows where it is used."""
    buffer = memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0) as file:
        file.seek(first)
        while first < last and (count := file.readinto(buffer[: last - first])):
            first += count
