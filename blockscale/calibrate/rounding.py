"""Rounding of a weight to block-scaled E4M3 that minimizes the error of the layer's outputs.

Of the target W' and the norm H of hessian.py, minimize tr((W' - Q) H (W' - Q)^T) over Q = codes * scale.

1. Columns are rounded in order, and what a column loses is made up for by those after it. With
   H^-1 = U^T U, U upper triangular,

       e_j = (w_j - q_j) / U_jj,        w_k -= e_j U_jk  for k > j,

   and the squares of all e_j add up to the error in the norm of H.
2. A block of columns has a few candidates for its scales. All of them are rounded side by side, and each
   scale block keeps the one that loses least: its e_j count what later columns cannot make up for.
3. Sweeps of coordinate descent go over the columns again, each rounded to the grid point that is best given
   all others, q_j + ((W' - Q) H)_j / H_jj: the error never grows.

The result is never worse than plain rounding: a row of blocks that is gets plain rounding and the sweeps
instead. Every code is the reference's cast of a float32 value over its scale, saturating at 448.

Source: GPTQ (Frantar et al., arXiv:2210.17323) for step 1; coordinate descent as in QuantEase
(arXiv:2309.01885).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from blockscale import ops
from blockscale.calibrate.hessian import DAMPING, SHARE, Moments, damped, output_error, target_weight
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8, ScaleFmt
from blockscale.reference.fp8 import MIN_WEIGHT_SCALE

# Factors of the scale that the largest value of a block asks for. E4M3 is a floating format: another power of
# two rounds to the same values, but for those that saturate or become subnormal.
FACTORS: dict[ScaleFmt, tuple[float, ...]] = {
    "float32": (1.0, 0.9, 1.1, 1.25, 1.5),
    "ue8m0": (1.0,),
}


class Rounding(NamedTuple):
    """Codes, float8_e4m3fn (N, K), and scale of a weight, as reference.quantize_weight gives them."""

    codes: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class Search:
    """What is tried to make the error small.

    Attributes:
        damping: of the norm; see hessian.py.
        share: of the difference between original and quantized inputs that weights make up for.
        factors: of the plain scales, tried for every block; the first must be 1. None takes FACTORS.
        sweeps: of coordinate descent after the columns are rounded.
    """

    damping: float = DAMPING
    share: float = SHARE
    factors: tuple[float, ...] | None = None
    sweeps: int = 2


def round_weight(
    weight: torch.Tensor, moments: Moments, fmt: BlockFP8, search: Search | None = None
) -> Rounding:
    """Codes and scales of least output error on the calibration tokens.

    Args:
        weight: (N, K); BF16, F16 or F32.
        moments: of its inputs, of at least K tokens.
        fmt: block size and scale format.
        search: what to try; None for the defaults.

    Returns:
        codes, float8_e4m3fn (N, K), and scale, float32 (ceil(N/block_n), ceil(K/block_k)), as
        reference.quantize_weight gives them.

    Raises:
        NonFiniteError: the weight holds NaN or Inf.
        BlockscaleError: wrong dtype or shape, or too few tokens.
    """
    search = search or Search()
    factors = FACTORS[fmt.scale_fmt] if search.factors is None else search.factors
    _check(weight, moments, fmt, factors)
    plain = ops.quantize_weight(weight, fmt.block_size, fmt.scale_fmt)
    norm = damped(moments, search.damping)
    target = target_weight(weight, moments, search.damping, search.share)
    found = _round_columns(target, inverse_factor(norm), fmt, factors)
    codes, scale = _better_rows(found, plain, target, norm, fmt)
    for _ in range(search.sweeps):
        codes = _sweep(target, norm, codes, scale, fmt)
    return Rounding(codes, scale)


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
    target: torch.Tensor, factor: torch.Tensor, fmt: BlockFP8, factors: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps 1 and 2: codes and scale of the target (N, K), given U with U^T U = H^-1."""
    work, side = target.clone(), fmt.block_size[1]
    every = torch.arange(len(work), device=work.device)
    codes, scales = [], []
    for start in range(0, target.shape[1], side):
        block, behind = slice(start, start + side), slice(start + side, None)
        # The largest value is that of the columns as they are now, made up for those before them.
        _, plain = ops.quantize_weight(work[:, block], fmt.block_size, fmt.scale_fmt)
        tried = torch.stack([(plain[:, 0] * each).clamp_min(MIN_WEIGHT_SCALE) for each in factors])
        rows = _of_rows(tried, fmt, len(work))[..., None]  # (F, N, 1)
        rounded = ops.round_columns(work[:, block], factor[block, block], rows, side)
        losses = _row_block_sums(rounded.loss, fmt.block_size[0])  # (F, ceil(N/bn))
        best = losses.argmin(0)
        mine = _of_rows(best, fmt, len(work))
        codes.append(rounded.codes[mine, every].to(torch.float8_e4m3fn))
        scales.append(tried.gather(0, best[None])[0])
        work[:, behind] -= rounded.errors[mine, every] @ factor[block, behind]
    return torch.cat(codes, 1), torch.stack(scales, 1)


def _sweep(
    target: torch.Tensor, norm: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, fmt: BlockFP8
) -> torch.Tensor:
    """Step 3: codes after every column was rounded once more, given all others and the scales."""
    side = fmt.block_size[1]
    slope = (target - ops.dequantize_weight(codes, scale, fmt.block_size, torch.float32)) @ norm
    result = []
    for number, before in enumerate(codes.float().split(side, 1)):
        block = slice(number * side, (number + 1) * side)
        behind = slice(block.stop, None)  # the slopes of the columns before are not looked at again
        rows = _of_rows(scale[:, number], fmt, len(codes))[:, None]
        after = ops.descend_columns(slope[:, block], before, norm[block, block], rows, side)
        slope[:, behind] -= (after * rows - before * rows) @ norm[block, behind]
        result.append(after)
    return torch.cat(result, 1).to(codes.dtype)


def _better_rows(
    found: tuple[torch.Tensor, torch.Tensor],
    plain: tuple[torch.Tensor, torch.Tensor],
    target: torch.Tensor,
    norm: torch.Tensor,
    fmt: BlockFP8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two roundings (codes, scale) the better one in every row of blocks; its rows share scales."""
    side = fmt.block_size[0]
    losses = []
    for codes, scale in (found, plain):
        values = ops.dequantize_weight(codes, scale, fmt.block_size, torch.float32)
        losses.append(_row_block_sums(output_error(target - values, norm)[None], side)[0])
    worse = losses[0] > losses[1]
    rows = worse.repeat_interleave(side)[: len(target), None]
    codes = torch.where(rows, plain[0].float(), found[0].float()).to(found[0].dtype)
    return codes, torch.where(worse[:, None], plain[1], found[1])


def _row_block_sums(x: torch.Tensor, side: int) -> torch.Tensor:
    """Sums (F, ceil(N/side)) of runs of `side` values of x (F, N); the last run is the remainder."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % side))
    return padded.view(len(x), -1, side).sum(2)


def _of_rows(x: torch.Tensor, fmt: BlockFP8, rows: int) -> torch.Tensor:
    """Values (..., ceil(N/block_n)) of blocks as those of rows, (..., N)."""
    return x.repeat_interleave(fmt.block_size[0], -1)[..., :rows]


def _check(weight: torch.Tensor, moments: Moments, fmt: BlockFP8, factors: tuple[float, ...]) -> None:
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
