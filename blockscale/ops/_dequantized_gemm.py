"""The GEMMs where FP8 is a storage format only: dequantize, then PyTorch's own matrix product.

On a GPU without FP8 arithmetic (A100, V100) operands become BF16, code times scale rounded to 8 bits, and the
product accumulates in float32. On a CPU they become float32: the result is that of the reference, by a faster
way to the same bits of the operands.

A weight is dequantized in pieces of rows, so its copy stays small whatever its size. A model that runs for
long on such a GPU is better dequantized once, when it is loaded.
"""

from __future__ import annotations

import torch

from blockscale.ops.dequantize_weight import dequantize_weight

_PIECE = 1 << 26  # values of a weight that are dequantized at a time: 128 MiB of BF16


def fp8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor,
) -> torch.Tensor:
    """`ops.fp8_gemm_nt`; `out` is always given."""
    rows = _rows(a, a_scale)
    step = max(1, _PIECE // b.shape[1] // 128) * 128
    for first in range(0, b.shape[0], step):
        last = min(first + step, b.shape[0])
        weight = dequantize_weight(b[first:last], b_scale[first // 128 : -(-last // 128)], dtype=rows.dtype)
        product = rows @ weight.t()
        if bias is not None:
            product = product.float() + bias[first:last].float()
        out[:, first:last] = product
    return out


def m_grouped_fp8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    m_indices: torch.Tensor,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """`ops.m_grouped_fp8_gemm_nt_contiguous`; `out` is always given. Reads `m_indices` on the host."""
    rows = _rows(a, a_scale)
    for expert, (weight, scale) in enumerate(zip(b, b_scale, strict=True)):
        mine = (m_indices == expert).nonzero().squeeze(1)
        if mine.numel():
            product = rows[mine] @ dequantize_weight(weight, scale, dtype=rows.dtype).t()
            out[mine] = product.to(out.dtype)
    return out


def m_grouped_fp8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """`ops.m_grouped_fp8_gemm_nt_masked`; `out` is always given. Nothing is read on the host."""
    row = torch.arange(a.shape[1], device=a.device)[:, None]
    for expert, (weight, scale) in enumerate(zip(b, b_scale, strict=True)):
        rows = _rows(a[expert], a_scale[expert])
        product = (rows @ dequantize_weight(weight, scale, dtype=rows.dtype).t()).to(out.dtype)
        out[expert] = torch.where(row < masked_m[expert], product, out[expert])
    return out


def _rows(a: torch.Tensor, a_scale: torch.Tensor) -> torch.Tensor:
    """Activations in the dtype the product is computed in."""
    # float16 would be faster on a V100, but activations may be beyond its range.
    dtype = torch.bfloat16 if a.is_cuda else torch.float32
    return dequantize_weight(a, a_scale.contiguous(), (1, 128), dtype)
