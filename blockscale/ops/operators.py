"""The GEMMs as `torch.ops.blockscale.*`, so that `torch.compile` traces through them without a graph break.

The public functions come here while they are being compiled; eager calls save the microseconds that PyTorch's
dispatcher takes. Fake implementations are the argument checks, which look at no value. Operators take tensors
and numbers: a 4-bit weight comes in its parts, and is as wide as the activations.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import library

from blockscale.ops import gemm, w4a8_gemm
from blockscale.ops.gemm_dispatch import GemmBackend
from blockscale.ops.w4a8_gemm import W4A8Backend
from blockscale.reference import gemm_checks, w4a8_checks
from blockscale.reference.w4 import Kind, W4Weight


@library.custom_op("blockscale::fp8_gemm_nt", mutates_args=())
def fp8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """`ops.fp8_gemm_nt`."""
    chosen = cast(GemmBackend, backend)
    return gemm.fp8_gemm_nt(a, a_scale, b, b_scale, bias=bias, out_dtype=out_dtype, backend=chosen)


@library.custom_op("blockscale::m_grouped_fp8_gemm_nt_contiguous", mutates_args=())
def m_grouped_fp8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    m_indices: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """`ops.m_grouped_fp8_gemm_nt_contiguous`."""
    chosen = cast(GemmBackend, backend)
    return gemm.m_grouped_fp8_gemm_nt_contiguous(a, a_scale, b, b_scale, m_indices, backend=chosen)


@library.custom_op("blockscale::m_grouped_fp8_gemm_nt_masked", mutates_args=())
def m_grouped_fp8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    backend: str,
) -> torch.Tensor:
    """`ops.m_grouped_fp8_gemm_nt_masked`."""
    chosen = cast(GemmBackend, backend)
    return gemm.m_grouped_fp8_gemm_nt_masked(a, a_scale, b, b_scale, masked_m, expected_m, backend=chosen)


@fp8_gemm_nt.register_fake
def _(a, a_scale, b, b_scale, bias, out_dtype, backend):
    return gemm_checks.dense_output((a, a_scale, b, b_scale), bias, out_dtype, None)


@m_grouped_fp8_gemm_nt_contiguous.register_fake
def _(a, a_scale, b, b_scale, m_indices, backend):
    return gemm_checks.contiguous_output((a, a_scale, b, b_scale), m_indices, None)


@m_grouped_fp8_gemm_nt_masked.register_fake
def _(a, a_scale, b, b_scale, masked_m, expected_m, backend):
    return gemm_checks.masked_output((a, a_scale, b, b_scale), masked_m, expected_m, None)


def _weight(a: torch.Tensor, words: torch.Tensor, b_scale: torch.Tensor, kind: str) -> W4Weight:
    return W4Weight(words, b_scale, a.shape[-1], cast(Kind, kind))


@library.custom_op("blockscale::w4a8_gemm_nt", mutates_args=())
def w4a8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    words: torch.Tensor,
    b_scale: torch.Tensor,
    kind: str,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """`ops.w4a8_gemm_nt`."""
    b, chosen = _weight(a, words, b_scale, kind), cast(W4A8Backend, backend)
    return w4a8_gemm.w4a8_gemm_nt(a, a_scale, b, bias=bias, out_dtype=out_dtype, backend=chosen)


@library.custom_op("blockscale::m_grouped_w4a8_gemm_nt_contiguous", mutates_args=())
def m_grouped_w4a8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    words: torch.Tensor,
    b_scale: torch.Tensor,
    kind: str,
    m_indices: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """`ops.m_grouped_w4a8_gemm_nt_contiguous`."""
    b, chosen = _weight(a, words, b_scale, kind), cast(W4A8Backend, backend)
    return w4a8_gemm.m_grouped_w4a8_gemm_nt_contiguous(a, a_scale, b, m_indices, backend=chosen)


@library.custom_op("blockscale::m_grouped_w4a8_gemm_nt_masked", mutates_args=())
def m_grouped_w4a8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    words: torch.Tensor,
    b_scale: torch.Tensor,
    kind: str,
    masked_m: torch.Tensor,
    expected_m: int,
    backend: str,
) -> torch.Tensor:
    """`ops.m_grouped_w4a8_gemm_nt_masked`."""
    b, chosen = _weight(a, words, b_scale, kind), cast(W4A8Backend, backend)
    return w4a8_gemm.m_grouped_w4a8_gemm_nt_masked(a, a_scale, b, masked_m, expected_m, backend=chosen)


@w4a8_gemm_nt.register_fake
def _(a, a_scale, words, b_scale, kind, bias, out_dtype, backend):
    b = _weight(a, words, b_scale, kind)
    return w4a8_checks.dense_output(a, a_scale, b, bias, out_dtype, None)


@m_grouped_w4a8_gemm_nt_contiguous.register_fake
def _(a, a_scale, words, b_scale, kind, m_indices, backend):
    b = _weight(a, words, b_scale, kind)
    return w4a8_checks.contiguous_output(a, a_scale, b, m_indices, None)


@m_grouped_w4a8_gemm_nt_masked.register_fake
def _(a, a_scale, words, b_scale, kind, masked_m, expected_m, backend):
    b = _weight(a, words, b_scale, kind)
    return w4a8_checks.masked_output(a, a_scale, b, masked_m, expected_m, None)
