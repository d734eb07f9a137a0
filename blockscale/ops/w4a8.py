"""The W4A8 GEMMs as the package offers them: `w4a8_gemm` computes, here audits and `torch.compile` look on.

Arguments, results and errors are those of the functions of the same names in `blockscale.ops.w4a8_gemm`.
"""

from __future__ import annotations

import torch

from blockscale.ops import gemm_audit, w4a8_gemm
from blockscale.ops.w4a8_gemm import W4A8Backend
from blockscale.reference.w4 import W4Weight


def w4a8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    backend: W4A8Backend = "auto",
) -> torch.Tensor:
    """(a * a_scale) @ b^T + bias: (M, K) times (N, K), see `w4a8_gemm.w4a8_gemm_nt`."""
    if _is_traced(a, b, out):
        op = torch.ops.blockscale.w4a8_gemm_nt
        return op(a, a_scale, b.words, b.scale, b.kind, bias, out_dtype, backend)
    out = w4a8_gemm.w4a8_gemm_nt(a, a_scale, b, bias=bias, out_dtype=out_dtype, out=out, backend=backend)
    if gemm_audit.current is not None and out.numel():
        gemm_audit.current.dense((a, a_scale, b), out, bias)
    return out


def m_grouped_w4a8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    m_indices: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    backend: W4A8Backend = "auto",
) -> torch.Tensor:
    """Rows (M, K) times the weight of their own expert, see `w4a8_gemm`."""
    if _is_traced(a, b, out):
        op = torch.ops.blockscale.m_grouped_w4a8_gemm_nt_contiguous
        return op(a, a_scale, b.words, b.scale, b.kind, m_indices, backend)
    out = w4a8_gemm.m_grouped_w4a8_gemm_nt_contiguous(a, a_scale, b, m_indices, out=out, backend=backend)
    if gemm_audit.current is not None and out.numel():
        gemm_audit.current.contiguous((a, a_scale, b), out, m_indices)
    return out


def m_grouped_w4a8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    out: torch.Tensor | None = None,
    backend: W4A8Backend = "auto",
) -> torch.Tensor:
    """The first `masked_m[e]` rows of every expert's (Mmax, K) times its weight, see `w4a8_gemm`."""
    if _is_traced(a, b, out):
        op = torch.ops.blockscale.m_grouped_w4a8_gemm_nt_masked
        return op(a, a_scale, b.words, b.scale, b.kind, masked_m, expected_m, backend)
    run = w4a8_gemm.m_grouped_w4a8_gemm_nt_masked
    out = run(a, a_scale, b, masked_m, expected_m, out=out, backend=backend)
    if gemm_audit.current is not None and out.numel():
        gemm_audit.current.masked((a, a_scale, b), out, masked_m)
    return out


def _is_traced(a: torch.Tensor, b: W4Weight, out: torch.Tensor | None) -> bool:
    """Whether the operator is to stand for a call; it does not know a weight's K, which is that of `a`."""
    return torch.compiler.is_compiling() and out is None and a.shape[-1] == b.width
