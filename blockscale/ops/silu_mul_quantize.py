"""SwiGLU, and its quantization on the way: the fast forms of those of `blockscale.reference.fused`."""

from __future__ import annotations

import math

import torch

from blockscale.formats import ScaleFmt, activation_format
from blockscale.ops import dispatch, gemm_audit
from blockscale.ops.quantize_activation import quantize_activation, rows_of_scale
from blockscale.reference import fused
from blockscale.reference.fp8 import ScaleLayout, empty_scale

_OP = "silu_mul_quantize"
_ANY_GROUP = 128  # how a row is cut where nothing is quantized


def silu_mul_quantize(
    x: torch.Tensor,
    group_size: int = 128,
    scale_fmt: ScaleFmt = "float32",
    scale_layout: ScaleLayout = "row",
    *,
    rows: torch.Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes and float32 scales of silu(gate) * up, one pass over memory on the GPU.

    silu in float32, the product rounded to the dtype of x, then as quantize_activation.

    Args:
        x: (..., 2I), gate and up side by side; BF16, F16 or F32; need not be contiguous.
        group_size: G; the last group of a row is the remainder.
        scale_fmt: "float32", or "ue8m0" for scales rounded up to powers of two.
        scale_layout: "row" or "column", as quantize_activation.
        rows: int32, any shape: the only rows of a two-dimensional x that need results (negative ones are
            passed over); what the others get is undefined. `positions` of a permutation are such rows.
        backend: "auto" takes the fastest that works for the tensor's device.

    Returns:
        codes, float8_e4m3fn (..., I), and scale, float32 (..., ceil(I/G)).

    Raises:
        BlockscaleError: wrong dtype or shape, unknown scale format or backend.
    """
    fused.check_gate_up(_OP, x)
    fmt = activation_format(group_size, scale_fmt)
    kernels = dispatch.triton_kernels(_OP, _OP, x.device, backend)
    if kernels is None or group_size > kernels.LARGEST_GROUP:
        y = fused.silu_mul(x)
        return quantize_activation(y, group_size, fmt.scale_fmt, scale_layout, backend=backend)
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = empty_scale((*shape[:-1], math.ceil(shape[-1] / group_size)), scale_layout, x.device)
    if codes.numel():
        q, s = codes.view(-1, shape[-1]), rows_of_scale(scale)
        chosen = None if rows is None else rows.contiguous()
        kernels.silu_mul_quantize(dispatch.as_rows(x), q, s, group_size, fmt.scale_fmt == "ue8m0", chosen)
        if gemm_audit.current is not None:
            gemm_audit.current.remember(codes, fused.silu_mul(x))
    return codes, scale


def silu_mul(
    x: torch.Tensor, *, rows: torch.Tensor | None = None, backend: dispatch.Backend = "auto"
) -> torch.Tensor:
    """silu(gate) * up in float32, rounded to the dtype of x; one pass over memory on the GPU.

    Args:
        x: (..., 2I), gate and up side by side; BF16, F16 or F32; need not be contiguous.
        rows: as of silu_mul_quantize.
        backend: "auto" takes the fastest that works for the tensor's device.

    Returns:
        (..., I), of the dtype of x.

    Raises:
        BlockscaleError: wrong dtype or shape, unknown backend.
    """
    op = "silu_mul"
    fused.check_gate_up(op, x)
    kernels = dispatch.triton_kernels(op, _OP, x.device, backend)
    if kernels is None:
        return fused.silu_mul(x)
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    if out.numel():
        chosen = None if rows is None else rows.contiguous()
        flat = out.view(-1, out.shape[-1])
        kernels.silu_mul_quantize(dispatch.as_rows(x), flat, None, _ANY_GROUP, False, chosen)
    return out
