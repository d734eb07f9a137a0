"""DeepSeek's `inference/kernel.py` by its names and arguments, on blockscale's operators.

`from kernel import act_quant, weight_dequant, fp8_gemm` serves the reference model.py unchanged.
"""

from __future__ import annotations

import math

import torch

from blockscale import ops
from blockscale.formats import parse_scale_fmt


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes of x (..., K) and their float32 scales (..., ceil(K / block_size))."""
    return ops.quantize_activation(x, block_size, parse_scale_fmt(scale_fmt))


def weight_dequant(x: torch.Tensor, s: torch.Tensor, block_size: int = 128) -> torch.Tensor:
    """The weight of codes x (M, N) and scales s, in the default dtype."""
    return ops.dequantize_weight(x, s, (block_size, block_size), torch.get_default_dtype())


def fp8_gemm(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor) -> torch.Tensor:
    """(a * a_s) @ (b * b_s)^T in the default dtype: a (..., K), a_s (..., ceil(K/128)), b (N, K)."""
    rows, dtype = math.prod(a.shape[:-1]), torch.get_default_dtype()
    wide = torch.float32 if dtype == torch.float32 else torch.bfloat16
    product = ops.fp8_gemm_nt(a.view(rows, -1), a_s.view(rows, -1), b, b_s, out_dtype=wide)
    return product.to(dtype).view(*a.shape[:-1], b.shape[0])
