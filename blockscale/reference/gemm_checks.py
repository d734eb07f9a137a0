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
    n = b.shape[0]
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


def contiguous_output(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    m_indices: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check the arguments of `m_grouped_fp8_gemm_nt_contiguous`. Result: (M, N)."""
    op, (a, _, b, _) = "m_grouped_fp8_gemm_nt_contiguous", operands
    _check_operands(op, operands, ("M", "K"), ("E", "N", "K"))
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
    return _output(op, out, (m, b.shape[1]), torch.bfloat16, a.device)


def masked_output(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    masked_m: torch.Tensor,
    expected_m: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check the arguments of `m_grouped_fp8_gemm_nt_masked`. Result: (E, Mmax, N)."""
    op, (a, _, b, _) = "m_grouped_fp8_gemm_nt_masked", operands
    _check_operands(op, operands, ("E", "Mmax", "K"), ("E", "N", "K"))
    experts, m_max, _ = a.shape
    check_dtype(f"{op}: masked_m", masked_m.dtype, (torch.int32,))
    _check_plain(op, "masked_m", masked_m, (experts,), a.device)
    if not isinstance(expected_m, int) or expected_m < 0:
        raise BlockscaleError(
            "bad value", where=f"{op}: expected_m", expected="an integer, at least 0", got=repr(expected_m)
        )
    return _output(op, out, (experts, m_max, b.shape[1]), torch.bfloat16, a.device)


def _check_operands(
    op: str,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    a_dims: tuple[str, ...],
    b_dims: tuple[str, ...],
) -> None:
    """Codes of matching sizes, each with the scale grid that belongs to it."""
    a, a_scale, b, b_scale = operands
    _check_codes(op, "a", a, a_dims)
    _check_codes(op, "b", b, b_dims)
    n, k = b.shape[-2:]
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
        check_shape(f"{op}: a", tuple(a.shape), (b.shape[0], *a.shape[1:]))
    groups = math.ceil(k / GROUP)
    check_dtype(f"{op}: a_scale", a_scale.dtype, (torch.float32,))
    check_shape(f"{op}: a_scale", tuple(a_scale.shape), (*a.shape[:-1], groups))
    check_dtype(f"{op}: b_scale", b_scale.dtype, (torch.float32,))
    _check_device(op, "b", b, a.device)
    _check_device(op, "a_scale", a_scale, a.device)
    _check_plain(op, "b_scale", b_scale, (*b.shape[:-2], math.ceil(n / GROUP), groups), a.device)


def _check_codes(op: str, name: str, codes: torch.Tensor, dims: tuple[str, ...]) -> None:
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
    _check_device(op, name, tensor, device)


def _check_contiguous(op: str, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise BlockscaleError(
            "wrong layout",
            where=f"{op}: {name}",
            expected="row-major and contiguous",
            got=f"strides {list(tensor.stride())} for shape {list(tensor.shape)}",
            remedy=f"pass {name}.contiguous()",
        )


def _check_device(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
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
    _check_device(op, "out", out, device)
    return out
