"""The text that a model trains on, read as it is needed; every row of a batch reads on from its own place.

A file of S bytes is read from `rows` places, row r from S r / rows on and past the end from the beginning. So
neighbours in a batch are from different parts of the text without a shuffle, memory holds a piece a row, and
where all rows are fits in a few numbers: `Place`, from which another run goes on with the same tokens. Which
tokens a row has does not depend on how many processes share the rows.

Pieces end where a line does, if there is an end of a line in them, and are tokens by themselves, without what
a tokenizer puts before a text.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import torch

from blockscale.errors import BlockscaleError
from blockscale.evaluate.text import OPENERS

_PIECE = 1 << 16  # bytes that are read at a time

Encode = Callable[[list[str]], list[list[int]]]
"""Texts to the token ids of each."""


class Place(NamedTuple):
    """Where a row reads on: the byte where its oldest unfinished piece begins, and how much of it is used."""

    offset: int
    used: int


class _Piece(NamedTuple):
    offset: int
    tokens: list[int]


def open_text(path: Path) -> IO[bytes]:
    """A text file to be read from anywhere; one that is packed (.xz, .bz2) is unpacked into a temporary file.

    Raises:
        BlockscaleError: it cannot be read, or is empty.
    """
    try:
        opener = OPENERS.get(path.suffix)
        if opener is None:
            return _not_empty(path.open("rb"), path)
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        with opener(path, "rb") as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
        return _not_empty(file, path)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise BlockscaleError(
            f"cannot be read: {error}", where=path, expected="a UTF-8 text file, .xz and .bz2 too"
        ) from error


def _not_empty(file: IO[bytes], path: Path) -> IO[bytes]:
    if not file.seek(0, os.SEEK_END):
        raise BlockscaleError("is empty", where=path, expected="a UTF-8 text file")
    return file


class Reading:
    """Windows of tokens for some rows of every batch; the next ones are made while a step is computed."""

    def __init__(
        self,
        path: Path,
        encode: Encode,
        rows: Sequence[int],
        of: int,
        context: int,
        places: Sequence[Place] | None = None,
    ) -> None:
        """Open the text.

        Args:
            path: of it.
            encode: of the model's tokenizer.
            rows: which of a batch.
            of: how many a whole batch has.
            context: tokens of a window.
            places: where the rows read on; from the beginning if None.

        Raises:
            BlockscaleError: see `open_text`; a text without tokens.
        """
        self._path, self._file, self._encode, self._context = path, open_text(path), encode, context
        self._size = self._file.tell()
        self._pieces: list[deque[_Piece]] = [deque() for _ in rows]
        begin = places or [Place(self._line_after(row * self._size // of), 0) for row in rows]
        self._next = [each.offset for each in begin]
        self._used = [each.used for each in begin]
        self.places = list(begin)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blockscale-text")
        self._coming = self._ask()

    def next(self) -> torch.Tensor:
        """int64 (rows, context); `places` is where it ended.

        Raises:
            BlockscaleError: the text is not UTF-8, or has no tokens.
        """
        windows, self.places = self._coming.result()
        self._coming = self._ask()
        return windows

    def close(self) -> None:
        """Read no more."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()

    def _ask(self) -> Future[tuple[torch.Tensor, list[Place]]]:
        return self._thread.submit(self._make)

    def _make(self) -> tuple[torch.Tensor, list[Place]]:
        barren = [0] * len(self._pieces)  # bytes without a token
        while short := [row for row in range(len(self._pieces)) if self._left(row) < self._context]:
            read = [self._read(self._next[row]) for row in short]
            made = self._encode([text for text, _ in read])
            for row, (text, end), tokens in zip(short, read, made, strict=True):
                barren[row] = 0 if tokens else barren[row] + len(text)
                if barren[row] > self._size:
                    raise BlockscaleError("has no tokens", where=self._path, expected="a text")
                self._pieces[row].append(_Piece(self._next[row], tokens))
                self._next[row] = end
        return torch.tensor([self._take(row) for row in range(len(self._pieces))]), self._reached()

    def _left(self, row: int) -> int:
        return sum(len(piece.tokens) for piece in self._pieces[row]) - self._used[row]

    def _take(self, row: int) -> list[int]:
        pieces, used = self._pieces[row], self._used[row]
        window: list[int] = []
        while len(window) < self._context:
            part = pieces[0].tokens[used : used + self._context - len(window)]
            window += part
            used += len(part)
            if used == len(pieces[0].tokens):
                pieces.popleft()
                used = 0
        self._used[row] = used
        return window

    def _reached(self) -> list[Place]:
        return [
            Place(pieces[0].offset if pieces else after, used)
            for pieces, after, used in zip(self._pieces, self._next, self._used, strict=True)
        ]

    def _read(self, offset: int) -> tuple[str, int]:
        """The piece that begins at a byte, and where the next one begins."""
        data = self._bytes(offset)
        if offset + len(data) < self._size:
            line = data.rfind(b"\n") + 1
            data = data[: line or _whole_characters(data)]
        end = offset + len(data)
        try:
            return data.decode("utf-8"), end if end < self._size else 0
        except UnicodeDecodeError as error:
            at = offset + error.start
            raise BlockscaleError("is not UTF-8", where=f"{self._path}, byte {at}") from error

    def _line_after(self, offset: int) -> int:
        """Where a line begins near a byte, or at least a character."""
        if not offset:
            return 0
        data = self._bytes(offset)
        line = data.find(b"\n") + 1
        if not line:
            line = next((place for place, byte in enumerate(data) if byte & 0xC0 != 0x80), 0)
        return (offset + line) % self._size

    def _bytes(self, offset: int) -> bytes:
        return os.pread(self._file.fileno(), _PIECE, offset)


def _whole_characters(data: bytes) -> int:
    """How many bytes are not part of a character that goes on."""
    end = len(data)
    while end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if data[end - 1] & 0xC0 == 0xC0 else len(data)
