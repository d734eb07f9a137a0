"""What a long run tells its caller while it works."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a run; `advance` is called from several threads."""

    def start(self, total_bytes: int, total_tensors: int) -> None:
        """The run is about to read this much, on top of what it was about to read before."""

    def advance(self, nbytes: int, tensors: int) -> None:
        """So many more bytes were read and tensors finished."""


class Silent:
    """A `Progress` for callers who do not look."""

    def start(self, total_bytes: int, total_tensors: int) -> None:
        """Ignored."""

    def advance(self, nbytes: int, tensors: int) -> None:
        """Ignored."""
