"""SwiGLU and its quantization: the fast form of `blockscale.reference.fused.silu_mul_quantize`."""

from __future__ import annotations

import math

import torch

from blockscale.formats import BlockFP8, ScaleFmt
from blockscale.ops import dispatch
from blockscale.ops.quantize_activation import quantize_activation, rows_of_scale
from blockscale.reference import fused
from blockscale.reference.fp8 import ScaleLayout, empty_scale

_OP = "silu_mul_quantize"


def silu_mul_quantize(
    x: torch.Tensor,
    group_size: int = 128,
    scale_fmt: ScaleFmt = "float32",
    scale_layout: ScaleLayout = "row",
    *,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes and float32 scales of silu(gate) * up, one pass over memory on the GPU.

    silu in float32, the product rounded to the dtype of x, then as quantize_activation.

    Args:
        x: (..., 2I), gate and up side by side; BF16, F16 or F32; need not be contiguous.
        group_size: G; the last group of a row is the remainder.
        scale_fmt: "float32", or "ue8m0" for scales rounded up to powers of two.
        scale_layout: "row" or "column", as quantize_activation.
        backend: "auto" takes the fastest that works for the tensor's device.

    Returns:
        codes, float8_e4m3fn (..., I), and scale, float32 (..., ceil(I/G)).

    Raises:
        BlockscaleError: wrong dtype or shape, unknown scale format or backend.
    """
    fused.check_gate_up(_OP, x)
    fmt = BlockFP8((1, group_size), scale_fmt)
    kernels = dispatch.triton_kernels(_OP, _OP, x.device, backend)
    if kernels is None or group_size > kernels.LARGEST_GROUP:
        y = fused.silu_mul(x)
        return quantize_activation(y, group_size, fmt.scale_fmt, scale_layout, backend=backend)
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = empty_scale((*shape[:-1], math.ceil(shape[-1] / group_size)), scale_layout, x.device)
    if codes.numel():
        q, s = codes.view(-1, shape[-1]), rows_of_scale(scale)
        kernels.silu_mul_quantize(dispatch.as_rows(x), q, s, group_size, fmt.scale_fmt == "ue8m0")
    return codes, scale
