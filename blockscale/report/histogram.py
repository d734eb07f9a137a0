"""Where the values of a weight lie on the FP8 grid: a histogram of log2 |w / s|, and what became of them.

A value w of a block with scale s is stored as the E4M3 code nearest to w / s. Codes are of four kinds:

    flushed     0, of a value that is not                  |w / s| up to 2**-10
    subnormal   multiples of 2**-9                         up to 2**-6
    normal      three bits behind the leading one          up to 416
    saturated   448, the largest; the maximum of a block with a float32 scale is here, and that is normal

Tensors are read again in pieces of whole blocks, so that memory is bounded whatever their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from blockscale.checkpoint.compare import Side, open_side
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.strips import dtype_of

KINDS = ("flushed", "subnormal", "normal", "saturated")
LOW, HIGH, STEPS = -20, 12, 4  # log2 of the first and last edge, bins of an octave
BINS = (HIGH - LOW) * STEPS
_LARGEST, _NAN = 0x7E, 0x7F  # magnitudes of codes
_PIECE = 1 << 22  # values at a time


@dataclass(frozen=True)
class WeightHistogram:
    """One FP8 weight.

    Attributes:
        name: full name.
        counts: for each of `KINDS`, values in each bin; bin b holds log2 |w / s| from LOW + b / STEPS on.
            The first bin also has what is smaller, the last one what is larger.
        zeros: values that are 0 in the source, in no bin.
    """

    name: str
    counts: tuple[tuple[int, ...], ...]
    zeros: int

    @property
    def values(self) -> int:
        """All values of the weight, but for NaN."""
        return self.zeros + sum(map(sum, self.counts))

    def share(self, kind: str) -> float:
        """Share of the values that are of this kind."""
        return sum(self.counts[KINDS.index(kind)]) / max(1, self.values)


def grid() -> tuple[float, ...]:
    """The 126 magnitudes above 0 that E4M3 represents, 2**-9 to 448."""
    codes = torch.arange(1, _NAN, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return tuple(codes.float().tolist())


def count(
    codes: torch.Tensor, scale: torch.Tensor, source: torch.Tensor, block_size: tuple[int, int]
) -> tuple[torch.Tensor, int]:
    """Histogram of a piece of whole blocks.

    Args:
        codes: float8_e4m3fn (n, k).
        scale: float32 (ceil(n / bn), ceil(k / bk)).
        source: (n, k), bfloat16, float16 or float32.
        block_size: (bn, bk).

    Returns:
        int64 (len(KINDS), BINS), and how many values of the source are 0.
    """
    (n, k), (bn, bk) = codes.shape, block_size
    wide = scale.repeat_interleave(bn, 0)[:n].repeat_interleave(bk, 1)[:, :k]
    magnitude = codes.view(torch.uint8) & 0x7F
    kind = torch.where(magnitude == 0, 0, torch.where(magnitude < 8, 1, 2))
    kind = torch.where(magnitude == _LARGEST, 3, kind)
    exponent = torch.log2(source.float().abs() / wide)
    known = exponent.isfinite() & (magnitude != _NAN)
    place = ((exponent[known] - LOW) * STEPS).floor().clamp(0, BINS - 1).long()
    found = torch.bincount(kind[known] * BINS + place, minlength=len(KINDS) * BINS)
    return found.view(len(KINDS), BINS), int((source == 0).sum())


def read_histograms(model: str, reference: str, names: Iterable[str]) -> tuple[WeightHistogram, ...]:
    """Histograms of some FP8 weights of a checkpoint against the one it was made from.

    Raises:
        BlockscaleError: a name without a usable scale, or a file that cannot be read.
    """
    side, other = open_side(model), open_side(reference)
    found = []
    for name in names:
        total, zeros = torch.zeros(len(KINDS), BINS, dtype=torch.int64), 0
        for piece in _pieces(side, side.index.tensors[name], other, other.index.tensors[name]):
            counts, none = count(*piece, side.stored_block(side.index.tensors[name]))
            total, zeros = total + counts, zeros + none
        found.append(WeightHistogram(name, tuple(map(tuple, total.tolist())), zeros))
    return tuple(found)


def _pieces(
    side: Side, entry: TensorEntry, other: Side, twin: TensorEntry
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Codes, scale and source of whole rows of blocks, one expert after the other."""
    (rows, columns), block = entry.shape[-2:], side.stored_block(entry)[0]
    scale = side.scale(entry)
    scale = scale.reshape(-1, *scale.shape[-2:])
    step = max(1, _PIECE // (columns * block)) * block
    for expert in range(math.prod(entry.shape[:-2])):
        for row in range(0, rows, step):
            first, shape = expert * rows + row, (min(step, rows - row), columns)
            part = scale[expert, row // block : -(-(row + shape[0]) // block)]
            yield _read(side, entry, first, shape), part, _read(other, twin, first, shape)


def _read(side: Side, entry: TensorEntry, first: int, shape: tuple[int, int]) -> torch.Tensor:
    """Rows of a tensor, numbered through all experts."""
    dtype = dtype_of(entry)
    width = shape[1] * dtype.itemsize
    raw = side.source.read(entry.file, entry.start + first * width, shape[0] * width)
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)
