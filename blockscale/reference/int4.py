"""Symmetric integers of 4 and 3 bits in groups along K, in plain PyTorch: the truth for `GroupInt`.

    scale = max(amax / 7, 2**-126), rounded to bf16 or up to a power of two        amax / 3 for 3 bits
    codes = round to nearest even of x / scale, clamped to -7 to 7                 -3 to 3
    x    ~= codes * scale

Rounding rules: `GroupInt`. Weights (N, K) or (E, N, K), scales (..., N, ceil(K / G)).
"""

from __future__ import annotations

import torch

from blockscale.group_formats import GroupInt, group_scale_shape
from blockscale.reference import checks
from blockscale.reference.group_scale import apply_scale, scaled_groups


def quantize_int(weight: torch.Tensor, fmt: GroupInt) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8 of the weight's shape, and scales as stored, (..., N, ceil(K / G)).

    Args:
        weight: (N, K) or (E, N, K); BF16, F16 or F32; any dimension may be zero.
        fmt: bits, group size and scale format.

    Raises:
        NonFiniteError: the weight holds NaN or Inf.
        BlockscaleError: wrong dtype or shape.
    """
    quotient, scale = scaled_groups("quantize_int", weight, fmt)
    return quotient.round().clamp(-fmt.largest, fmt.largest).to(torch.int8), scale


def dequantize_int(
    codes: torch.Tensor, scale: torch.Tensor, fmt: GroupInt, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """codes * scale in float32, rounded once to `dtype`; a NaN scale gives NaN, overflow gives Inf.

    Args:
        codes: int8 (N, K) or (E, N, K).
        scale: (..., N, ceil(K / G)); float32, bfloat16 or float8_e8m0fnu.
        fmt: for its group size.
        dtype: of the result: bfloat16, float16 or float32.
    """
    op = "dequantize_int"
    checks.check_dtype(f"{op}: codes", codes.dtype, (torch.int8,))
    checks.check_dtype(f"{op}: scale", scale.dtype, checks.SCALE_DTYPES)
    checks.check_dtype(f"{op}: dtype", dtype, checks.HIGH_PRECISION)
    checks.check_shape(f"{op}: scale", scale.shape, group_scale_shape(tuple(codes.shape), fmt))
    return apply_scale(codes.to(torch.float32), scale, fmt.group_size, dtype)
