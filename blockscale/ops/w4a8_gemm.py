"""GEMMs of four-bit weights and E4M3 activations: dense, and grouped by expert as the FP8 ones are.

    out[m, n] = sum_g a_scale[m, g] * w_scale[n, g] * (sum_{k in g} a[m, k] * w[n, k]) + bias[n]

Weights are prepared once, by `prepare_w4`. Shapes, layouts and rounding are those of
`blockscale.reference.w4a8`, from which every backend differs in rounding only (`metrics.calc_diff` < 1e-5).
Hopper runs CUDA C++ where there are many rows, and Triton where there are few, as other GPUs with FP8
arithmetic do; everything else dequantizes (`_dequantized_w4a8`). Nothing here waits for the GPU, except the
dequantizing contiguous form.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Literal

import torch

from blockscale.errors import BlockscaleError
from blockscale.ops import gemm_audit, gemm_dispatch
from blockscale.reference import w4a8_checks
from blockscale.reference.w4 import W4Weight

W4A8Backend = Literal["auto", "dequantized", "triton", "cuda"]
# Up to so many rows Triton's kernels measured faster on an H100. Of contiguous rows the host does not know
# how many count, and CUDA C++ is never much slower.
_FEW_ROWS = 32
_MODULES = {
    "dequantized": "blockscale.ops._dequantized_w4a8",
    "triton": "blockscale.ops._triton.w4a8s",
    "cuda": "blockscale.ops._cuda.w4a8_gemm",
}


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
    if _is_traced(a, b, out):
        op = torch.ops.blockscale.w4a8_gemm_nt
        return op(a, a_scale, b.words, b.scale, b.kind, bias, out_dtype, backend)
    out = w4a8_checks.dense_output(a, a_scale, b, bias, out_dtype, out)
    if out.numel():
        implementation(a.device, a.shape[0] > _FEW_ROWS, backend).w4a8_gemm_nt(a, a_scale, b, bias, out)
        if gemm_audit.current is not None:
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
    """Every row of `a` times the weight of its own expert; rows of an expert stand together.

    Rows are laid out as for `m_grouped_fp8_gemm_nt_contiguous`: segments of a multiple of 128, in which rows
    that count stand before padding. Kernels rely on it: what stands behind padding may be left out.

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
    if _is_traced(a, b, out):
        op = torch.ops.blockscale.m_grouped_w4a8_gemm_nt_contiguous
        return op(a, a_scale, b.words, b.scale, b.kind, m_indices, backend)
    out = w4a8_checks.contiguous_output(a, a_scale, b, m_indices, out)
    if out.numel():
        run = implementation(a.device, True, backend).m_grouped_w4a8_gemm_nt_contiguous
        run(a, a_scale, b, m_indices, out)
        if gemm_audit.current is not None:
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
    if _is_traced(a, b, out):
        op = torch.ops.blockscale.m_grouped_w4a8_gemm_nt_masked
        return op(a, a_scale, b.words, b.scale, b.kind, masked_m, expected_m, backend)
    out = w4a8_checks.masked_output(a, a_scale, b, masked_m, expected_m, out)
    if out.numel():
        run = implementation(a.device, expected_m > _FEW_ROWS, backend).m_grouped_w4a8_gemm_nt_masked
        run(a, a_scale, b, masked_m, expected_m, out)
        if gemm_audit.current is not None:
            gemm_audit.current.masked((a, a_scale, b), out, masked_m)
    return out


def _is_traced(a: torch.Tensor, b: W4Weight, out: torch.Tensor | None) -> bool:
    """Whether the operator is to stand for a call; it does not know a weight's K, which is that of `a`."""
    return torch.compiler.is_compiling() and out is None and a.shape[-1] == b.width


def implementation(device: torch.device, many: bool, backend: W4A8Backend) -> ModuleType:
    """Where the functions are that run on a device; many: for many rows.

    Raises:
        BlockscaleError: a backend that is unknown or cannot run.
    """
    if backend == "auto":
        candidates = _candidates(device, many)
    elif backend in _MODULES:
        candidates = (backend,)
    else:
        expected = " | ".join(("auto", *_MODULES))
        raise BlockscaleError("unknown backend", where="W4A8: backend", expected=expected, got=repr(backend))
    reason = ""
    for name in candidates:
        reason = gemm_dispatch.unfit(name, device) or ""
        module, error = (None, reason) if reason else _load(name)
        if module is not None:
            return module
        reason = error
    raise BlockscaleError(
        f"backend {backend} is not available", where="W4A8: backend", got=reason, remedy="use 'auto'"
    )


def _candidates(device: torch.device, many: bool) -> tuple[str, ...]:
    """Backends for a device, the best first."""
    if not gemm_dispatch.has_fp8(device):
        return ("dequantized",)
    return ("cuda", "triton", "dequantized") if many else ("triton", "dequantized")


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """The implementations of a backend, or None and why there are none."""
    try:
        return importlib.import_module(_MODULES[name]), ""
    except ImportError as error:
        return None, str(error)
