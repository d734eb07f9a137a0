"""Weights and activations as their codes represent them: `reference.fake_quantize`, fast and bit for bit.

On a GPU one pass over memory, which waits for nothing and writes no codes; elsewhere the quantizer and the
dequantizer one after the other. Gradients do not pass through.
"""

from __future__ import annotations

import torch

from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.ops import dispatch
from blockscale.ops.dequantize_group import dequantize_group
from blockscale.ops.dequantize_weight import dequantize_weight
from blockscale.ops.quantize_activation import quantize_activation
from blockscale.ops.quantize_group import quantize_group
from blockscale.ops.quantize_weight import quantize_weight
from blockscale.reference import checks
from blockscale.reference import fake_quantize as reference

_WEIGHT, _ACTIVATION, _KERNELS = "fake_quantize_weight", "fake_quantize_activation", "fake_quantize"


def fake_quantize_weight(
    weight: torch.Tensor,
    fmt: BlockFP8 | GroupInt | MXFP4,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """A weight as a checkpoint of this format has it; blocks with NaN or Inf are NaN.

    Args:
        weight: (N, K) or (E, N, K); BF16, F16 or F32; need not be contiguous.
        fmt: of the checkpoint.
        dtype: of the result: bfloat16, float16 or float32.
        backend: "auto" takes the fastest that works for the tensor's device.

    Raises:
        BlockscaleError: wrong dtype or shape, unknown backend.
    """
    checks.check_weight(_WEIGHT, weight)
    checks.check_dtype(f"{_WEIGHT}: dtype", dtype, checks.HIGH_PRECISION)
    kernels = dispatch.triton_kernels(_WEIGHT, _KERNELS, weight.device, backend)
    weight = weight.detach()
    if kernels is None or not weight.numel() or not kernels.fits(tuple(weight.shape), fmt):
        if not bool(weight.isfinite().all()):
            return reference.fake_quantize_weight(weight, fmt, dtype)
        if isinstance(fmt, BlockFP8):
            scaled = quantize_weight(weight, fmt.block_size, fmt.scale_fmt, backend=backend)
            return dequantize_weight(*scaled, fmt.block_size, dtype, backend=backend)
        packed = quantize_group(weight, fmt, backend=backend)
        return dequantize_group(*packed, fmt, weight.shape[-1], dtype, backend=backend)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    run = kernels.fake_quantize_blocks if isinstance(fmt, BlockFP8) else kernels.fake_quantize_groups
    run(dispatch.as_matrices(weight), out.view(dispatch.matrix_shape(tuple(out.shape))), fmt)
    return out


def fake_quantize_activation(
    x: torch.Tensor,
    fmt: BlockFP8,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Activations (..., K) as FP8 in 1 x block_k groups represents them; groups with NaN or Inf are NaN.

    Args:
        x: BF16, F16 or F32; need not be contiguous.
        fmt: for its block_k and scale format.
        dtype: of the result: bfloat16, float16 or float32.
        backend: "auto" takes the fastest that works for the tensor's device.

    Raises:
        BlockscaleError: wrong dtype or shape, unknown backend.
    """
    group = fmt.block_size[1]
    checks.check_rows(_ACTIVATION, x, group)
    checks.check_dtype(f"{_ACTIVATION}: dtype", dtype, checks.HIGH_PRECISION)
    kernels = dispatch.triton_kernels(_ACTIVATION, _KERNELS, x.device, backend)
    x = x.detach()
    if kernels is None or not x.numel() or group > kernels.LARGEST_GROUP:
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = quantize_activation(rows, group, fmt.scale_fmt, backend=backend)
        # A group of activations is a block of one row, and of weights there is a fast dequantizer.
        return dequantize_weight(codes, scale, (1, group), dtype, backend=backend).view(x.shape)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    kernels.fake_quantize_activation(dispatch.as_rows(x), out.view(-1, x.shape[-1]), fmt)
    return out
