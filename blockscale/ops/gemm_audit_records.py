"""What `gemm_audit` reports: frozen records of numbers and names, so that `asdict` of them is JSON.

A record stands for all calls of a GEMM from one site with weights of one shape, whatever M was. It keeps
counts and the worst of the calls, and does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

from blockscale.errors import BlockscaleError


@dataclass(frozen=True)
class GemmLimits:
    """Errors of a call from which on it raises; None is no limit.

    Attributes:
        calc_diff: of the result against the float32 product of the dequantized operands.
        max_relative_error: of one value of that result.
        quantization_calc_diff: of that product against the one of the original operands, as far as known.
    """

    calc_diff: float | None = None
    max_relative_error: float | None = None
    quantization_calc_diff: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            limit = getattr(self, field.name)
            if limit is not None and not 0 <= limit < math.inf:
                where = f"GemmLimits: {field.name}"
                raise BlockscaleError("bad limit", where=where, expected="0 or more, or None", got=limit)


@dataclass(frozen=True)
class Peak:
    """The value that is off the most.

    Attributes:
        relative_error: its error divided by |a[m]| |b[n]| / sqrt(K), see `gemm_audit_figures`.
        position: index into the result: (m, n), or (e, m, n) with masked rows.
        expected, got: the values there; None stands for NaN or Inf, which JSON does not have.
        call: number of the call at this site, from 1.
    """

    relative_error: float
    position: tuple[int, ...]
    expected: float | None
    got: float | None
    call: int


@dataclass(frozen=True)
class Deviation:
    """How far one product is from another.

    Attributes:
        calls: that were compared.
        calc_diff: largest of a call, see `blockscale.metrics`.
        calc_diff_call: number of that call.
        mean_calc_diff: over the calls.
        nonfinite: values that are finite in one of the products only, of all calls; no other figure counts
            them, but the first of them is the peak.
        peak: of all calls.
    """

    calls: int
    calc_diff: float
    calc_diff_call: int
    mean_calc_diff: float
    nonfinite: int
    peak: Peak

    def merged(self, other: Deviation) -> Deviation:
        """Of the calls of both; of equals the first one counts."""
        calls = self.calls + other.calls
        worse = other if other.calc_diff > self.calc_diff else self
        higher = other.peak.relative_error > self.peak.relative_error
        return Deviation(
            calls=calls,
            calc_diff=worse.calc_diff,
            calc_diff_call=worse.calc_diff_call,
            mean_calc_diff=(self.mean_calc_diff * self.calls + other.mean_calc_diff * other.calls) / calls,
            nonfinite=self.nonfinite + other.nonfinite,
            peak=other.peak if higher else self.peak,
        )


@dataclass(frozen=True)
class Codes:
    """Counts over the quantized activations of rows that count.

    Attributes:
        values: codes.
        saturated: codes at +-448; with float32 scales at least one of every group is, and that is normal.
        nan: NaN codes.
        bad_scales: scales that are NaN, Inf or not positive.
        known: codes whose original value is known; what follows counts among these.
        clipped: originals above 464 scales, where 448 is no longer the nearest value of an unbounded format.
        flushed: zero codes of originals that are not zero.
        nonfinite: originals that are NaN or Inf.
        amax: largest finite magnitude, of originals where known, else of dequantized values.
    """

    values: int
    saturated: int
    nan: int
    bad_scales: int
    known: int
    clipped: int
    flushed: int
    nonfinite: int
    amax: float

    def merged(self, other: Codes) -> Codes:
        """Of both."""
        one, two = asdict(self), asdict(other)
        counts = {name: one[name] + two[name] for name in one}
        return Codes(**{**counts, "amax": max(self.amax, other.amax)})


@dataclass(frozen=True)
class GemmRecord:
    """All calls of one GEMM from one site.

    Attributes:
        site: name that the caller gave, or file, line and function.
        op: name of the operator.
        experts: E of a grouped GEMM, else None.
        n, k: shape of the weight.
        calls: with rows that count.
        rows: that count, of all calls.
        most_rows: of a call.
        accumulation: of results against the product of the dequantized operands (a), beyond what rounding to
            the dtype of the result explains.
        activations: of (a) against the product with the original activations, where they are known.
        weight: of the product with the dequantized weight against that with the original one, where it is
            known; activations are the original ones where known.
        quantization: of (a) against the product of the original operands, where both are known.
        codes: of the activations.
    """

    site: str
    op: str
    experts: int | None
    n: int
    k: int
    calls: int
    rows: int
    most_rows: int
    accumulation: Deviation
    activations: Deviation | None
    weight: Deviation | None
    quantization: Deviation | None
    codes: Codes

    def merged(self, other: GemmRecord) -> GemmRecord:
        """Of the calls of both."""
        return replace(
            self,
            calls=self.calls + other.calls,
            rows=self.rows + other.rows,
            most_rows=max(self.most_rows, other.most_rows),
            accumulation=self.accumulation.merged(other.accumulation),
            activations=_merged(self.activations, other.activations),
            weight=_merged(self.weight, other.weight),
            quantization=_merged(self.quantization, other.quantization),
            codes=self.codes.merged(other.codes),
        )


def _merged(one: Deviation | None, other: Deviation | None) -> Deviation | None:
    if one is None or other is None:
        return one or other
    return one.merged(other)


def check_limits(record: GemmRecord, limits: GemmLimits) -> None:
    """Refuse a call that is beyond the limits; record: of this call alone, with its number.

    Raises:
        BlockscaleError: names the site, and expected and got of the value that is off the most.
    """
    accumulation = record.accumulation
    most = limits.max_relative_error
    if limits.calc_diff is not None or most is not None:
        if accumulation.nonfinite:
            _refuse(record, f"{accumulation.nonfinite} values finite on one side only", accumulation)
        _check_diff(record, "accumulation", accumulation, limits.calc_diff)
        if most is not None and accumulation.peak.relative_error > most:
            what = f"accumulation: relative error {accumulation.peak.relative_error:.3g} > {most:g}"
            _refuse(record, what, accumulation)
    for name in ("quantization", "activations", "weight"):
        deviation = getattr(record, name)
        if deviation is not None:
            _check_diff(record, f"quantization of {_PARTS[name]}", deviation, limits.quantization_calc_diff)


_PARTS = {"quantization": "both operands", "activations": "activations", "weight": "the weight"}


def _check_diff(record: GemmRecord, what: str, deviation: Deviation, limit: float | None) -> None:
    if limit is None:
        return
    if deviation.nonfinite:
        _refuse(record, f"{what}: {deviation.nonfinite} values finite on one side only", deviation)
    if deviation.calc_diff > limit:
        _refuse(record, f"{what}: calc_diff {deviation.calc_diff:.3g} > {limit:g}", deviation)


def _refuse(record: GemmRecord, what: str, deviation: Deviation) -> None:
    peak = deviation.peak
    raise BlockscaleError(
        f"{what} in call {peak.call}, worst at {list(peak.position)}",
        where=f"{record.op}, {record.site}, N {record.n}, K {record.k}",
        expected=_value(peak.expected),
        got=_value(peak.got),
    )


def _value(value: float | None) -> str:
    return "NaN or Inf" if value is None else f"{value:.7g}"


def table(records: Iterable[GemmRecord]) -> str:
    """A line per record under a heading; `-` is what is not known."""
    lines = [_HEADING, *(_cells(record) for record in records)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in each).rstrip()
        for each in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    )


_HEADING = (
    *("site", "op", "ExNxK", "calls", "rows", "acc diff", "acc max", "acc at"),
    *("act diff", "weight diff", "both", "448 %", "clip %", "to 0 %", "nonfinite", "amax"),
)


_SHORT = {
    "fp8_gemm_nt": "dense",
    "m_grouped_fp8_gemm_nt_contiguous": "contiguous",
    "m_grouped_fp8_gemm_nt_masked": "masked",
    "w4a8_gemm_nt": "w4-dense",
    "m_grouped_w4a8_gemm_nt_contiguous": "w4-contiguous",
    "m_grouped_w4a8_gemm_nt_masked": "w4-masked",
}


def _cells(record: GemmRecord) -> tuple[str, ...]:
    codes, accumulation = record.codes, record.accumulation
    sizes = (record.n, record.k) if record.experts is None else (record.experts, record.n, record.k)
    parts = (record.activations, record.weight, record.quantization)
    lost = accumulation.nonfinite + codes.nan + codes.bad_scales + codes.nonfinite
    return (
        record.site,
        _SHORT[record.op],
        "x".join(map(str, sizes)),
        str(record.calls),
        str(record.rows),
        f"{accumulation.calc_diff:.1e}",
        f"{accumulation.peak.relative_error:.1e}",
        ",".join(map(str, accumulation.peak.position)),
        *("-" if part is None else f"{part.calc_diff:.1e}" for part in parts),
        _percent(codes.saturated, codes.values),
        _percent(codes.clipped, codes.known),
        _percent(codes.flushed, codes.known),
        str(lost),
        f"{codes.amax:.3g}",
    )


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.3g}" if total else "-"
