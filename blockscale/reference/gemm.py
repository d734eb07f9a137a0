"""Block-scaled FP8 GEMMs in plain PyTorch: the truth of every faster implementation.

    out[m, n] = sum_k (a[m, k] * a_scale[m, k // 128]) * (b[n, k] * b_scale[n // 128, k // 128]) + bias[n]

"nt": a is (M, K) and b is (N, K), both row-major E4M3, so the product is a @ b^T. N and K are multiples of
16; the last block of a ragged dimension is the remainder (K = 576 has G = 5 groups, the last of 64). a_scale
(M, G) may have any strides (the kernels are fastest on strides (1, M rounded up to 4)), b_scale (ceil(N/128),
G) is contiguous. Rounding rule: operands are dequantized to float32, multiplied and summed in float32, and
the sum plus bias is rounded once, to nearest even, to the dtype of the result.

Faster implementations sum the products of one group of 128 first and scale that partial sum by
a_scale * b_scale, which differs from this in rounding only: `metrics.calc_diff` < 1e-5.
Source of the scheme: DeepSeek-V3 technical report, section 3.3.2.
"""

from __future__ import annotations

import torch

from blockscale.reference import gemm_checks
from blockscale.reference.fp8 import dequantize_activation, dequantize_weight


def fp8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(a * a_scale) @ (b * b_scale)^T + bias.

    Args:
        a: (M, K), float8_e4m3fn, row-major; M may be 0.
        a_scale: (M, ceil(K/128)), float32, any strides.
        b: (N, K), float8_e4m3fn, row-major; N and K multiples of 16.
        b_scale: (ceil(N/128), ceil(K/128)), float32, contiguous.
        bias: (N,), float32 or bfloat16, added in float32.
        out_dtype: of the result: bfloat16 or float32.
        out: (M, N) of `out_dtype`, contiguous, to write to.

    Returns:
        (M, N); `out` itself if it was given.

    Raises:
        BlockscaleError: wrong dtype, shape, layout or device of an argument.
    """
    out = gemm_checks.dense_output((a, a_scale, b, b_scale), bias, out_dtype, out)
    product = _product(a, a_scale, b, b_scale)
    return out.copy_(product if bias is None else product + bias.to(torch.float32))


def m_grouped_fp8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    m_indices: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every row of `a` times the weight of its own expert; rows of an expert stand together.

    The segment of every expert is padded at its end to a multiple of 128 rows, so that 128 rows from a
    multiple of 128 on have one expert, and those that count stand before padding. Padding rows may hold
    anything; their results are zeros.

    Args:
        a: (M, K), float8_e4m3fn, row-major; M a multiple of 128.
        a_scale: (M, ceil(K/128)), float32, any strides.
        b: (E, N, K), float8_e4m3fn, row-major; N and K multiples of 16.
        b_scale: (E, ceil(N/128), ceil(K/128)), float32, contiguous.
        m_indices: (M,), int32, the expert of every row, or -1 for padding.
        out: (M, N), bfloat16 (the default) or float32, contiguous, to write to.

    Returns:
        (M, N); `out` itself if it was given.

    Raises:
        BlockscaleError: wrong dtype, shape, layout or device of an argument.

    Source: the contract of DeepGEMM's function of this name.
    """
    out = gemm_checks.contiguous_output((a, a_scale, b, b_scale), m_indices, out)
    out.zero_()
    for expert in range(b.shape[0]):
        rows = (m_indices == expert).nonzero().squeeze(1)
        out[rows] = _product(a[rows], a_scale[rows], b[expert], b_scale[expert]).to(out.dtype)
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
) -> torch.Tensor:
    """The first `masked_m[e]` rows of every expert's `a` times its weight; other rows are not written.

    Args:
        a: (E, Mmax, K), float8_e4m3fn, row-major.
        a_scale: (E, Mmax, ceil(K/128)), float32, any strides.
        b: (E, N, K), float8_e4m3fn, row-major; N and K multiples of 16.
        b_scale: (E, ceil(N/128), ceil(K/128)), float32, contiguous.
        masked_m: (E,), int32, rows of every expert that count, on the device: it is not read by the host.
        expected_m: typical value in `masked_m`: a hint to choose a kernel by, without effect on the result.
        out: (E, Mmax, N), bfloat16 (the default) or float32, contiguous, to write to.

    Returns:
        (E, Mmax, N); `out` itself if it was given, else rows from masked_m[e] on are uninitialized.

    Raises:
        BlockscaleError: wrong dtype, shape, layout or device of an argument.

    Source: the contract of DeepGEMM's function of this name.
    """
    out = gemm_checks.masked_output((a, a_scale, b, b_scale), masked_m, expected_m, out)
    row = torch.arange(a.shape[1], device=a.device)
    for expert in range(a.shape[0]):
        product = _product(a[expert], a_scale[expert], b[expert], b_scale[expert]).to(out.dtype)
        out[expert] = torch.where((row < masked_m[expert])[:, None], product, out[expert])
    return out


def _product(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """float32 (M, N)."""
    rows = dequantize_activation(a, a_scale, dtype=torch.float32)
    return rows @ dequantize_weight(b, b_scale, dtype=torch.float32).T
