"""RMSNorm, and its quantization on the way: the fast forms of those of `blockscale.reference.fused`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from blockscale.formats import BlockFP8, ScaleFmt, activation_format
from blockscale.ops import dispatch, gemm_audit
from blockscale.ops.quantize_activation import quantize_activation, rows_of_scale
from blockscale.reference import fused
from blockscale.reference.fp8 import ScaleLayout, empty_scale

_OP = "rms_norm_quantize"
_GROUP = 128  # what the GEMMs read; where nothing is quantized, how a row lies in registers


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
    fmt = activation_format(group_size, scale_fmt)
    normed = _run(_OP, (x, residual), weight, eps, fmt, scale_layout, plain=False, backend=backend)
    assert normed.codes is not None
    assert normed.scale is not None
    quantized = normed.codes, normed.scale
    return quantized if residual is None else (*quantized, normed.hidden)


class Normed(NamedTuple):
    """A normalized row, as its readers want it.

    Attributes:
        y: (..., K), of the dtype of x, or None if nobody asked for it.
        hidden: (..., K), x + residual, or x itself without one.
        codes, scale: of y, as `quantize_activation(y, 128, scale_fmt, "column")`, or None.
    """

    y: torch.Tensor | None
    hidden: torch.Tensor
    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    scale_fmt: ScaleFmt | None = None,
    *,
    plain: bool = True,
    backend: dispatch.Backend = "auto",
) -> Normed:
    """rms_norm(x + residual) * weight, plain or quantized in groups of 128 or both, in one pass on the GPU.

    Args:
        x: (..., K); BF16, F16 or F32; need not be contiguous.
        weight: (K,), of the dtype of x.
        eps: added to the mean square.
        residual: of the shape and dtype of x, added first.
        scale_fmt: quantize with such scales; None to leave it.
        plain: whether the norm is wanted as it is.
        backend: "auto" takes the fastest that works for the tensor's device.

    Raises:
        BlockscaleError: wrong dtype, shape or device, unknown scale format or backend.
    """
    fmt = None if scale_fmt is None else activation_format(_GROUP, scale_fmt)
    return _run("rms_norm", (x, residual), weight, eps, fmt, "column", plain=plain, backend=backend)


def _run(
    op: str,
    inputs: tuple[torch.Tensor, torch.Tensor | None],
    weight: torch.Tensor,
    eps: float,
    fmt: BlockFP8 | None,
    layout: ScaleLayout,
    *,
    plain: bool,
    backend: dispatch.Backend,
) -> Normed:
    """Of x and residual: y if `plain`, codes and scales if there is a format of (1, G) blocks."""
    x, residual = inputs
    fused.check_norm(op, x, weight, residual)
    group_size = _GROUP if fmt is None else fmt.block_size[1]
    kernels = dispatch.triton_kernels(op, _OP, x.device, backend)
    if kernels is None or not kernels.fits(x.shape[-1], group_size):
        hidden = x if residual is None else fused.add_residual(x, residual)
        normed = fused.rms_norm(hidden, weight, eps)
        if fmt is None:
            return Normed(normed, hidden)
        quantized = quantize_activation(normed, group_size, fmt.scale_fmt, layout, backend=backend)
        return Normed(normed, hidden, *quantized)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if plain else None
    added = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes, scale = None, None
    if fmt is not None:
        codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scale = empty_scale((*x.shape[:-1], math.ceil(x.shape[-1] / group_size)), layout, x.device)
    if x.numel():
        flat = None if scale is None else rows_of_scale(scale)
        outputs = kernels.Outputs(codes, flat, y, added)
        kernels.rms_norm_quantize(x, residual, weight, eps, outputs, group_size, fmt)
        if codes is not None and gemm_audit.current is not None:
            gemm_audit.current.remember(codes, fused.rms_norm(x if added is None else added, weight, eps))
    return Normed(y, x if added is None else added, codes, scale)
