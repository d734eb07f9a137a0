"""cuBLASLt's block-scaled FP8 GEMM through `torch.nn.functional.scaled_mm`: SM90, CUDA 12.9 or newer, M > 1.

It wants a_scale column-major, and the columns of b_scale padded to a multiple of 4 of K's groups. It
allocates its result, which is then copied to the caller's.
"""

from __future__ import annotations

import torch
from torch.nn.functional import ScalingType, SwizzleType, pad, scaled_mm

from blockscale.errors import BlockscaleError


def fp8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor,
) -> torch.Tensor:
    """`ops.fp8_gemm_nt`; `out` is always given.

    Raises:
        BlockscaleError: one row, or K not a multiple of 128: cuBLASLt refuses both.
    """
    m, k = a.shape
    if m == 1 or k % 128:
        raise BlockscaleError(
            "cuBLASLt has no kernel for this size",
            where="fp8_gemm_nt: backend cublas",
            expected="M > 1 and K a multiple of 128",
            got=f"M = {m}, K = {k}",
            remedy="use backend='auto'",
        )
    columns = a_scale if a_scale.stride(0) == 1 else a_scale.t().contiguous().t()
    product = multiply(a, columns, b, padded_scale(b_scale), out_dtype)
    return torch.add(product, bias, out=out) if bias is not None else out.copy_(product)


def padded_scale(b_scale: torch.Tensor) -> torch.Tensor:
    """The scales of a weight in cuBLASLt's layout: (groups of K padded to a multiple of 4, blocks of N)."""
    return pad(b_scale, (0, -b_scale.shape[1] % 4)).t()


def multiply(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The product of (M, K) and (N, K) with column-major a_scale and padded b_scale, in `dtype`."""
    return scaled_mm(
        a,
        b.t(),
        a_scale,
        ScalingType.BlockWise1x128,
        b_scale,
        ScalingType.BlockWise128x128,
        swizzle_a=SwizzleType.NO_SWIZZLE,
        swizzle_b=SwizzleType.NO_SWIZZLE,
        output_dtype=dtype,
    )
