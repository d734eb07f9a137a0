"""The W4A8 GEMMs where no kernel runs them: dequantize, then PyTorch's own matrix product.

As `_dequantized_gemm`: BF16 on a GPU, on a CPU float32, which gives the result of the reference.
"""

from __future__ import annotations

import torch

from blockscale.ops.dequantize_w4 import dequantize_w4
from blockscale.ops.dequantize_weight import dequantize_weight
from blockscale.reference.w4 import W4Weight


def w4a8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """`ops.w4a8_gemm_nt`; `out` is always given."""
    rows = _rows(a, a_scale)
    product = rows @ dequantize_w4(b, rows.dtype).t()
    return out.copy_(product if bias is None else product.float() + bias.float())


def m_grouped_w4a8_gemm_nt_contiguous(
    a: torch.Tensor, a_scale: torch.Tensor, b: W4Weight, m_indices: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """`ops.m_grouped_w4a8_gemm_nt_contiguous`; `out` is always given. Reads `m_indices` on the host."""
    rows = _rows(a, a_scale)
    for expert in range(b.shape[0]):
        mine = (m_indices == expert).nonzero().squeeze(1)
        if mine.numel():
            out[mine] = (rows[mine] @ dequantize_w4(b[expert], rows.dtype).t()).to(out.dtype)
    return out


def m_grouped_w4a8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    masked_m: torch.Tensor,
    expected_m: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """`ops.m_grouped_w4a8_gemm_nt_masked`; `out` is always given. On a GPU nothing is read on the host."""
    if not a.is_cuda:
        for expert, count in enumerate(masked_m.tolist()):
            if count:
                rows = _rows(a[expert, :count], a_scale[expert, :count])
                out[expert, :count] = (rows @ dequantize_w4(b[expert], rows.dtype).t()).to(out.dtype)
        return out
    row = torch.arange(a.shape[1], device=a.device)[:, None]
    for expert in range(b.shape[0]):
        rows = _rows(a[expert], a_scale[expert])
        product = (rows @ dequantize_w4(b[expert], rows.dtype).t()).to(out.dtype)
        out[expert] = torch.where(row < masked_m[expert], product, out[expert])
    return out


def _rows(a: torch.Tensor, a_scale: torch.Tensor) -> torch.Tensor:
    """Activations in the dtype the product is computed in."""
    dtype = torch.bfloat16 if a.is_cuda else torch.float32
    return dequantize_weight(a, a_scale.contiguous(), (1, 128), dtype)
