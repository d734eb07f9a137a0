"""Weights and activations as their codes represent them, in plain PyTorch: quantized and dequantized again.

    x' = s q(x / s), rounded once to the dtype of the result

with scale s and rounding q of `quantize_weight`, `quantize_group` and `quantize_activation`. A block or group
with NaN or Inf becomes NaN as a whole: in training that is told by the loss, not by every layer.
"""

from __future__ import annotations

import torch

from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.reference import checks
from blockscale.reference.fp8 import (
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
    spread_scale,
)
from blockscale.reference.group import dequantize_group, quantize_group


def fake_quantize_weight(
    weight: torch.Tensor, fmt: BlockFP8 | GroupInt | MXFP4, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """A weight as a checkpoint of this format has it.

    Args:
        weight: (N, K) or (E, N, K); BF16, F16 or F32.
        fmt: of the checkpoint.
        dtype: of the result: bfloat16, float16 or float32.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    checks.check_weight("fake_quantize_weight", weight)
    finite = weight.isfinite()
    known = weight.detach().where(finite, 0)
    if isinstance(fmt, BlockFP8):
        block, scaled = fmt.block_size, quantize_weight(known, fmt.block_size, fmt.scale_fmt)
        value = dequantize_weight(*scaled, block, dtype)
    else:
        block, packed = (1, fmt.group_size), quantize_group(known, fmt)
        value = dequantize_group(*packed, fmt, weight.shape[-1], dtype)
    return value.where(~_any_of_block(~finite, block), torch.nan)


def fake_quantize_activation(
    x: torch.Tensor, fmt: BlockFP8, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Activations (..., K) as FP8 in 1 x block_k groups represents them.

    Args:
        x: BF16, F16 or F32.
        fmt: for its block_k and scale format.
        dtype: of the result: bfloat16, float16 or float32.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    group = fmt.block_size[1]
    codes, scale = quantize_activation(x.detach(), group, fmt.scale_fmt)
    return dequantize_activation(codes, scale, group, dtype)


def _any_of_block(bad: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Whether anything in the block of each value is."""
    rows, columns = block
    height, width = bad.shape[-2:]
    padded = torch.nn.functional.pad(bad, (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(-2, (-1, rows)).unflatten(-1, (-1, columns)).any(dim=-1).any(dim=-2)
    return spread_scale(blocks, block, bad.shape)
