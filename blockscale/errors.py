"""The errors a user can cause: one line that says what, where, what was expected and got, and the remedy.

The command line prints the line and exits with code 2; as a library they are `ValueError`s.
"""

from __future__ import annotations


class BlockscaleError(ValueError):
    """Bad input or an unusable environment, told in one line.

    Args:
        what: what went wrong, as a short clause.
        where: file, tensor or argument it concerns.
        expected: what would have been right.
        got: what was there instead.
        remedy: what the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        line = what if where is None else f"{where}: {what}"
        details = [f"expected {expected}"] if expected is not None else []
        details += [f"got {got}"] if got is not None else []
        if details:
            line += f" ({', '.join(details)})"
        if remedy is not None:
            line += f"; {remedy}"
        super().__init__(" ".join(line.split()))


class CorruptCheckpointError(BlockscaleError):
    """A file is not what its header, its index or the safetensors format says it is."""


class NonFiniteError(BlockscaleError):
    """A weight holds NaN or Inf, which no scale can represent.

    Attributes:
        count: how many values are NaN or Inf.
        position: index of the first of them in the tensor, as (row, column) or (expert, row, column).
    """

    def __init__(self, count: int, position: tuple[int, ...], *, where: object = None) -> None:
        self.count = count
        self.position = position
        super().__init__(
            f"{count} NaN or Inf value{'s' if count != 1 else ''}, the first at {list(position)}",
            where=where,
            expected="finite weights",
            remedy="repair the weight, or keep it unquantized: --on-nonfinite keep",
        )


class MissingScaleError(BlockscaleError):
    """FP8 weights without the scales they need."""


class BusyError(BlockscaleError):
    """Another run is writing to the same destination."""


class LostRankError(BlockscaleError):
    """Another process of a run is gone, or does not answer."""
