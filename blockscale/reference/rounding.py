"""The inner loops of calibrated rounding: columns rounded one by one, each making up for what others lost.

All of a block of columns (N, B) is float32, the scales s (.., N, G) are one for each row and run of
`group_size` columns. For j = 0, 1, ..., B - 1, with grid(x) the number of a `Grid` that is nearest to x:

    round_columns                                   descend_columns
        q_j = grid(w_j / s)                             b_j = q_j s
        e_j = (w_j - q_j s) / U_jj                      q_j = grid((b_j + g_j / H_jj) / s)
        w_k = w_k - e_j U_jk      for k > j             d_j = q_j s - b_j
        loss = loss + e_j e_j                           g_k = g_k - d_j H_jk      for k > j

U is a factor of the inverse of the norm H, and g = (W' - Q) H the slope; see calibrate/rounding.py. Every
operation is a float32 one of its own, correctly rounded, in the order written: no multiply-add is fused, and
an element takes its updates in the order of j. So results do not depend on the implementation.

Source: GPTQ (arXiv:2210.17323) for the first, coordinate descent as in QuantEase (arXiv:2309.01885) for the
second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from blockscale.errors import BlockscaleError
from blockscale.formats import E4M3_MAX
from blockscale.reference import checks

_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23  # of float32


@dataclass(frozen=True)
class Grid:
    """The numbers that codes stand for: floating point of few bits, with subnormals, saturating.

    Integers up to 2**(m + 1) - 1 are such numbers too: the subnormals, and the lowest binade above them.

    Attributes:
        largest: of the numbers.
        smallest_normal: a power of two; below it numbers are as far apart as from it to its double.
        mantissa_bits: m; numbers of a binade from 2**e on are 2**(e - m) apart.
    """

    largest: float
    smallest_normal: float
    mantissa_bits: int

    @property
    def to_last_bit(self) -> float:
        """Times a binade (at least the smallest normal one), what x is to be added to, to be rounded there.

        The sum of float32 has its last bit where the numbers of the grid have theirs.
        """
        return 1.5 * 2.0 ** (_MANTISSA_BITS - self.mantissa_bits)


E4M3 = Grid(E4M3_MAX, 2.0**-6, 3)
E2M1 = Grid(6.0, 1.0, 1)
INT4 = Grid(7.0, 4.0, 2)
INT3 = Grid(3.0, 2.0, 1)


class RoundedColumns(NamedTuple):
    """What `round_columns` makes of a block of columns with every candidate.

    Attributes:
        codes: float32 (F, N, B), numbers of the grid.
        errors: float32 (F, N, B), e_j.
        loss: float32 (F, N), sums of the squares of e_j.
    """

    codes: torch.Tensor
    errors: torch.Tensor
    loss: torch.Tensor


def round_columns(
    columns: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, group_size: int, grid: Grid
) -> RoundedColumns:
    """Round a block of columns in order, with every candidate for its scales by itself.

    Args:
        columns: w, float32 (N, B), finite.
        factor: U, float32 (B, B); what is below the diagonal is not looked at.
        scale: float32 (F, N, G), F candidates, positive.
        group_size: columns of a row that share a scale; G = ceil(B / group_size).
        grid: of the codes.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    check_columns("round_columns", columns, factor, scale, group_size, candidates=True)
    rows, width = columns.shape
    # (B, F, N): a column of all candidates is contiguous.
    work = columns.T[:, None].repeat(1, len(scale), 1)
    spread = _spread(scale, group_size, width).permute(2, 0, 1).contiguous()
    codes, errors = torch.empty_like(work), torch.empty_like(work)
    loss = torch.zeros(len(scale), rows, device=columns.device)
    for j in range(width):
        codes[j] = to_grid(work[j] / spread[j], grid)
        errors[j] = (work[j] - codes[j] * spread[j]) / factor[j, j]
        work[j + 1 :] -= errors[j] * factor[j, j + 1 :, None, None]
        loss += errors[j] * errors[j]
    return RoundedColumns(codes.permute(1, 2, 0).contiguous(), errors.permute(1, 2, 0).contiguous(), loss)


def descend_columns(
    slope: torch.Tensor,
    codes: torch.Tensor,
    norm: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    grid: Grid,
) -> torch.Tensor:
    """Codes of a block of columns, each the best one given all others and the scales.

    Args:
        slope: g, float32 (N, B), finite.
        codes: q, float32 (N, B), as they are.
        norm: H of these columns, float32 (B, B); what is below the diagonal is not looked at.
        scale: float32 (N, G), positive.
        group_size: columns of a row that share a scale; G = ceil(B / group_size).
        grid: of the codes.

    Returns:
        float32 (N, B), numbers of the grid.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    check_columns("descend_columns", slope, norm, scale, group_size, candidates=False)
    checks.check_shape("descend_columns: codes", codes.shape, tuple(slope.shape))
    work, result = (each.T.clone(memory_format=torch.contiguous_format) for each in (slope, codes))
    spread = _spread(scale, group_size, slope.shape[1]).T.contiguous()
    for j in range(len(work)):
        before = result[j] * spread[j]
        result[j] = to_grid((before + work[j] / norm[j, j]) / spread[j], grid)
        change = result[j] * spread[j] - before
        work[j + 1 :] -= change * norm[j, j + 1 :, None]
    return result.T.contiguous()


def to_grid(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The numbers nearest to x, float32; ties to the even multiple of the last bit, a zero keeps its sign."""
    magnitude = x.abs().clamp_max(grid.largest)
    _, exponent = torch.frexp(magnitude)  # of the double of the binade
    lowest = round(math.log2(grid.smallest_normal))
    last_bit = (exponent - 1).clamp_min(lowest) - grid.mantissa_bits
    step = ((last_bit + _EXPONENT_BIAS) << _MANTISSA_BITS).to(torch.int32).view(torch.float32)
    return ((magnitude / step).round() * step).copysign(x)


def check_columns(
    op: str,
    columns: torch.Tensor,
    square: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    *,
    candidates: bool,
) -> None:
    """Refuse columns (N, B), a matrix (B, B) and scales ([F,] N, G) that do not fit each other.

    Raises:
        BlockscaleError: they do not.
    """
    for name, tensor in (("columns", columns), ("matrix", square), ("scale", scale)):
        checks.check_dtype(f"{op}: {name}", tensor.dtype, (torch.float32,))
    if columns.dim() != 2:
        raise BlockscaleError(
            "wrong shape", where=f"{op}: columns", expected="(N, B)", got=list(columns.shape)
        )
    if not isinstance(group_size, int) or group_size < 1:
        raise BlockscaleError(
            "bad group size", where=f"{op}: group_size", expected="a positive integer", got=repr(group_size)
        )
    rows, width = columns.shape
    checks.check_shape(f"{op}: matrix", square.shape, (width, width))
    if scale.dim() != (3 if candidates else 2):
        expected = "(F, N, G)" if candidates else "(N, G)"
        raise BlockscaleError("wrong shape", where=f"{op}: scale", expected=expected, got=list(scale.shape))
    checks.check_shape(f"{op}: scale", scale.shape, (*scale.shape[:-2], rows, -(-width // group_size)))


def _spread(scale: torch.Tensor, group_size: int, width: int) -> torch.Tensor:
    """Scales (..., N, G) of groups as those of columns, (..., N, B)."""
    return scale.repeat_interleave(group_size, -1)[..., :width]
