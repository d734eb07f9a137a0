"""Unquantized activations, found again by the codes that were made of them.

An entry is kept under the storage of its codes, which is held weakly: codes that are gone free what was
remembered for them, at the next call, and no later storage is taken for theirs. Views of codes are found
by their place in the storage. What lies there has to be, byte by byte, what was quantized: memory that was
written to again, by whatever kernel, is unknown rather than matched wrongly. So are copies of codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class _Known:
    """Rows from the byte `first` of a storage on: codes uint8 (M, K) as they were, and originals (M, K)."""

    first: int
    codes: torch.Tensor
    original: torch.Tensor

    def overlaps(self, first: int, size: int) -> bool:
        return self.first < first + size and first < self.first + self.codes.numel()

    def rows_of(self, codes: torch.Tensor) -> torch.Tensor | None:
        """Originals (m, K) of contiguous codes (..., K), if these are whole rows and unchanged."""
        k, before = codes.shape[-1], int(codes.storage_offset()) - self.first
        row, count = before // k, codes.numel() // k
        if k != self.codes.shape[1] or before < 0 or before % k or row + count > len(self.codes):
            return None
        same = torch.equal(self.codes[row : row + count], codes.detach().view(torch.uint8).view(-1, k))
        return self.original[row : row + count] if same else None


class Originals:
    """What codes that still exist were quantized from."""

    def __init__(self) -> None:
        self._of_storage: dict[int, tuple[StorageWeakRef, list[_Known]]] = {}

    def __len__(self) -> int:
        """Tensors of codes that are remembered."""
        self._forget_dead()
        return sum(len(known) for _, known in self._of_storage.values())

    def put(self, codes: torch.Tensor, original: torch.Tensor) -> None:
        """Remember a copy of `original` for contiguous codes of its shape, instead of what was there before.

        Args:
            codes: float8_e4m3fn (..., K), contiguous.
            original: (..., K), any floating dtype and strides.
        """
        self._forget_dead()
        if codes.numel() == 0:
            return
        storage, k = StorageWeakRef(codes.untyped_storage()), codes.shape[-1]
        known = self._of_storage.setdefault(storage.cdata, (storage, []))[1]
        first, size = int(codes.storage_offset()), codes.numel()
        known[:] = [each for each in known if not each.overlaps(first, size)]
        copy = codes.detach().view(torch.uint8).reshape(-1, k).clone()
        known.append(_Known(first, copy, original.detach().reshape(-1, k).clone()))

    def find(self, codes: torch.Tensor) -> torch.Tensor | None:
        """The originals (M, K) of codes (..., K), or None if they are not known."""
        self._forget_dead()
        if codes.numel() == 0 or not codes.is_contiguous():
            return None
        _, known = self._of_storage.get(StorageWeakRef(codes.untyped_storage()).cdata, (None, []))
        found = (each.rows_of(codes) for each in known)
        return next((rows for rows in found if rows is not None), None)

    def _forget_dead(self) -> None:
        dead = [key for key, (storage, _) in self._of_storage.items() if storage.expired()]
        for key in dead:
            del self._of_storage[key]
