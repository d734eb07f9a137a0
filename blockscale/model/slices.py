"""What a rank has of a tensor: some rows or columns, and of an FP8 weight the scales that cover them.

Codes and scales can be cut apart where every block of a rank's part, counted from its own first row or
column, lies inside one block of the whole: where the part begins on an edge of blocks, or lies within one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from blockscale.errors import BlockscaleError
from blockscale.formats import blocks_over, cuts_through
from blockscale.model.ranks import Ranks


@dataclass(frozen=True)
class Part:
    """A rank's part of a dimension.

    Attributes:
        ends: where the part of each rank ends; the last one is the size of the dimension.
        rank: whose part it is.
    """

    ends: tuple[int, ...]
    rank: int = 0

    @property
    def size(self) -> int:
        """Of the dimension."""
        return self.ends[-1]

    @property
    def start(self) -> int:
        """Where this part begins."""
        return self.ends[self.rank - 1] if self.rank else 0

    @property
    def stop(self) -> int:
        """Where this part ends."""
        return self.ends[self.rank]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def widths(self) -> list[int]:
        """Of the parts of all ranks."""
        return [len(replace(self, rank=rank)) for rank in range(len(self.ends))]

    @property
    def alone(self) -> Part:
        """The same as a whole dimension."""
        return Part((len(self),))

    @property
    def indices(self) -> range:
        """Those of this part."""
        return range(self.start, self.stop)

    def blocks(self, side: int) -> range:
        """Blocks of this side that cover this part."""
        return blocks_over(self.indices, side)

    def cover(self, side: int) -> range:
        """The indices of those blocks."""
        blocks = self.blocks(side)
        return range(blocks.start * side, min(blocks.stop * side, self.size))

    def cuts_through(self, side: int) -> bool:
        """Whether some rank's part cannot have the scales of blocks of this side."""
        every = [replace(self, rank=rank) for rank in range(len(self.ends))]
        return any(cuts_through(part.indices, side) for part in every)


def share(size: int, ranks: Ranks, block: int = 1) -> Part:
    """This rank's part of a dimension: of whole blocks, as evenly as they allow, the larger parts first.

    Where there are fewer blocks than ranks they are halved as often as it takes, and every part lies within
    one block.

    Raises:
        BlockscaleError: it cannot be shared out.
    """
    while math.ceil(size / block) < ranks.world and block % 2 == 0:
        block //= 2
    units = math.ceil(size / block)
    if units < ranks.world:
        raise BlockscaleError(
            "too small for so many ranks", expected=f"at least {ranks.world} rows or columns", got=size
        )
    most, larger = divmod(units, ranks.world)
    counts = range(1, ranks.world + 1)
    ends = (min(size, block * (count * most + min(count, larger))) for count in counts)
    return Part(tuple(ends), ranks.rank)


def narrowed(tensor: torch.Tensor, ranges: Sequence[range]) -> torch.Tensor:
    """The indices in `ranges` of each dimension, contiguous; a view where they are all there is."""
    for dim, some in enumerate(ranges):
        tensor = tensor.narrow(dim, some.start, len(some))
    return tensor.contiguous()
