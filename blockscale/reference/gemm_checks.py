"""Argument checks of the block-scaled GEMMs, the same for every backend, made before anything is launched.

They look at shapes, dtypes, strides and devices only, never at values: no device synchronization, and they
work on fake tensors. Each returns the tensor to write to: `out` if it was given, else a new uninitialized
one.
"""

from __future__ import annotations

import math

import torch

from blockscale.errors import BlockscaleError
from blockscale.reference.checks import CODES, check_dtype, check_shape

GROUP = 128  # activation values of a row that share a scale; both sides of a weight's block
SEGMENT = 128  # rows every expert's segment of a contiguous grouped GEMM is padded to
_ALIGNMENT = 16  # bytes: what one load of a kernel takes, hence also what N and K are multiples of
_OUT_DTYPES = (torch.bfloat16, torch.float32)
_BIAS_DTYPES = (torch.bfloat16, torch.float32)


def dense_output(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check the arguments of `fp8_gemm_nt`; operands are (a, a_scale, b, b_scale). Result: (M, N)."""
    op, (a, _, b, _) = "fp8_gemm_nt", operands
    _check_operands(op, operands, ("M", "K"), ("N", "K"))
    return dense_result(op, a, b.shape[0], bias, out_dtype, out)


def contiguous_output(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    m_indices: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check the arguments of `m_grouped_fp8_gemm_nt_contiguous`. Result: (M, N)."""
    op, (a, _, b, _) = "m_grouped_fp8_gemm_nt_contiguous", operands
    _check_operands(op, operands, ("M", "K"), ("E", "N", "K"))
    return contiguous_result(op, a, b.shape[1], m_indices, out)


def masked_output(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    masked_m: torch.Tensor,
    expected_m: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check the arguments of `m_grouped_fp8_gemm_nt_masked`. Result: (E, Mmax, N)."""
    op, (a, _, b, _) = "m_grouped_fp8_gemm_nt_masked", operands
    _check_operands(op, operands, ("E", "Mmax", "K"), ("E", "N", "K"))
    return masked_result(op, a, b.shape[1], masked_m, expected_m, out)


def dense_result(
    op: str,
    a: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check what a product with (N, K) takes beside its operands. Result: (M, N)."""
    if bias is not None:
        check_dtype(f"{op}: bias", bias.dtype, _BIAS_DTYPES)
        _check_plain(op, "bias", bias, (n,), a.device)
    check_dtype(f"{op}: out_dtype", out_dtype, _OUT_DTYPES)
    if out is not None and out.dtype != out_dtype:
        raise BlockscaleError(
            "bad dtype",
            where=f"{op}: out",
            expected=out_dtype,
            got=out.dtype,
            remedy=f"pass out_dtype={out.dtype}",
        )
    return _output(op, out, (a.shape[0], n), out_dtype, a.device)


def contiguous_result(
    op: str, a: torch.Tensor, n: int, m_indices: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    """Check what a contiguous product takes beside its operands. Result: (M, N)."""
    m = a.shape[0]
    if m % SEGMENT:
        raise BlockscaleError(
            "unpadded rows",
            where=f"{op}: a",
            expected=f"M a multiple of {SEGMENT}",
            got=m,
            remedy=f"pad the rows of every expert to a multiple of {SEGMENT}, with -1 in m_indices",
        )
    check_dtype(f"{op}: m_indices", m_indices.dtype, (torch.int32,))
    _check_plain(op, "m_indices", m_indices, (m,), a.device)
    return _output(op, out, (m, n), torch.bfloat16, a.device)


def masked_result(
    op: str, a: torch.Tensor, n: int, masked_m: torch.Tensor, expected_m: int, out: torch.Tensor | None
) -> torch.Tensor:
    """Check what a masked product takes beside its operands. Result: (E, Mmax, N)."""
    experts, m_max, _ = a.shape
    check_dtype(f"{op}: masked_m", masked_m.dtype, (torch.int32,))
    _check_plain(op, "masked_m", masked_m, (experts,), a.device)
    if not isinstance(expected_m, int) or expected_m < 0:
        raise BlockscaleError(
            "bad value", where=f"{op}: expected_m", expected="an integer, at least 0", got=repr(expected_m)
        )
    return _output(op, out, (experts, m_max, n), torch.bfloat16, a.device)


def _check_operands(
    op: str,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    a_dims: tuple[str, ...],
    b_dims: tuple[str, ...],
) -> None:
    """Codes of matching sizes, each with the scale grid that belongs to it."""
    a, a_scale, b, b_scale = operands
    check_codes(op, "a", a, a_dims)
    check_codes(op, "b", b, b_dims)
    check_device(op, "b", b, a.device)
    check_sides(op, a, a_scale, tuple(b.shape), a_dims)
    n, k = b.shape[-2:]
    check_dtype(f"{op}: b_scale", b_scale.dtype, (torch.float32,))
    groups = math.ceil(k / GROUP)
    _check_plain(op, "b_scale", b_scale, (*b.shape[:-2], math.ceil(n / GROUP), groups), a.device)


def check_sides(
    op: str, a: torch.Tensor, a_scale: torch.Tensor, b_shape: tuple[int, ...], a_dims: tuple[str, ...]
) -> None:
    """Check activations and their scales against a weight of this shape, (N, K) or (E, N, K)."""
    n, k = b_shape[-2:]
    for name, size in (("N", n), ("K", k)):
        if size == 0 or size % _ALIGNMENT:
            raise BlockscaleError(
                "bad size",
                where=f"{op}: b",
                expected=f"{name} a positive multiple of {_ALIGNMENT}",
                got=size,
                remedy="pad the weight and its activations with zeros",
            )
    check_shape(f"{op}: a", tuple(a.shape), (*a.shape[:-1], k))
    if "E" in a_dims:
        check_shape(f"{op}: a", tuple(a.shape), (b_shape[0], *a.shape[1:]))
    check_dtype(f"{op}: a_scale", a_scale.dtype, (torch.float32,))
    check_shape(f"{op}: a_scale", tuple(a_scale.shape), (*a.shape[:-1], math.ceil(k / GROUP)))
    check_device(op, "a_scale", a_scale, a.device)


def check_codes(op: str, name: str, codes: torch.Tensor, dims: tuple[str, ...]) -> None:
    """Row-major E4M3 codes that start at an aligned address."""
    check_dtype(f"{op}: {name}", codes.dtype, (CODES,))
    if codes.dim() != len(dims):
        raise BlockscaleError(
            "wrong shape", where=f"{op}: {name}", expected=f"({', '.join(dims)})", got=list(codes.shape)
        )
    _check_contiguous(op, name, codes)
    if codes.storage_offset() % _ALIGNMENT:
        raise BlockscaleError(
            "misaligned",
            where=f"{op}: {name}",
            expected=f"a start at a multiple of {_ALIGNMENT} bytes",
            got=f"byte {codes.storage_offset()} of its storage",
            remedy=f"pass {name}.clone()",
        )


def _check_plain(
    op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    check_shape(f"{op}: {name}", tuple(tensor.shape), shape)
    _check_contiguous(op, name, tensor)
    check_device(op, name, tensor, device)


def _check_contiguous(op: str, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise BlockscaleError(
            "wrong layout",
            where=f"{op}: {name}",
            expected="row-major and contiguous",
            got=f"strides {list(tensor.stride())} for shape {list(tensor.shape)}",
            remedy=f"pass {name}.contiguous()",
        )


def check_device(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Check that a tensor is where `a` is."""
    if tensor.device != device:
        raise BlockscaleError(
            "on another device", where=f"{op}: {name}", expected=f"{device}, like a", got=tensor.device
        )


def _output(
    op: str, out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    check_dtype(f"{op}: out", out.dtype, _OUT_DTYPES)
    check_shape(f"{op}: out", tuple(out.shape), shape)
    if not out.is_contiguous():
        raise BlockscaleError(
            "wrong layout",
            where=f"{op}: out",
            expected="row-major and contiguous",
            got=f"strides {list(out.stride())} for shape {list(out.shape)}",
            remedy="pass a tensor of its own and copy from it",
        )
    check_device(op, "out", out, device)
    return out
