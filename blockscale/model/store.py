"""The tensors that a model is read from, by Hugging Face's names."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.source import Source

_AHEAD = 1 << 26  # bytes of a file that are asked for before they are used


@dataclass(frozen=True)
class Store:
    """Tensors, and what was read of them.

    Attributes:
        tensors: name -> entry.
        bytes_of: the bytes of an entry, on any device.
        divided: what ranks share was cut when the files were made: a tensor is this rank's part.
        read: names that were asked for.
        formats: linear layers by the dtype of their weights, after conversion.
        converted: how many were "quantized" or "dequantized" on the way, and why if it was not asked for.
    """

    tensors: Mapping[str, TensorEntry]
    bytes_of: Callable[[TensorEntry], torch.Tensor]
    divided: bool = False
    read: set[str] = field(default_factory=set)
    formats: Counter[torch.dtype] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)


class Files:
    """The bytes of entries of a checkpoint's files."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._mapped: dict[str, mmap.mmap] = {}
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
        self._read_ahead(entry, mapped)
        return torch.frombuffer(mapped, dtype=torch.uint8, offset=entry.start, count=entry.nbytes)

    def _read_ahead(self, entry: TensorEntry, mapped: mmap.mmap) -> None:
        """Have the system read what is asked for and what follows it, while what came before is copied."""
        asked = self._asked.get(entry.file, 0)
        if not hasattr(mmap, "MADV_WILLNEED") or entry.end + _AHEAD // 2 <= asked:
            return
        first = max(entry.start, asked) // mmap.PAGESIZE * mmap.PAGESIZE
        self._asked[entry.file] = last = min(entry.end + _AHEAD, len(mapped))
        if first < last:
            mapped.madvise(mmap.MADV_WILLNEED, first, last - first)
