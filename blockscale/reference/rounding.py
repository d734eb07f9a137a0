"""The inner loops of calibrated rounding: columns rounded one by one, each making up for what others lost.

All of a block of columns (N, B) is float32, the scales s (.., N, G) are one for each row and run of
`group_size` columns. For j = 0, 1, ..., B - 1, with grid(x) the E4M3 number nearest to x, saturating at 448:

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

from typing import NamedTuple

import torch

from blockscale.errors import BlockscaleError
from blockscale.formats import E4M3_MAX
from blockscale.reference import checks


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
    columns: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, group_size: int
) -> RoundedColumns:
    """Round a block of columns in order, with every candidate for its scales by itself.

    Args:
        columns: w, float32 (N, B), finite.
        factor: U, float32 (B, B); what is below the diagonal is not looked at.
        scale: float32 (F, N, G), F candidates, positive.
        group_size: columns of a row that share a scale; G = ceil(B / group_size).

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
        codes[j] = to_grid(work[j] / spread[j])
        errors[j] = (work[j] - codes[j] * spread[j]) / factor[j, j]
        work[j + 1 :] -= errors[j] * factor[j, j + 1 :, None, None]
        loss += errors[j] * errors[j]
    return RoundedColumns(codes.permute(1, 2, 0).contiguous(), errors.permute(1, 2, 0).contiguous(), loss)


def descend_columns(
    slope: torch.Tensor, codes: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Codes of a block of columns, each the best one given all others and the scales.

    Args:
        slope: g, float32 (N, B), finite.
        codes: q, float32 (N, B), as they are.
        norm: H of these columns, float32 (B, B); what is below the diagonal is not looked at.
        scale: float32 (N, G), positive.
        group_size: columns of a row that share a scale; G = ceil(B / group_size).

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
        result[j] = to_grid((before + work[j] / norm[j, j]) / spread[j])
        change = result[j] * spread[j] - before
        work[j + 1 :] -= change * norm[j, j + 1 :, None]
    return result.T.contiguous()


def to_grid(x: torch.Tensor) -> torch.Tensor:
    """The E4M3 numbers nearest to x, float32; ties to even, saturating, a zero keeps its sign."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


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
