"""RMSNorm and its quantization: the fast form of `blockscale.reference.fused.rms_norm_quantize`."""

from __future__ import annotations

import math

import torch

from blockscale.formats import BlockFP8, ScaleFmt
from blockscale.ops import dispatch
from blockscale.ops.quantize_activation import quantize_activation, rows_of_scale
from blockscale.reference import fused
from blockscale.reference.fp8 import ScaleLayout, empty_scale

_OP = "rms_norm_quantize"


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_fmt: ScaleFmt = "float32",
    residual: torch.Tensor | None = None,
    scale_layout: ScaleLayout = "row",
    *,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, ...]:
    """E4M3 codes and float32 scales of rms_norm(x + residual) * weight, one pass over memory on the GPU.

    The roundings are those of Hugging Face's DeepSeek and Llama models (see the reference).

    Args:
        x: (..., K); BF16, F16 or F32; need not be contiguous.
        weight: (K,), of the dtype of x.
        eps: added to the mean square.
        group_size: G; the last group of a row is the remainder.
        scale_fmt: "float32", or "ue8m0" for scales rounded up to powers of two.
        residual: of the shape and dtype of x, added first.
        scale_layout: "row" or "column", as quantize_activation.
        backend: "auto" takes the fastest that works for the tensor's device.

    Returns:
        (codes, scale), or (codes, scale, x + residual) if there is a residual.

    Raises:
        BlockscaleError: wrong dtype, shape or device, unknown scale format or backend.
    """
    fused.check_norm(_OP, x, weight, residual)
    fmt = BlockFP8((1, group_size), scale_fmt)
    kernels = dispatch.triton_kernels(_OP, _OP, x.device, backend)
    if kernels is None or not kernels.fits(x.shape[-1], group_size):
        hidden = x if residual is None else fused.add_residual(x, residual)
        y = fused.rms_norm(hidden, weight, eps)
        quantized = quantize_activation(y, group_size, fmt.scale_fmt, scale_layout, backend=backend)
        return quantized if residual is None else (*quantized, hidden)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = empty_scale((*x.shape[:-1], math.ceil(x.shape[-1] / group_size)), scale_layout, x.device)
    added = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        k = x.shape[-1]
        kernels.rms_norm_quantize(
            (dispatch.as_rows(x), None if residual is None else dispatch.as_rows(residual)),
            weight.detach().contiguous(),
            eps,
            (codes.view(-1, k), rows_of_scale(scale), None if added is None else added.view(-1, k)),
            group_size,
            fmt.scale_fmt == "ue8m0",
        )
    return (codes, scale) if added is None else (codes, scale, added)
