"""Sizes of checkpoints by role and format, from headers."""

from __future__ import annotations

from collections.abc import Iterable

from blockscale.checkpoint.inspect import Count, inspect_checkpoint
from blockscale.report import figures
from blockscale.report.content import Chart, Section, Table, View
from blockscale.report.wording import ROLES
from blockscale.wording import size

_FORMATS = {"F8_E4M3": "FP8", "scale": "scales"}


def counts_of(spec: str, revision: str | None = None) -> tuple[Count, ...]:
    """What a checkpoint holds, by role and format; FP8 weights and their scales apart."""
    return inspect_checkpoint(spec, revision=revision).counts


def total(counts: tuple[Count, ...]) -> int:
    """Bytes of all tensors."""
    return sum(count.nbytes for count in counts)


def section(before: tuple[Count, ...] | None, after: tuple[Count, ...]) -> Section:
    """Sizes of a quantized checkpoint, and of the one it was made from if that is known."""
    stages = {"size": after} if before is None else {"before": before, "after": after}
    bytes_of = {
        (stage, count.role, count.dtype): count for stage, counts in stages.items() for count in counts
    }
    roles = sorted({role for _, role, _ in bytes_of}, key=lambda role: -_sum(bytes_of, role=role))
    formats = sorted({each for _, _, each in bytes_of}, key=lambda each: -_sum(bytes_of, dtype=each))
    bars = [(role, stage) for role in roles for stage in stages]
    parts, told = {}, {}
    for each in formats:
        found = [bytes_of.get((stage, role, each)) for role, stage in bars]
        name = _FORMATS.get(each, each)
        parts[name] = [0.0 if count is None else float(count.nbytes) for count in found]
        told[name] = [_told(count, name) for count in found]
    names = [[ROLES.get(role, role) for role, _ in bars], [stage for _, stage in bars]]
    chart = Chart(
        "Bytes by role and format",
        "Bars are tensors of one role. Headers of files are not counted.",
        (View("all", figures.bars(names, parts, told)),),
    )
    rows = tuple(
        _row(stages, bytes_of, role, each)
        for role in roles
        for each in formats
        if any((stage, role, each) in bytes_of for stage in stages)
    )
    whole = tuple(size(total(counts)) for counts in stages.values())
    tensors = (f"{sum(count.tensors for count in counts):,}" for counts in stages.values())
    columns = ("role", "format", *stages, *(("tensors",) if before is None else ("tensors before", "after")))
    last = ("all", "", *whole, *tensors)
    return Section("Sizes", (chart, Table("Sizes by role and format", columns, (*rows, last), (0, 1))))


_Counts = dict[tuple[str, str, str], Count]


def _sum(counts: _Counts, role: str | None = None, dtype: str | None = None) -> int:
    return sum(
        count.nbytes
        for (_, one, other), count in counts.items()
        if role in (None, one) and dtype in (None, other)
    )


def _told(count: Count | None, name: str) -> str:
    return "" if count is None else f"{name}: {size(count.nbytes)} in {count.tensors:,} tensors"


def _row(stages: Iterable[str], counts: _Counts, role: str, dtype: str) -> tuple[str, ...]:
    found = [counts.get((stage, role, dtype)) for stage in stages]
    tensors = ("\N{EN DASH}" if count is None else f"{count.tensors:,}" for count in found)
    sizes = ("\N{EN DASH}" if count is None else size(count.nbytes) for count in found)
    return (ROLES.get(role, role), _FORMATS.get(dtype, dtype), *sizes, *tensors)
