"""The product of activations with a quantized weight, as a model of transformers computes it.

    y = dequantize(quantize(x)) W^T + b        W = codes * scale

Activations are quantized to FP8: with an FP8 weight in 1 x block_k groups and in the scale format of the
weight, with one of fewer bits in 1 x 128 groups. On a GPU with FP8 arithmetic `ops.fp8_gemm_nt` multiplies
the codes of FP8 weights. The emulation multiplies the same operands, dequantized, in float32: it differs from
the GEMM in rounding within the sum alone (`calc_diff` < 1e-5), and its result is rounded once to the dtype of
x.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from blockscale import ops
from blockscale.formats import BlockFP8, ScaleFmt
from blockscale.group_spelling import WrittenFormat
from blockscale.model.linear import GROUP
from blockscale.model.linear import Linear as Stored
from blockscale.ops.gemm_dispatch import has_fp8

Compute = Literal["auto", "fp8", "high"]
_ALIGNMENT = 16  # what the GEMMs ask N and K to be multiples of


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFP8,
    compute: Compute,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product with an FP8 weight, plus bias.

    Args:
        x: (..., K); BF16, F16 or F32.
        weight: (N, K), float8_e4m3fn.
        scale: (ceil(N/bn), ceil(K/bk)), float32.
        fmt: block size and scale format.
        compute: see `BlockscaleConfig`.
        bias: (N,), or None.

    Returns:
        (..., N), of the dtype of x.

    Raises:
        BlockscaleError: a weight that is no longer FP8 (a model that was cast), or on another device.
    """
    if compute == "high":
        return Stored(weight, scale, fmt, bias, "high")(x)
    rows = x.reshape(-1, x.shape[-1])
    if compute == "auto" and has_fp8(x.device) and _has_gemm(weight, fmt):
        bias = bias if bias is None or bias.dtype == torch.bfloat16 else bias.float()
        product = Stored(weight, scale, fmt, bias, "fp8")(rows)
    else:
        product = _emulated(rows, weight, scale, fmt, bias)
    return product.view(*x.shape[:-1], -1)


def multiply_low(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    group: WrittenFormat,
    scale_fmt: ScaleFmt,
    compute: Compute,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product with a weight of fewer than 8 bits, plus bias.

    Args:
        x: (..., K); BF16, F16 or F32.
        packed: codes of a weight (N, K), uint8 (N, bytes).
        scale: (N, groups), of the scale dtype of the format.
        group: the format.
        scale_fmt: of activations.
        compute: see `BlockscaleConfig`.
        bias: (N,), or None.

    Returns:
        (..., N), of the dtype of x.
    """
    if compute == "high":
        return F.linear(x, ops.dequantize_group(packed, scale, group, x.shape[-1], x.dtype), bias)
    rows = x.reshape(-1, x.shape[-1])
    weight = ops.dequantize_group(packed, scale, group, x.shape[-1], torch.float32)
    product = F.linear(_rounded(rows, GROUP, scale_fmt), weight, None if bias is None else bias.float())
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def _has_gemm(weight: torch.Tensor, fmt: BlockFP8) -> bool:
    return fmt.block_size == (GROUP, GROUP) and all(side % _ALIGNMENT == 0 for side in weight.shape)


def _emulated(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, fmt: BlockFP8, bias: torch.Tensor | None
) -> torch.Tensor:
    """(M, K) -> (M, N)."""
    operands = (
        _rounded(x, fmt.block_size[1], fmt.scale_fmt),
        ops.dequantize_weight(weight, scale, fmt.block_size, torch.float32),
    )
    return F.linear(*operands, None if bias is None else bias.float()).to(x.dtype)


def _rounded(x: torch.Tensor, group: int, scale_fmt: ScaleFmt) -> torch.Tensor:
    """Activations (M, K), float32, as FP8 with a scale for each group of a row represents them."""
    codes, scale = ops.quantize_activation(x, group, scale_fmt)
    return ops.dequantize_weight(codes, scale, (1, group), torch.float32)
