"""What rounding has to know of a format: the numbers its codes stand for, and what shares a scale."""

from __future__ import annotations

import math

from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.reference.rounding import E2M1, E4M3, INT3, INT4, Grid


def grid_of(fmt: BlockFP8 | GroupInt | MXFP4) -> Grid:
    """The numbers that its codes stand for."""
    if isinstance(fmt, BlockFP8):
        return E4M3
    if isinstance(fmt, GroupInt):
        return INT4 if fmt.bits == 4 else INT3
    return E2M1


def block_of(fmt: BlockFP8 | GroupInt | MXFP4) -> tuple[int, int]:
    """(rows, columns) that share a scale."""
    return fmt.block_size if isinstance(fmt, BlockFP8) else (1, fmt.group_size)


def clipping_limit(fmt: BlockFP8 | GroupInt | MXFP4) -> float:
    """L + h/2, L the largest number and h its distance from the next: 464, 7.5, 3.5, or 7 of E2M1.

    Below it a number is rounded to L, beyond it saturated.
    """
    grid = grid_of(fmt)
    binade = 2.0 ** math.floor(math.log2(grid.largest))
    return grid.largest + binade * 2.0 ** -(grid.mantissa_bits + 1)
