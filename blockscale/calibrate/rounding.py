"""Rounding of a weight to codes and scales that minimizes the error of the layer's outputs.

Of the target W' and the norm H of hessian.py, minimize tr((W' - Q) H (W' - Q)^T) over Q = codes * scale.

1. Columns are rounded in order, and what a column loses is made up for by those after it. With
   H^-1 = U^T U, U upper triangular,

       e_j = (w_j - q_j) / U_jj,        w_k -= e_j U_jk  for k > j,

   and the squares of all e_j add up to the error in the norm of H.
2. A block of columns has a few candidates for its scales. All of them are rounded side by side, and each
   scale block keeps the one that loses least: its e_j count what later columns cannot make up for.
3. Sweeps of coordinate descent go over the columns again, each rounded to the grid point that is best given
   all others, q_j + ((W' - Q) H)_j / H_jj: the error never grows.
4. Before each sweep, BF16 scales of groups become those of least error given the codes: with q_g the codes
   of group g of a row w', in their places, the error is a quadratic form in the scales s, minimal where

       A s = b,        A_gh = q_g H q_h^T,  b_g = q_g H w'^T.

   They are rounded to what can be stored; a row that loses by it keeps those it had. (Blocks of FP8 are left
   out: E4M3 has nearly the same numbers whatever the scale.)

The result is never worse than plain rounding: a row of blocks that is gets plain rounding and the sweeps
instead. Every code is a float32 value over its scale, rounded to the format's grid, saturating.

Source: GPTQ (Frantar et al., arXiv:2210.17323) for step 1; coordinate descent as in QuantEase
(arXiv:2309.01885).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from blockscale import ops
from blockscale.calibrate.formats import (
    Points,
    QuantizedFormat,
    Rounding,
    block_of,
    grid_of,
    nearest_scale,
    plain_points,
    stored,
    values_of_points,
)
from blockscale.calibrate.hessian import DAMPING, SHARE, Moments, damped, output_error, target_weight
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8

_POWERS_OF_TWO = (1.0, 0.5)
# Factors of the scale that the largest value of a block asks for. E4M3 is a floating format: another power of
# two rounds to the same values, but for those that saturate or become subnormal.
_FP8_FACTORS = (1.0, 0.9, 1.1, 1.25, 1.5)
# Of few bits, the largest values had better saturate so that all others have finer steps.
_INT_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
_VALUES = 1 << 25  # of the systems of step 4 at a time


@dataclass(frozen=True)
class Search:
    """What is tried to make the error small.

    Attributes:
        damping: of the norm; see hessian.py.
        share: of the difference between original and quantized inputs that weights make up for.
        factors: of the plain scales, tried for every block; the first must be 1. None takes `factors_of`.
        sweeps: of coordinate descent after the columns are rounded. None takes `sweeps_of`.
    """

    damping: float = DAMPING
    share: float = SHARE
    factors: tuple[float, ...] | None = None
    sweeps: int | None = None


def factors_of(fmt: QuantizedFormat) -> tuple[float, ...]:
    """Factors of the plain scales that are tried."""
    if isinstance(fmt, BlockFP8):
        return _FP8_FACTORS if fmt.scale_fmt == "float32" else (1.0,)
    return _INT_FACTORS if fmt.scale_fmt == "bf16" else _POWERS_OF_TWO


def sweeps_of(fmt: QuantizedFormat) -> int:
    """Sweeps of coordinate descent: of few bits, more of them still help, and new scales before each."""
    return 2 if isinstance(fmt, BlockFP8) else 6


def round_weight(
    weight: torch.Tensor, moments: Moments, fmt: QuantizedFormat, search: Search | None = None
) -> Rounding:
    """Codes and scales of least output error on the calibration tokens.

    Args:
        weight: (N, K); BF16, F16 or F32.
        moments: of its inputs, of at least K tokens.
        fmt: block FP8, or a format below 8 bits.
        search: what to try; None for the defaults.

    Returns:
        codes and scale as `ops.quantize_weight` gives them, or `ops.quantize_group`.

    Raises:
        NonFiniteError: the weight holds NaN or Inf.
        BlockscaleError: wrong dtype or shape, or too few tokens.
    """
    search = search or Search()
    factors = factors_of(fmt) if search.factors is None else search.factors
    _check(weight, moments, fmt, factors)
    plain = plain_points(weight, fmt)
    norm = damped(moments, search.damping)
    target = target_weight(weight, moments, search.damping, search.share)
    found = _round_columns(target, inverse_factor(norm), fmt, factors)
    points = _better_rows(found, plain, target, norm, fmt)
    for _ in range(sweeps_of(fmt) if search.sweeps is None else search.sweeps):
        if fmt.scale_fmt == "bf16":
            points = _rescaled(target, norm, points, fmt)
        points = _sweep(target, norm, points, fmt)
    return stored(points, fmt)


def inverse_factor(norm: torch.Tensor) -> torch.Tensor:
    """float32 (K, K), upper triangular U with U^T U = norm^-1; float64 inside where float32 is not enough.

    Raises:
        BlockscaleError: the norm is not positive definite.
    """
    # With the order of the inputs reversed, the lower Cholesky factor L is an upper one: norm = R R^T,
    # R = flip(L), and U = R^-1. So the inverse itself, and its loss of digits, is never needed.
    for dtype in (torch.float32, torch.float64):
        lower, failed = torch.linalg.cholesky_ex(norm.flip(0, 1).to(dtype))
        if not bool(failed):
            identity = torch.eye(len(norm), dtype=dtype, device=norm.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
    raise BlockscaleError("moments are not positive definite", remedy="use more damping")


def _round_columns(
    target: torch.Tensor, factor: torch.Tensor, fmt: QuantizedFormat, factors: tuple[float, ...]
) -> Points:
    """Steps 1 and 2, of the target (N, K), given U with U^T U = H^-1."""
    work, (rows, side) = target.clone(), block_of(fmt)
    every = torch.arange(len(work), device=work.device)
    codes, scales = [], []
    for start in range(0, target.shape[1], side):
        block, behind = slice(start, start + side), slice(start + side, None)
        # The largest value is that of the columns as they are now, made up for those before them.
        plain = plain_points(work[:, block], fmt).scale
        tried = torch.stack([nearest_scale(plain[:, 0] * each, fmt) for each in factors])
        spread = _of_rows(tried, rows, len(work))[..., None]  # (F, N, 1)
        rounded = ops.round_columns(work[:, block], factor[block, block], spread, side, grid_of(fmt))
        best = _row_block_sums(rounded.loss, rows).argmin(0)  # of (F, ceil(N / rows))
        mine = _of_rows(best, rows, len(work))
        codes.append(rounded.codes[mine, every])
        scales.append(tried.gather(0, best[None])[0])
        work[:, behind] -= rounded.errors[mine, every] @ factor[block, behind]
    return Points(torch.cat(codes, 1), torch.stack(scales, 1))


def _sweep(target: torch.Tensor, norm: torch.Tensor, points: Points, fmt: QuantizedFormat) -> Points:
    """Step 3: every column rounded once more, given all others and the scales."""
    rows, side = block_of(fmt)
    slope = (target - values_of_points(points, fmt)) @ norm
    result = []
    for number, before in enumerate(points.codes.split(side, 1)):
        block = slice(number * side, (number + 1) * side)
        behind = slice(block.stop, None)  # the slopes of the columns before are not looked at again
        scale = _of_rows(points.scale[:, number], rows, len(before))[:, None]
        after = ops.descend_columns(slope[:, block], before, norm[block, block], scale, side, grid_of(fmt))
        slope[:, behind] -= (after * scale - before * scale) @ norm[block, behind]
        result.append(after)
    return Points(torch.cat(result, 1), points.scale)


def _rescaled(target: torch.Tensor, norm: torch.Tensor, points: Points, fmt: QuantizedFormat) -> Points:
    """Step 4: scales (N, G) of least error, given the codes."""
    height, groups = points.scale.shape
    side = block_of(fmt)[1]
    pieces = []
    for rows in torch.arange(height, device=target.device).split(max(1, _VALUES // groups**2)):
        codes, scale = points.codes[rows], points.scale[rows]
        system = torch.stack(
            [
                _group_sums((codes[:, start : start + side] @ norm[start : start + side]) * codes, side)
                for start in range(0, codes.shape[1], side)
            ],
            1,
        )  # (rows, G, G)
        wanted = _group_sums((target[rows] @ norm) * codes, side)
        # A group of zeros keeps its scale, and others nearly keep theirs where codes do not tell.
        hold = 1e-4 * system.diagonal(dim1=1, dim2=2)
        hold = torch.where(hold > 0, hold, torch.ones_like(hold))
        system = system + torch.diag_embed(hold)
        solved = torch.linalg.solve(system, wanted + hold * scale)
        pieces.append(torch.where((solved > 0) & solved.isfinite(), solved, scale))
    found = Points(points.codes, nearest_scale(torch.cat(pieces), fmt))
    return _better_rows(points, found, target, norm, fmt)


def _better_rows(
    first: Points, second: Points, target: torch.Tensor, norm: torch.Tensor, fmt: QuantizedFormat
) -> Points:
    """Of two roundings the better one in every row of blocks, whose rows share scales."""
    side = block_of(fmt)[0]
    losses = [
        _row_block_sums(output_error(target - values_of_points(each, fmt), norm)[None], side)[0]
        for each in (first, second)
    ]
    worse = losses[0] > losses[1]
    rows = worse.repeat_interleave(side)[: len(target), None]
    return Points(
        torch.where(rows, second.codes, first.codes), torch.where(worse[:, None], second.scale, first.scale)
    )


def _group_sums(x: torch.Tensor, side: int) -> torch.Tensor:
    """Sums (N, ceil(K / side)) of runs of `side` columns of x (N, K); the last run is the remainder."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % side))
    return padded.view(len(x), -1, side).sum(2)


