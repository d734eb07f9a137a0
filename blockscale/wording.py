"""Numbers as readers see them, the same in the terminal and in reports."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Decimal bytes with a unit: `0.49 MB`, `12.30 GB`, `134 GB`, `1342 GB`, `12.00 TB`."""
    for unit, least, scale in (("TB", 1e13, 1e12), ("GB", 1e9, 1e9), ("MB", 1e6, 1e6), ("kB", 1e3, 1e3)):
        if nbytes >= least:
            value = nbytes / scale
            return f"{value:.2f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{nbytes:.0f} B"
