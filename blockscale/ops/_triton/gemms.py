"""The Triton GEMMs under the names and signatures of `reference.gemm`; arguments have been checked.

Up to 128 rows, where reading the weight is what takes time, the kernel built for that; else tiles.
"""

from __future__ import annotations

import torch

from blockscale.ops._triton import gemm, gemm_grouped, gemm_small_m

_FEW_ROWS = 128


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
    """See `reference.gemm.fp8_gemm_nt`."""
    del out_dtype  # that of `out`
    launch = gemm_small_m.fp8_gemm_nt if a.shape[0] <= _FEW_ROWS else gemm.fp8_gemm_nt
    return launch(a, a_scale, b, b_scale, bias, out)


def m_grouped_fp8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    m_indices: torch.Tensor,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `reference.gemm.m_grouped_fp8_gemm_nt_contiguous`."""
    return gemm.m_grouped_fp8_gemm_nt_contiguous(a, a_scale, b, b_scale, m_indices, out)


def m_grouped_fp8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `reference.gemm.m_grouped_fp8_gemm_nt_masked`."""
    return gemm_grouped.m_grouped_fp8_gemm_nt_masked(a, a_scale, b, b_scale, masked_m, expected_m, out)
