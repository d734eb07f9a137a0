"""How far the result of one GEMM is from its truth, and why: the figures of `gemm_audit`.

With A, B the original operands and A', B' the dequantized codes, all products in float32,

    accumulation:   result   against  A' B'^T + bias
    activations:    A' B'^T  against  A B'^T
    weight:         A B'^T   against  A B^T          (with A' for A where A is not known)
    quantization:   A' B'^T  against  A B^T

so that the errors of activations and weight add up to that of quantization, value by value. Of two products
`calc_diff` is that of `blockscale.metrics`, and the relative error of a value is

    |got - expected| / (|A[m]| |B[n]| / sqrt(K) + |bias[n]|)

with Euclidean norms of the rows: the size that a result has if the signs of its K products are random. Unlike
|expected| it does not vanish where products cancel.

A result is rounded to its dtype. From the error of accumulation half a unit in its last place is taken off,
in both figures: what is left is the least error that rounding does not explain, 0 for a perfect result. The
float32 truth itself is rounded too, which shows as relative errors of up to about 1e-5 at K = 7168.

Weights are dequantized in pieces of rows, and comparisons cost a few pieces of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from blockscale.ops.gemm_audit_records import Codes, Deviation, Peak
from blockscale.reference import W4Weight, dequantize_activation, dequantize_w4, dequantize_weight
from blockscale.reference.gemm_checks import GROUP

_PIECE = 1 << 24  # values of a weight or of a result at a time
_NAN, _LARGEST = 0x7F, 0x7E  # magnitudes of codes
_CLIPPED = 464.0  # half way from 448 to what would come next
_DIGITS = {torch.bfloat16: 8, torch.float32: 24}  # of a significand


@dataclass(frozen=True)
class FP8Weight:
    """Codes (N, K) or (E, N, K) in blocks of 128 x 128, and their scales."""

    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return tuple(self.codes.shape)

    def __getitem__(self, expert: int) -> FP8Weight:
        """That of one expert."""
        return FP8Weight(self.codes[expert], self.scale[expert])


Weight = FP8Weight | W4Weight
# Codes of activations, their scales, and the weight.
Operands = tuple[torch.Tensor, torch.Tensor, Weight]


@dataclass(frozen=True)
class Segment:
    """Rows of one expert's weight; rows: int64 (m,), of `a` with its leading dimensions flattened."""

    expert: int
    rows: torch.Tensor


@dataclass(frozen=True)
class Gemm:
    """One call: operands as the GEMMs take them, its result, and the originals of operands, if known."""

    operands: Operands
    out: torch.Tensor
    segments: tuple[Segment, ...]
    bias: torch.Tensor | None = None
    original_a: torch.Tensor | None = None
    original_b: torch.Tensor | None = None


@dataclass(frozen=True)
class Figures:
    """Of one call, numbered `call` at its site; None where originals are not known."""

    codes: Codes
    accumulation: Deviation
    activations: Deviation | None
    weight: Deviation | None
    quantization: Deviation | None


def measure(gemm: Gemm, call: int) -> Figures:
    """Compare the rows of all segments; there is at least one row and one column."""
    found: dict[str, _Sums] = {}
    codes: Codes | None = None
    lead = tuple(gemm.out.shape[:-1])
    for segment in gemm.segments:
        rows = _rows(gemm, segment.rows)
        counted = _count(rows)
        codes = counted if codes is None else codes.merged(counted)
        with _full_precision():
            for first, last in _pieces(len(segment.rows), *gemm.operands[2].shape[-2:]):
                for name, sums in _compare_all(gemm, segment, rows, first, last).items():
                    placed = sums.placed(segment.rows, first, last - first, lead)
                    found[name] = found[name].merged(placed) if name in found else placed
    assert codes is not None
    of = {name: sums.deviation(call) for name, sums in found.items()}
    parts = of.get("activations"), of.get("weight"), of.get("quantization")
    return Figures(codes, of["accumulation"], *parts)


@dataclass(frozen=True)
class _Rows:
    """Codes uint8 (m, K) and scales (m, G) of a segment; dequantized and, if known, original, float32."""

    codes: torch.Tensor
    scale: torch.Tensor
    dequantized: torch.Tensor
    original: torch.Tensor | None


def _rows(gemm: Gemm, rows: torch.Tensor) -> _Rows:
    a, a_scale, _ = gemm.operands
    # FP8 cannot be indexed everywhere; bytes can.
    codes, scale = a.view(torch.uint8).flatten(0, -2)[rows], a_scale.flatten(0, -2)[rows]
    dequantized = dequantize_activation(codes.view(a.dtype), scale, dtype=torch.float32)
    original = None if gemm.original_a is None else gemm.original_a[rows].to(torch.float32)
    return _Rows(codes, scale, dequantized, original)


def _count(rows: _Rows) -> Codes:
    magnitude = rows.codes & 0x7F
    counts = [magnitude == _LARGEST, magnitude == _NAN, ~(rows.scale.isfinite() & (rows.scale > 0))]
    truth = rows.dequantized if rows.original is None else rows.original
    size = torch.where(truth.isfinite(), truth.abs(), 0)
    if rows.original is not None:
        largest = rows.scale.repeat_interleave(GROUP, -1)[:, : size.shape[1]] * _CLIPPED
        counts += [size > largest, (magnitude == 0) & (size > 0), ~truth.isfinite()]
    saturated, nan, bad, *known = (int(each.sum()) for each in counts)
    clipped, flushed, nonfinite = known or (0, 0, 0)
    total = size.numel()
    return Codes(
        *(total, saturated, nan, bad, total if known else 0, clipped, flushed, nonfinite),
        amax=float(size.max()),
    )


