"""Argument checks of the W4A8 GEMMs, made before anything is launched; as in `gemm_checks`.

They look at shapes, dtypes, strides and devices only, never at values. Each returns the tensor to write to:
`out` if it was given, else a new uninitialized one.
"""

from __future__ import annotations

import math

import torch

from blockscale.errors import BlockscaleError
from blockscale.reference import gemm_checks
from blockscale.reference.checks import check_dtype, check_shape
from blockscale.reference.w4 import GROUP, W4Weight

_OUT_DTYPES = (torch.bfloat16, torch.float32)
_SIDE = 16  # what N and K are multiples of
_SEGMENT = gemm_checks.SEGMENT


def dense_output(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check the arguments of `w4a8_gemm_nt`. Result: (M, N)."""
    op = "w4a8_gemm_nt"
    _check_operands(op, a, a_scale, b, ("M", "K"), 2)
    n = b.shape[0]
    if bias is not None:
        check_dtype(f"{op}: bias", bias.dtype, _OUT_DTYPES)
        gemm_checks._check_plain(op, "bias", bias, (n,), a.device)
    check_dtype(f"{op}: out_dtype", out_dtype, _OUT_DTYPES)
    if out is not None:
        check_dtype(f"{op}: out", out.dtype, (out_dtype,))
    return gemm_checks._output(op, out, (a.shape[0], n), out_dtype, a.device)


def contiguous_output(
    a: torch.Tensor, a_scale: torch.Tensor, b: W4Weight, m_indices: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    """Check the arguments of `m_grouped_w4a8_gemm_nt_contiguous`. Result: (M, N)."""
    op = "m_grouped_w4a8_gemm_nt_contiguous"
    _check_operands(op, a, a_scale, b, ("M", "K"), 3)
    m = a.shape[0]
    if m % _SEGMENT:
        raise BlockscaleError(
            "unpadded rows",
            where=f"{op}: a",
            expected=f"M a multiple of {_SEGMENT}",
            got=m,
            remedy=f"pad the rows of every expert to a multiple of {_SEGMENT}, with -1 in m_indices",
        )
    check_dtype(f"{op}: m_indices", m_indices.dtype, (torch.int32,))
    gemm_checks._check_plain(op, "m_indices", m_indices, (m,), a.device)
    return gemm_checks._output(op, out, (m, b.shape[1]), torch.bfloat16, a.device)


def masked_output(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    masked_m: torch.Tensor,
    expected_m: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check the arguments of `m_grouped_w4a8_gemm_nt_masked`. Result: (E, Mmax, N)."""
    op = "m_grouped_w4a8_gemm_nt_masked"
    _check_operands(op, a, a_scale, b, ("E", "Mmax", "K"), 3)
    experts, m_max, _ = a.shape
    check_dtype(f"{op}: masked_m", masked_m.dtype, (torch.int32,))
    gemm_checks._check_plain(op, "masked_m", masked_m, (experts,), a.device)
    if not isinstance(expected_m, int) or expected_m < 0:
        raise BlockscaleError(
            "bad value", where=f"{op}: expected_m", expected="an integer, at least 0", got=repr(expected_m)
        )
    return gemm_checks._output(op, out, (experts, m_max, b.shape[1]), torch.bfloat16, a.device)


def _check_operands(
    op: str, a: torch.Tensor, a_scale: torch.Tensor, b: W4Weight, a_dims: tuple[str, ...], b_dim: int
) -> None:
    """Codes with their scales, and a weight of the same K (and E) on their device."""
    gemm_checks._check_codes(op, "a", a, a_dims)
    if len(b.shape) != b_dim:
        expected = "(N, K)" if b_dim == 2 else "(E, N, K)"
        raise BlockscaleError("wrong shape", where=f"{op}: b", expected=expected, got=list(b.shape))
    *lead, n, k = b.shape
    for name, size in (("N", n), ("K", k)):
        if size == 0 or size % _SIDE:
            raise BlockscaleError(
                "bad size",
                where=f"{op}: b",
                expected=f"{name} a positive multiple of {_SIDE}",
                got=size,
                remedy="pad the weight and its activations with zeros",
            )
    check_shape(f"{op}: a", tuple(a.shape), (*a.shape[:-1], k))
    if "E" in a_dims:
        check_shape(f"{op}: a", tuple(a.shape), (*lead, *a.shape[1:]))
    check_dtype(f"{op}: a_scale", a_scale.dtype, (torch.float32,))
    check_shape(f"{op}: a_scale", tuple(a_scale.shape), (*a.shape[:-1], math.ceil(k / GROUP)))
    gemm_checks._check_device(op, "b", b.words, a.device)
    gemm_checks._check_device(op, "a_scale", a_scale, a.device)
