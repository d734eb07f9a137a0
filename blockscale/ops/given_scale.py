"""Weights rounded with given scales, and the gradients of that: `reference.given_scale`, fast.

Values, codes and gradients of weights have the bits of the reference; gradients of scales differ by the order
of a float32 sum, which is always the same one. On a GPU each is one pass over memory; elsewhere the
reference. Gradients do not pass through: `blockscale.qat.fake_quant` puts the two together.
"""

from __future__ import annotations

from types import ModuleType

import torch

from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.ops import dispatch
from blockscale.reference import checks
from blockscale.reference import given_scale as reference


def fake_quantize_scaled(
    weight: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFP8 | GroupInt | MXFP4,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """A weight as a checkpoint with these scales has it; NaN stays in its place.

    Args:
        weight: (N, K) or (E, N, K); BF16, F16 or F32; need not be contiguous.
        scale: float32 (..., ceil(N / rows), ceil(K / columns)) for the blocks of the format, positive.
        fmt: of the checkpoint.
        dtype: of the result: bfloat16, float16 or float32.
        backend: "auto" takes the fastest that works for the tensor's device.

    Raises:
        BlockscaleError: wrong dtype, shape or device, unknown backend.
    """
    op = "fake_quantize_scaled"
    reference.check_given(op, weight, scale, fmt)
    checks.check_dtype(f"{op}: dtype", dtype, checks.HIGH_PRECISION)
    kernels = _kernels(op, weight, fmt, backend)
    if kernels is None:
        return reference.fake_quantize_scaled(weight, scale, fmt, dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    kernels.round_scaled(*_matrices(weight, scale), out.view(dispatch.matrix_shape(tuple(out.shape))), fmt)
    return out


def quantize_scaled(
    weight: torch.Tensor, scale: torch.Tensor, fmt: BlockFP8, *, backend: dispatch.Backend = "auto"
) -> torch.Tensor:
    """The codes, float8_e4m3fn of the weight's shape, of which `fake_quantize_scaled` gives the values.

    Args:
        weight, scale, fmt, backend: as there.

    Raises:
        BlockscaleError: wrong dtype, shape or device, unknown backend.
    """
    op = "quantize_scaled"
    reference.check_given(op, weight, scale, fmt)
    kernels = _kernels(op, weight, fmt, backend)
    if kernels is None:
        return reference.quantize_scaled(weight, scale, fmt)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    out = codes.view(torch.uint8).view(dispatch.matrix_shape(tuple(codes.shape)))
    kernels.round_scaled(*_matrices(weight, scale), out, fmt)
    return codes


def scaled_gradients(
    grad: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFP8 | GroupInt | MXFP4,
    *,
    of_scale: bool = True,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the weight and its scales from that of `fake_quantize_scaled`.

    Args:
        grad: of its result, of its shape; BF16, F16 or F32; need not be contiguous.
        weight, scale, fmt, backend: its arguments.
        of_scale: whether the scales' is wanted.

    Returns:
        dw, of the dtype of the weight, and ds, float32 of the shape of the scale, or None.

    Raises:
        BlockscaleError: wrong dtype, shape or device, unknown backend.
    """
    op = "scaled_gradients"
    reference.check_given(op, weight, scale, fmt, grad)
    kernels = _kernels(op, weight, fmt, backend)
    if kernels is None:
        return reference.scaled_gradients(grad, weight, scale, fmt, of_scale=of_scale)
    of_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    of_scales = torch.empty(scale.shape, dtype=torch.float32, device=weight.device) if of_scale else None
    kernels.scaled_gradients(
        dispatch.as_matrices(grad),
        *_matrices(weight, scale),
        of_weight.view(dispatch.matrix_shape(tuple(weight.shape))),
        None if of_scales is None else of_scales.view(dispatch.matrix_shape(tuple(scale.shape))),
        fmt,
    )
    return of_weight, of_scales


def _kernels(
    op: str, weight: torch.Tensor, fmt: BlockFP8 | GroupInt | MXFP4, backend: dispatch.Backend
) -> ModuleType | None:
    """The Triton kernels, if they take such a weight."""
    kernels = dispatch.triton_kernels(op, "given_scale", weight.device, backend)
    fits = kernels is not None and weight.numel() and kernels.fits(weight.shape[-1], fmt)
    return kernels if fits else None


def _matrices(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as (E, N, K) and its scales, contiguous, as their grid."""
    grid = dispatch.matrix_shape(tuple(scale.shape))
    return dispatch.as_matrices(weight), scale.detach().contiguous().view(grid)