def _compare_all(gemm: Gemm, segment: Segment, rows: _Rows, first: int, last: int) -> dict[str, _Sums]:
    """The comparisons of columns first .. last - 1, which are rows of the weight."""
    a, b = rows.dequantized, gemm.operands[2]
    dense = len(b.shape) == 2
    weight = _dequantized(b if dense else b[segment.expert], first, last)
    quantized, size = a @ weight.T, _size(a, weight)
    bias = None if gemm.bias is None else gemm.bias[first:last].to(torch.float32)
    truth, truth_size = (quantized, size) if bias is None else (quantized + bias, size + bias.abs())
    got = gemm.out.flatten(0, -2)[segment.rows, first:last]
    wide = got.to(torch.float32)
    found = {"accumulation": _compare(wide, truth, truth_size, _half_unit(wide, _DIGITS[got.dtype]))}
    product, best = quantized, a
    if rows.original is not None:
        best = rows.original
        product = best @ weight.T
        found["activations"] = _compare(quantized, product, _size(best, weight))
    if gemm.original_b is not None:
        whole = gemm.original_b if dense else gemm.original_b[segment.expert]
        original = whole[first:last].to(weight.device, torch.float32)
        exact, exact_size = best @ original.T, _size(best, original)
        found["weight"] = _compare(product, exact, exact_size)
        if rows.original is not None:
            found["quantization"] = _compare(quantized, exact, exact_size)
    return found


def _dequantized(weight: Weight, first: int, last: int) -> torch.Tensor:
    """Rows first .. last - 1 of a weight (N, K), float32; `first` is a multiple of 128."""
    if isinstance(weight, W4Weight):
        return dequantize_w4(weight.rows(first, last))
    grid = weight.scale[first // GROUP : -(-last // GROUP)]
    return dequantize_weight(weight.codes[first:last], grid, dtype=torch.float32)


def _size(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(m, n): norms of rows of a (m, K) and b (n, K), divided by sqrt(K)."""
    return torch.outer(a.norm(dim=1), b.norm(dim=1)) / math.sqrt(a.shape[1])


def _half_unit(x: torch.Tensor, digits: int) -> torch.Tensor:
    """Half a unit in the last place of numbers with so many digits; 0 for 0 and for what is not finite."""
    exponent = torch.frexp(x).exponent
    return torch.where(x.isfinite() & (x != 0), torch.ldexp(torch.ones_like(x), exponent - digits - 1), 0)


@dataclass(frozen=True)
class _Sums:
    """Sums of squares of got, expected and error, values not finite on one side, and the worst value."""

    squares: tuple[float, float, float]
    nonfinite: int
    relative: float
    position: tuple[int, ...]
    expected: float
    got: float

    def placed(self, rows: torch.Tensor, first: int, columns: int, lead: tuple[int, ...]) -> _Sums:
        """With the position in the result instead of the flat one in a piece of it."""
        row, column = divmod(self.position[0], columns)
        index = int(rows[row])
        place = (index,) if len(lead) == 1 else divmod(index, lead[1])
        squares, nonfinite, relative = self.squares, self.nonfinite, self.relative
        return _Sums(squares, nonfinite, relative, (*place, first + column), self.expected, self.got)

    def merged(self, other: _Sums) -> _Sums:
        one, two = self.squares, other.squares
        worst = other if other.relative > self.relative else self
        return _Sums(
            (one[0] + two[0], one[1] + two[1], one[2] + two[2]),
            self.nonfinite + other.nonfinite,
            *(worst.relative, worst.position, worst.expected, worst.got),
        )

    def deviation(self, call: int) -> Deviation:
        got, expected, error = self.squares
        diff = error / (got + expected) if error else 0.0
        expected_value, got_value = (x if math.isfinite(x) else None for x in (self.expected, self.got))
        peak = Peak(self.relative, self.position, expected_value, got_value, call)
        return Deviation(1, diff, call, diff, self.nonfinite, peak)


def _compare(
    got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor, allowed: torch.Tensor | None = None
) -> _Sums:
    """Of (m, n) each; an error of `allowed` is none."""
    finite = got.isfinite() & expected.isfinite()
    lost = got.isfinite() != expected.isfinite()
    error = torch.where(finite, got - expected, 0).abs()
    if allowed is not None:
        error = (error - allowed).clamp(min=0)
    limits = torch.finfo(torch.float32)
    relative = torch.where(error > 0, error / size.clamp(min=limits.tiny), 0).clamp(max=limits.max)
    relative = torch.where(lost, limits.max, relative).flatten()
    at = relative.argmax()
    squares = [torch.where(finite, x, 0).double().square().sum() for x in (got, expected, error)]
    worst = [x.flatten()[at].double() for x in (relative, expected, got)]
    numbers = torch.stack([*squares, lost.sum().double(), *worst, at.double()]).tolist()
    return _Sums(
        (numbers[0], numbers[1], numbers[2]), int(numbers[3]), numbers[4], (int(numbers[7]),), *numbers[5:7]
    )


def _pieces(m: int, n: int, k: int) -> Iterator[tuple[int, int]]:
    """Columns of a result, whole blocks of the weight at a time."""
    step = max(1, _PIECE // max(m, k) // GROUP) * GROUP
    for first in range(0, n, step):
        yield first, min(first + step, n)


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products without TF32 or BF16 inside, whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
