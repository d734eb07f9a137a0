"""The product of activations with an FP8 weight, as a model of transformers computes it.

    y = dequantize(quantize(x)) W^T + b        W = codes * scale

Activations are quantized in 1 x block_k groups, in the scale format of the weight. On a GPU with FP8
arithmetic `ops.fp8_gemm_nt` multiplies the codes. The emulation multiplies the same operands, dequantized, in
float32: it differs from the GEMM in rounding within the sum alone (`calc_diff` < 1e-5), and its result is
rounded once to the dtype of x.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from blockscale import ops
from blockscale.formats import BlockFP8
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
    """The product with a weight, plus bias.

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


def _has_gemm(weight: torch.Tensor, fmt: BlockFP8) -> bool:
    return fmt.block_size == (GROUP, GROUP) and all(side % _ALIGNMENT == 0 for side in weight.shape)


def _emulated(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, fmt: BlockFP8, bias: torch.Tensor | None
) -> torch.Tensor:
    """(M, K) -> (M, N)."""
    group = fmt.block_size[1]
    codes, x_scale = ops.quantize_activation(x, group, fmt.scale_fmt)
    operands = (
        ops.dequantize_weight(codes, x_scale, (1, group), torch.float32),
        ops.dequantize_weight(weight, scale, fmt.block_size, torch.float32),
    )
    return F.linear(*operands, None if bias is None else bias.float()).to(x.dtype)
