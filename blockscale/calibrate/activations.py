"""Activations as an FP8 GEMM sees them."""

from __future__ import annotations

import torch

from blockscale import ops
from blockscale.formats import BlockFP8

_ROWS = 32768  # quantized at a time, which bounds the memory of what lies in between


def quantized_inputs(x: torch.Tensor, fmt: BlockFP8) -> torch.Tensor:
    """float32 (..., K): x (..., K) after quantize_activation and back, in groups of the format's block_k."""
    group = fmt.block_size[1]
    result = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    pieces = zip(
        x.reshape(-1, x.shape[-1]).split(_ROWS), result.view(-1, x.shape[-1]).split(_ROWS), strict=True
    )
    for rows, out in pieces:
        codes, scale = ops.quantize_activation(rows, group, fmt.scale_fmt)
        # A group of activations is a block of one row, and of weights there is a fast dequantizer.
        ops.dequantize_weight(codes, scale, (1, group), torch.float32, out=out)
    return result
