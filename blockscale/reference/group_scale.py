"""Scales of groups, shared by the formats below 8 bits: amax over `largest`, rounded to what is stored."""

from __future__ import annotations

import torch

from blockscale.group_formats import MXFP4, GroupInt
from blockscale.reference import checks
from blockscale.reference.fp8 import (
    MIN_WEIGHT_SCALE,
    _block_amax,
    _canonical_nan,
    _divide,
    find_nonfinite,
    round_up_to_power_of_two,
    spread_scale,
)


def scaled_groups(op: str, weight: torch.Tensor, fmt: GroupInt | MXFP4) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / scale in float32, the scale as stored) of a weight (N, K) or (E, N, K).

    Raises:
        NonFiniteError: the weight holds NaN or Inf.
        BlockscaleError: wrong dtype or shape.
    """
    checks.check_weight(op, weight)
    x = weight.detach().to(torch.float32)
    amax = _block_amax(x, (1, fmt.group_size))
    if not bool(amax.isfinite().all()):
        raise checks.non_finite(op, *find_nonfinite(weight), tuple(weight.shape))
    exact = _divide(amax, fmt.largest).clamp_min(MIN_WEIGHT_SCALE)
    exact = torch.where(amax == 0, torch.ones_like(exact), exact)
    if fmt.scale_fmt == "ue8m0":
        exponent = round_up_to_power_of_two(exact).view(torch.int32) >> 23
        scale = exponent.to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scale = exact.to(torch.bfloat16)
    return x / spread_scale(scale.to(torch.float32), (1, fmt.group_size), x.shape), scale


def apply_scale(
    values: torch.Tensor, scale: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Float32 values (..., N, K) times their scales (..., N, ceil(K/G)), rounded once to `dtype`."""
    product = values * spread_scale(scale.to(torch.float32), (1, group_size), values.shape)
    return _canonical_nan(product.to(dtype))
