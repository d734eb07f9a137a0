"""GEMMs of four-bit weights and E4M3 activations: dense, and grouped by expert as the FP8 ones are.

    out[m, n] = sum_g a_scale[m, g] * w_scale[n, g] * (sum_{k in g} a[m, k] * w[n, k]) + bias[n]

Weights are prepared once, by `prepare_w4`. Shapes, layouts and rounding are those of
`blockscale.reference.w4a8`, from which every backend differs in rounding only (`metrics.calc_diff` < 1e-5).
Hopper runs Triton; everything else dequantizes (`_dequantized_w4a8`). Nothing here waits for the GPU, except
the dequantizing contiguous form.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch

from blockscale.errors import BlockscaleError
from blockscale.ops import gemm_dispatch
from blockscale.reference import w4a8_checks
from blockscale.reference.w4 import W4Weight

W4A8Backend = Literal["auto", "dequantized", "triton"]


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
    """(a * a_scale) @ b^T + bias.

    Args:
        a: (M, K), float8_e4m3fn, row-major; M may be 0.
        a_scale: (M, ceil(K/128)), float32; fastest in column-major order, as
            `quantize_activation(..., scale_layout="column")` writes it.
        b: prepared weight (N, K); N and K multiples of 16.
        bias: (N,), float32 or bfloat16, added in float32.
        out_dtype: of the result: bfloat16 or float32.
        out: (M, N) of `out_dtype`, contiguous, to write to.
        backend: "auto" takes what is fastest for the device.

    Returns:
        (M, N); `out` itself if it was given.

    Raises:
        BlockscaleError: wrong dtype, shape, layout or device of an argument, or a backend that cannot run.
    """
    out = w4a8_checks.dense_output(a, a_scale, b, bias, out_dtype, out)
    if out.numel():
        _module(a.device, backend).w4a8_gemm_nt(a, a_scale, b, bias, out)
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
    """Every row of `a` times the weight of its own expert; rows of an expert stand together.

    Rows are laid out as for `m_grouped_fp8_gemm_nt_contiguous`: segments of a multiple of 128.

    Args:
        a: (M, K), float8_e4m3fn, row-major; M a multiple of 128.
        a_scale: (M, ceil(K/128)), float32; fastest in column-major order.
        b: prepared weight (E, N, K); N and K multiples of 16.
        m_indices: (M,), int32, the expert of every row, or -1 for padding, which may hold anything.
        out: (M, N), bfloat16 (the default) or float32, contiguous, to write to.
        backend: "auto" takes what is fastest for the device.

    Returns:
        (M, N); `out` itself if it was given. Padding rows of it are undefined.

    Raises:
        BlockscaleError: wrong dtype, shape, layout or device of an argument, or a backend that cannot run.
    """
    out = w4a8_checks.contiguous_output(a, a_scale, b, m_indices, out)
    if out.numel():
        run = _module(a.device, backend).m_grouped_w4a8_gemm_nt_contiguous
        run(a, a_scale, b, m_indices, out)
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
    """The first `masked_m[e]` rows of every expert's `a` times its weight; other rows are not written.

    Args:
        a: (E, Mmax, K), float8_e4m3fn, row-major.
        a_scale: (E, Mmax, ceil(K/128)), float32; fastest in column-major order within an expert.
        b: prepared weight (E, N, K); N and K multiples of 16.
        masked_m: (E,), int32, rows of every expert that count, on the device: it is not read by the host.
        expected_m: typical value in `masked_m`: a hint to choose a kernel by, without effect on the result.
        out: (E, Mmax, N), bfloat16 (the default) or float32, contiguous, to write to.
        backend: "auto" takes what is fastest for the device.

    Returns:
        (E, Mmax, N); `out` itself if it was given, else rows from masked_m[e] on are uninitialized.

    Raises:
        BlockscaleError: wrong dtype, shape, layout or device of an argument, or a backend that cannot run.
    """
    out = w4a8_checks.masked_output(a, a_scale, b, masked_m, expected_m, out)
    if out.numel():
        run = _module(a.device, backend).m_grouped_w4a8_gemm_nt_masked
        run(a, a_scale, b, masked_m, expected_m, out)
    return out


def _module(device: torch.device, backend: W4A8Backend) -> ModuleType:
    """Where the implementations are that run on a device."""
    from blockscale.ops import _dequantized_w4a8

    if backend == "dequantized":
        return _dequantized_w4a8
    if backend not in ("auto", "triton"):
        raise BlockscaleError(
            "unknown backend",
            where="W4A8: backend",
            expected="auto | dequantized | triton",
            got=repr(backend),
        )
    if backend == "auto" and not gemm_dispatch.has_fp8(device):
        return _dequantized_w4a8
    try:
        from blockscale.ops._triton import w4a8s
    except ImportError as error:
        if backend == "auto":
            return _dequantized_w4a8
        raise BlockscaleError(
            "backend triton is not available", where="W4A8: backend", got=error, remedy="use 'auto'"
        ) from error
    return w4a8s
