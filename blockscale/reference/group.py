"""Weights below 8 bits, packed: what `ops.quantize_group` and `ops.dequantize_group` equal bit for bit."""

from __future__ import annotations

import torch

from blockscale.errors import BlockscaleError
from blockscale.group_formats import MXFP4, NVFP4, GroupFormat, GroupInt, group_scale_shape, packed_width
from blockscale.reference import checks
from blockscale.reference.fp4 import dequantize_fp4, quantize_mxfp4
from blockscale.reference.int4 import dequantize_int, quantize_int
from blockscale.reference.packing import pack, signed, unpack


def quantize_group(weight: torch.Tensor, fmt: GroupFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes, uint8 (..., N, packed_width(K, bits)), and scales as stored, (..., N, ceil(K / G)).

    Args:
        weight: (N, K), or (E, N, K) for fused experts; BF16, F16 or F32; any dimension may be zero.
        fmt: `GroupInt` or `MXFP4`.

    Raises:
        NonFiniteError: the weight holds NaN or Inf.
        BlockscaleError: wrong dtype or shape, a format that is only read.
    """
    fmt = check_writable("quantize_group", fmt)
    codes, scale = quantize_int(weight, fmt) if isinstance(fmt, GroupInt) else quantize_mxfp4(weight)
    return pack(codes, fmt.bits), scale


def dequantize_group(
    packed: torch.Tensor,
    scale: torch.Tensor,
    fmt: GroupFormat,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """value(code) * scale in float32, rounded once to `dtype`; a NaN scale gives NaN, overflow gives Inf.

    Args:
        packed: uint8 (N, packed_width(K, bits)) or (E, N, ...).
        scale: (..., N, ceil(K / G)); float32, bfloat16 or float8_e8m0fnu; of NVFP4: `nvfp4_scale`.
        fmt: any of the formats.
        width: K, which the bytes do not tell.
        dtype: of the result, (..., N, K): bfloat16, float16 or float32.

    Raises:
        BlockscaleError: wrong dtype, packed codes or scales of another shape than the format has for K.
    """
    check_packed("dequantize_group", packed, scale, fmt, width, dtype)
    fields = unpack(packed, fmt.bits, width)
    if isinstance(fmt, GroupInt):
        return dequantize_int(signed(fields, fmt.bits), scale, fmt, dtype)
    return dequantize_fp4(fields, scale, fmt, dtype)


def check_writable(op: str, fmt: GroupFormat) -> GroupInt | MXFP4:
    """Refuse what is no format, or one that is only read."""
    if not isinstance(fmt, (GroupInt, MXFP4)):
        raise BlockscaleError(
            "cannot quantize to this format", where=f"{op}: fmt", expected="GroupInt or MXFP4", got=repr(fmt)
        )
    return fmt


def check_packed(
    op: str, packed: torch.Tensor, scale: torch.Tensor, fmt: GroupFormat, width: int, dtype: torch.dtype
) -> None:
    """Packed codes of K = `width` columns with the scales that belong to them, and the dtype to come."""
    if not isinstance(fmt, (GroupInt, MXFP4, NVFP4)):
        raise BlockscaleError("unknown format", where=f"{op}: fmt", expected="a GroupFormat", got=repr(fmt))
    checks.check_dtype(f"{op}: packed", packed.dtype, (torch.uint8,))
    checks.check_dtype(f"{op}: scale", scale.dtype, checks.SCALE_DTYPES)
    checks.check_dtype(f"{op}: dtype", dtype, checks.HIGH_PRECISION)
    if packed.dim() not in (2, 3):
        raise BlockscaleError(
            "wrong shape", where=f"{op}: packed", expected="(N, bytes) or (E, N, bytes)", got=packed.shape
        )
    rows = tuple(packed.shape[:-1])
    checks.check_shape(f"{op}: packed", packed.shape, (*rows, packed_width(width, fmt.bits)))
    checks.check_shape(f"{op}: scale", scale.shape, group_scale_shape((*rows, width), fmt))
    if scale.device != packed.device:
        raise BlockscaleError(
            "on another device", where=f"{op}: scale", expected=packed.device, got=scale.device
        )
