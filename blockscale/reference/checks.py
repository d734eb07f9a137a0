"""Argument checks shared by the reference and the fast ops: bad input is named before any work is done."""

from __future__ import annotations

import torch

from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.formats import scale_shape

HIGH_PRECISION = (torch.bfloat16, torch.float16, torch.float32)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
CODES = torch.float8_e4m3fn


def check_dtype(where: str, got: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    """Refuse a dtype that is not one of `allowed`; `where` is "op: argument"."""
    if got not in allowed:
        raise BlockscaleError("bad dtype", where=where, expected=" or ".join(map(str, allowed)), got=got)


def check_shape(where: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a shape other than `expected`."""
    if tuple(got) != tuple(expected):
        raise BlockscaleError("wrong shape", where=where, expected=list(expected), got=list(got))


def check_weight(op: str, weight: torch.Tensor) -> None:
    """A weight to quantize: BF16, F16 or F32, of shape (N, K) or (E, N, K)."""
    check_dtype(f"{op}: weight", weight.dtype, HIGH_PRECISION)
    if weight.dim() not in (2, 3):
        raise BlockscaleError(
            "wrong shape", where=f"{op}: weight", expected="(N, K) or (E, N, K)", got=list(weight.shape)
        )


def check_scaled(op: str, codes: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int]) -> None:
    """Codes (N, K) or (E, N, K) with the scale grid that belongs to them."""
    check_dtype(f"{op}: codes", codes.dtype, (CODES,))
    check_dtype(f"{op}: scale", scale.dtype, SCALE_DTYPES)
    check_shape(f"{op}: scale", tuple(scale.shape), scale_shape(tuple(codes.shape), block_size))
    if scale.device != codes.device:
        raise BlockscaleError(
            "on another device", where=f"{op}: scale", expected=codes.device, got=scale.device
        )


def check_rows(op: str, x: torch.Tensor, group_size: int) -> None:
    """Activations to quantize: BF16, F16 or F32, at least one dimension, groups of a positive size."""
    check_dtype(f"{op}: x", x.dtype, HIGH_PRECISION)
    if x.dim() == 0:
        raise BlockscaleError("wrong shape", where=f"{op}: x", expected="(..., K)", got="a scalar")
    if not isinstance(group_size, int) or group_size <= 0:
        raise BlockscaleError(
            "bad group size", where=f"{op}: group_size", expected="a positive integer", got=repr(group_size)
        )


def non_finite(op: str, count: int, first: int, shape: tuple[int, ...]) -> NonFiniteError:
    """The error for `count` NaN or Inf in a weight of `shape`, the first of them at flat index `first`."""
    position: list[int] = []
    for size in reversed(shape):
        first, index = divmod(first, size)
        position.insert(0, index)
    return NonFiniteError(count, tuple(position), where=f"{op}: weight")
