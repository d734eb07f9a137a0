"""Block-scaled FP8 GEMMs: dense, and grouped by expert with contiguous or with masked rows.

    out[m, n] = sum_k (a[m, k] * a_scale[m, k // 128]) * (b[n, k] * b_scale[n // 128, k // 128]) + bias[n]

Shapes, layouts and rounding are those of `blockscale.reference.gemm`, from which every backend differs in
rounding only (`metrics.calc_diff` < 1e-5). Nothing here waits for the GPU, and nothing is tuned at call time.
"""

from __future__ import annotations

import torch

from blockscale.ops import gemm_audit, gemm_dispatch
from blockscale.ops.gemm_audit_figures import FP8Weight
from blockscale.ops.gemm_dispatch import GemmBackend
from blockscale.reference import gemm_checks


def fp8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    backend: GemmBackend = "auto",
) -> torch.Tensor:
    """(a * a_scale) @ (b * b_scale)^T + bias.

    Args:
        a: (M, K), float8_e4m3fn, row-major; M may be 0.
        a_scale: (M, ceil(K/128)), float32; fastest in column-major order, as
            `quantize_activation(..., scale_layout="column")` writes it.
        b: (N, K), float8_e4m3fn, row-major; N and K multiples of 16.
        b_scale: (ceil(N/128), ceil(K/128)), float32, contiguous.
        bias: (N,), float32 or bfloat16, added in float32.
        out_dtype: of the result: bfloat16 or float32.
        out: (M, N) of `out_dtype`, contiguous, to write to.
        backend: "auto" takes what is fastest for the device and the sizes.

    Returns:
        (M, N); `out` itself if it was given.

    Raises:
        BlockscaleError: wrong dtype, shape, layout or device of an argument, or a backend that cannot run.
    """
    if torch.compiler.is_compiling() and out is None:
        return torch.ops.blockscale.fp8_gemm_nt(a, a_scale, b, b_scale, bias, out_dtype, backend)
    out = gemm_checks.dense_output((a, a_scale, b, b_scale), bias, out_dtype, out)
    if out.numel():
        sizes = a.shape[0], b.shape[0], b.shape[1]
        run = gemm_dispatch.implementation("fp8_gemm_nt", a.device, sizes, backend)
        run(a, a_scale, b, b_scale, bias=bias, out_dtype=out_dtype, out=out)
        if gemm_audit.current is not None:
            gemm_audit.current.dense((a, a_scale, FP8Weight(b, b_scale)), out, bias)
    return out


def m_grouped_fp8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    m_indices: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    backend: GemmBackend = "auto",
) -> torch.Tensor:
    """Every row of `a` times the weight of its own expert; rows of an expert stand together.

    The segment of every expert is padded at its end to a multiple of 128 rows, so that 128 rows from a
    multiple of 128 on have one expert, and those that count stand before padding (`moe_permute` makes such
    segments).

    Args:
        a: (M, K), float8_e4m3fn, row-major; M a multiple of 128.
        a_scale: (M, ceil(K/128)), float32; fastest in column-major order.
        b: (E, N, K), float8_e4m3fn, row-major; N and K multiples of 16.
        b_scale: (E, ceil(N/128), ceil(K/128)), float32, contiguous.
        m_indices: (M,), int32, the expert of every row, or -1 for padding, which may hold anything.
        out: (M, N), bfloat16 (the default) or float32, contiguous, to write to.
        backend: "auto" takes what is fastest for the device and the sizes.

    Returns:
        (M, N); `out` itself if it was given. Padding rows of it are undefined.

    Raises:
        BlockscaleError: wrong dtype, shape, layout or device of an argument, or a backend that cannot run.
    """
    if torch.compiler.is_compiling() and out is None:
        return torch.ops.blockscale.m_grouped_fp8_gemm_nt_contiguous(
            a, a_scale, b, b_scale, m_indices, backend
        )
    out = gemm_checks.contiguous_output((a, a_scale, b, b_scale), m_indices, out)
    if out.numel():
        sizes = a.shape[0], b.shape[1], b.shape[2]
        run = gemm_dispatch.implementation("m_grouped_fp8_gemm_nt_contiguous", a.device, sizes, backend)
        run(a, a_scale, b, b_scale, m_indices, out=out)
        if gemm_audit.current is not None:
            gemm_audit.current.contiguous((a, a_scale, FP8Weight(b, b_scale)), out, m_indices)
    return out


def m_grouped_fp8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    out: torch.Tensor | None = None,
    backend: GemmBackend = "auto",
) -> torch.Tensor:
    """The first `masked_m[e]` rows of every expert's `a` times its weight; other rows are not written.

    Args:
        a: (E, Mmax, K), float8_e4m3fn, row-major.
        a_scale: (E, Mmax, ceil(K/128)), float32; fastest in column-major order within an expert.
        b: (E, N, K), float8_e4m3fn, row-major; N and K multiples of 16.
        b_scale: (E, ceil(N/128), ceil(K/128)), float32, contiguous.
        masked_m: (E,), int32, rows of every expert that count, on the device: it is not read by the host.
        expected_m: typical value in `masked_m`: a hint to choose a kernel by, without effect on the result.
        out: (E, Mmax, N), bfloat16 (the default) or float32, contiguous, to write to.
        backend: "auto" takes what is fastest for the device and the sizes.

    Returns:
        (E, Mmax, N); `out` itself if it was given, else rows from masked_m[e] on are uninitialized.

    Raises:
        BlockscaleError: wrong dtype, shape, layout or device of an argument, or a backend that cannot run.
    """
    if torch.compiler.is_compiling() and out is None:
        return torch.ops.blockscale.m_grouped_fp8_gemm_nt_masked(
            a, a_scale, b, b_scale, masked_m, expected_m, backend
        )
    out = gemm_checks.masked_output((a, a_scale, b, b_scale), masked_m, expected_m, out)
    if out.numel():
        sizes = expected_m, b.shape[1], b.shape[2]
        run = gemm_dispatch.implementation("m_grouped_fp8_gemm_nt_masked", a.device, sizes, backend)
        run(a, a_scale, b, b_scale, masked_m, expected_m, out=out)
        if gemm_audit.current is not None:
            gemm_audit.current.masked((a, a_scale, FP8Weight(b, b_scale)), out, masked_m)
    return out
