"""Rounding that gradients pass straight through: forward is the exporter's arithmetic, bit for bit.

With q(x) the number of the format's grid nearest to x (ties to even, saturating at its largest number L), and
s the scale of the block or group that a weight w lies in:

    forward         w' = s q(w / s)                              float32, rounded once to `dtype`
    backward        dw = dw' m,    m = 1 where |w / s| <= L + h/2, else 0
                    ds = sum over the block of dw' (q(w / s) - m w / s)         only of given scales

h is the distance between the two largest numbers of the grid: beyond L + h/2 it is saturation that decides
what w becomes, not rounding, and w' does not change with w. (7.03 is rounded to the code 7 as 6.97 is: with
the bare |w / s| <= L half of all groups with BF16 scales would never again move their largest weight.)

Dynamic scales are the format's own, s = amax / L rounded to what is stored. They put no value beyond L + h/2,
so m is 1 everywhere; how s depends on w is left out, as is usual. Activations are quantized with dynamic
scales in 1 x G groups; below the floor of the amax, 1e-4, values are rounded more coarsely but still rounded.

Scales that are given are float32 numbers, rounded to what the format stores by `storable`, with a gradient
straight through as well.

Sources: straight-through estimator, Bengio et al. (arXiv:1308.3432); gradient of scales, LSQ (Esser et al.,
arXiv:1902.08153, equation 3), without its factor 1 / sqrt(n L), which Adam takes out again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from blockscale import ops
from blockscale.calibrate.formats import (
    Points,
    QuantizedFormat,
    Rounding,
    block_of,
    grid_of,
    nearest_scale,
    stored,
)
from blockscale.formats import BlockFP8
from blockscale.reference.fp8 import MIN_WEIGHT_SCALE, spread_scale
from blockscale.reference.given_scale import check_given
from blockscale.reference.rounding import to_grid

_LARGEST_POWER = 2.0**127  # of float32 and of E8M0
_HALF_OCTAVE = math.sqrt(0.5)


def fake_quantize(
    weight: torch.Tensor, fmt: QuantizedFormat, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A weight as it is read back from a checkpoint, with the scales that `blockscale quantize` gives it.

    Blocks and groups with NaN or Inf are NaN.

    Args:
        weight: (N, K) or (E, N, K); BF16, F16 or F32.
        fmt: of the checkpoint.
        dtype: of the result: bfloat16, float16 or float32.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    return _OwnScale.apply(weight, fmt, dtype)


def fake_quantize_scaled(
    weight: torch.Tensor, scale: torch.Tensor, fmt: QuantizedFormat, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A weight as it is read back from a checkpoint with these scales.

    Args:
        weight: (N, K) or (E, N, K); BF16, F16 or F32. NaN stays NaN.
        scale: float32 (..., ceil(N / rows), ceil(K / columns)) for the blocks or groups of the format,
            positive and such as it stores (`storable`).
        fmt: of the checkpoint.
        dtype: of the result: bfloat16, float16 or float32.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    return _GivenScale.apply(weight, scale, fmt, dtype)


def fake_quantize_input(x: torch.Tensor, fmt: BlockFP8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Activations (..., K) as FP8 with a scale for each group of a row represents them.

    Args:
        x: BF16, F16 or F32.
        fmt: its block_k is the size of a group.
        dtype: of the result: bfloat16, float16 or float32.
    """
    return _Input.apply(x, fmt, dtype)


def storable(scale: torch.Tensor, fmt: QuantizedFormat) -> torch.Tensor:
    """Scales of any shape, float32, as near as the format stores them, with the gradient of the identity.

    BF16 to nearest even; powers of two to the nearest by ratio, so that one that is there already stays until
    it has moved by a factor of sqrt(2). None is below 2**-126.
    """
    return _Storable.apply(scale, fmt)


def round_scaled(weight: torch.Tensor, scale: torch.Tensor, fmt: QuantizedFormat) -> Rounding:
    """Codes and scales as a checkpoint has them, of which `fake_quantize_scaled` gives the values.

    Args:
        weight, scale, fmt: as there.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    check_given("round_scaled", weight, scale, fmt)
    codes = to_grid(weight.detach().float() / spread_scale(scale, block_of(fmt), weight.shape), grid_of(fmt))
    return stored(Points(codes, scale), fmt)


def rounded(
    weight: torch.Tensor, scale: torch.Tensor | None, fmt: QuantizedFormat, dtype: torch.dtype
) -> torch.Tensor:
    """What `fake_quantize` gives, or with scales `fake_quantize_scaled`, without a gradient."""
    if scale is not None:
        return ops.fake_quantize_scaled(weight, scale, fmt, dtype)
    return ops.fake_quantize_weight(unshared(weight), fmt, dtype)


def unshared(weight: torch.Tensor) -> torch.Tensor:
    """The weight; on the CPU a copy: kernels read by numpy, and FSDP cannot free storage that it has seen."""
    return weight.detach().clone() if weight.device.type == "cpu" else weight


class _OwnScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, fmt: QuantizedFormat, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = weight.dtype
        return rounded(weight, None, fmt, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0].to(ctx.dtype), None, None


class _GivenScale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, scale: torch.Tensor, fmt: QuantizedFormat, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.fmt = fmt
        return rounded(weight, scale, fmt, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        weight, scale = ctx.saved_tensors
        made = ops.scaled_gradients(grads[0], weight, scale, ctx.fmt, of_scale=ctx.needs_input_grad[1])
        return *made, None, None


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fmt: BlockFP8, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = x.dtype
        return ops.fake_quantize_activation(x, fmt, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0].to(ctx.dtype), None, None


class _Storable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: torch.Tensor, fmt: QuantizedFormat) -> torch.Tensor:
        if fmt.scale_fmt != "ue8m0":
            return nearest_scale(scale, fmt)
        part, exponent = torch.frexp(scale.clamp(MIN_WEIGHT_SCALE, _LARGEST_POWER))
        power = torch.ldexp(torch.ones_like(scale), exponent - (part < _HALF_OCTAVE).to(exponent.dtype))
        return power.clamp(MIN_WEIGHT_SCALE, _LARGEST_POWER)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
