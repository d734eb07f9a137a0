"""Argument checks of the W4A8 GEMMs, made before anything is launched: those of `gemm_checks` for one weight.

They look at shapes, dtypes, strides and devices only, never at values. Each returns the tensor to write to:
`out` if it was given, else a new uninitialized one.
"""

from __future__ import annotations

import torch

from blockscale.errors import BlockscaleError
from blockscale.reference import gemm_checks
from blockscale.reference.w4 import W4Weight


def dense_output(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check the arguments of `w4a8_gemm_nt`. Result: (M, N)."""
    op = "w4a8_gemm_nt"
    _check_operands(op, a, a_scale, b, ("M", "K"), ("N", "K"))
    return gemm_checks.dense_result(op, a, b.shape[0], bias, out_dtype, out)


def contiguous_output(
    a: torch.Tensor, a_scale: torch.Tensor, b: W4Weight, m_indices: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    """Check the arguments of `m_grouped_w4a8_gemm_nt_contiguous`. Result: (M, N)."""
    op = "m_grouped_w4a8_gemm_nt_contiguous"
    _check_operands(op, a, a_scale, b, ("M", "K"), ("E", "N", "K"))
    return gemm_checks.contiguous_result(op, a, b.shape[1], m_indices, out)


def masked_output(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    masked_m: torch.Tensor,
    expected_m: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check the arguments of `m_grouped_w4a8_gemm_nt_masked`. Result: (E, Mmax, N)."""
    op = "m_grouped_w4a8_gemm_nt_masked"
    _check_operands(op, a, a_scale, b, ("E", "Mmax", "K"), ("E", "N", "K"))
    return gemm_checks.masked_result(op, a, b.shape[1], masked_m, expected_m, out)


def _check_operands(
    op: str,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    a_dims: tuple[str, ...],
    b_dims: tuple[str, ...],
) -> None:
    """Codes with their scales, and a weight of the same K (and E) on their device."""
    gemm_checks.check_codes(op, "a", a, a_dims)
    if len(b.shape) != len(b_dims):
        expected = f"({', '.join(b_dims)})"
        raise BlockscaleError("wrong shape", where=f"{op}: b", expected=expected, got=list(b.shape))
    gemm_checks.check_device(op, "b", b.words, a.device)
    gemm_checks.check_sides(op, a, a_scale, b.shape, a_dims)