def _row_block_sums(x: torch.Tensor, side: int) -> torch.Tensor:
    """The same for each x (F, N): (F, ceil(N / side))."""
    return x if side == 1 else _group_sums(x, side)


def _of_rows(x: torch.Tensor, side: int, rows: int) -> torch.Tensor:
    """Values (..., ceil(N / side)) of blocks as those of rows, (..., N)."""
    return x if side == 1 else x.repeat_interleave(side, -1)[..., :rows]


def _check(weight: torch.Tensor, moments: Moments, fmt: QuantizedFormat, factors: tuple[float, ...]) -> None:
    op = "round_weight"
    if weight.dim() != 2:
        raise BlockscaleError("wrong shape", where=f"{op}: weight", expected="(N, K)", got=list(weight.shape))
    width = weight.shape[1]
    if moments.second.shape[0] != width:
        raise BlockscaleError(
            "wrong width", where=f"{op}: moments", expected=width, got=moments.second.shape[0]
        )
    if moments.tokens < width:
        raise BlockscaleError(
            "too few calibration tokens",
            where=f"{op}: moments",
            expected=f"at least {width}, one for every input of the layer",
            got=moments.tokens,
            remedy="calibrate on more text",
        )
    powers = fmt.scale_fmt != "ue8m0" or all(math.frexp(each)[0] == 0.5 for each in factors)
    if not factors or factors[0] != 1.0 or not min(factors) > 0 or not powers:
        kind = "powers of two" if fmt.scale_fmt == "ue8m0" else "positive numbers"
        raise BlockscaleError("bad factors of scales", expected=f"{kind}, the first of them 1", got=factors)
