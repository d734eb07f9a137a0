"""E2M1 in groups along K, in plain PyTorch: the truth for `MXFP4` (both ways) and `NVFP4` (reading).

    scale = max(amax / 7, 2**-126), rounded up to a power of two
    codes = E2M1 of x / scale          to nearest, ties to the even mantissa, saturating at 6
    x    ~= value(codes) * scale

A code is its four bits as uint8: sign, two exponent bits of bias 1, one mantissa bit; no NaN, no Inf.
Rounding rules: `MXFP4`. Weights (N, K) or (E, N, K), scales (..., N, ceil(K / G)).
"""

from __future__ import annotations

from typing import Literal

import torch

from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8
from blockscale.group_formats import E2M1_VALUES, MXFP4, NVFP4, group_scale_shape
from blockscale.reference import checks
from blockscale.reference.fp8 import _block_amax, _to_e4m3, spread_scale
from blockscale.reference.group_scale import apply_scale, scaled_groups
from blockscale.reference.packing import unpack

_NAN_SCALE = 0xFF  # of E8M0
# Powers of two by which the value of a code may be multiplied and still be an E4M3 number, at most: 448 is
# the largest one.
_HEADROOM = (0, 9, 8, 8, 7, 7, 6, 6)
_ABOVE_ZERO = 16
_ONE = 127  # exponent bits of 1.0


def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8 of the weight's shape, and float8_e8m0fnu scales (..., N, ceil(K / 32)).

    Args:
        weight: (N, K) or (E, N, K); BF16, F16 or F32; any dimension may be zero.

    Raises:
        NonFiniteError: the weight holds NaN or Inf.
        BlockscaleError: wrong dtype or shape.
    """
    quotient, scale = scaled_groups("quantize_mxfp4", weight, MXFP4())
    return to_e2m1(quotient), scale


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Four bits of the nearest E2M1 number, uint8: ties to the even mantissa, saturating at 6; no NaN."""
    m = x.abs().clamp_max(6.0)
    # Numbers are 0.5 apart below 2, 1 apart below 4, then 2; even codes have even mantissas.
    code = torch.where(m < 2, (2 * m).round(), torch.where(m < 4, 2 + m.round(), 4 + (m / 2).round()))
    return code.to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)


def e2m1_value(codes: torch.Tensor) -> torch.Tensor:
    """The float32 numbers of E2M1 codes."""
    values = torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), device=codes.device)
    return values[codes.to(torch.int64) & 15]


def dequantize_fp4(
    codes: torch.Tensor, scale: torch.Tensor, fmt: MXFP4 | NVFP4, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """value(codes) * scale in float32, rounded once to `dtype`; a NaN scale gives NaN, overflow gives Inf.

    Args:
        codes: uint8 (N, K) or (E, N, K), four bits each.
        scale: (..., N, ceil(K / G)); float32, bfloat16 or float8_e8m0fnu; of NVFP4: `nvfp4_scale`.
        fmt: for its group size.
        dtype: of the result: bfloat16, float16 or float32.
    """
    op = "dequantize_fp4"
    checks.check_dtype(f"{op}: codes", codes.dtype, (torch.uint8,))
    checks.check_dtype(f"{op}: scale", scale.dtype, checks.SCALE_DTYPES)
    checks.check_dtype(f"{op}: dtype", dtype, checks.HIGH_PRECISION)
    checks.check_shape(f"{op}: scale", scale.shape, group_scale_shape(tuple(codes.shape), fmt))
    return apply_scale(e2m1_value(codes), scale, fmt.group_size, dtype)


def nvfp4_scale(
    scale: torch.Tensor, global_scale: torch.Tensor, layout: Literal["modelopt", "compressed-tensors"]
) -> torch.Tensor:
    """The float32 multiplier of every group of an NVFP4 weight, (..., N, ceil(K / 16)).

    Args:
        scale: `weight_scale`, float8_e4m3fn (..., N, ceil(K / 16)).
        global_scale: float32, one number, or (E,) for experts. In the layout "modelopt" it is
            `weight_scale_2` = amax / (6 * 448) and multiplies; in "compressed-tensors" it is
            `weight_global_scale`, about the reciprocal of that, and divides.
        layout: which of the two it is; nothing in the tensors tells.

    Raises:
        BlockscaleError: wrong dtype or shape, unknown layout.
    """
    op = "nvfp4_scale"
    checks.check_dtype(f"{op}: scale", scale.dtype, (torch.float8_e4m3fn,))
    checks.check_dtype(f"{op}: global_scale", global_scale.dtype, (torch.float32,))
    if global_scale.numel() != 1:
        checks.check_shape(f"{op}: global_scale", global_scale.shape, tuple(scale.shape[:-2]))
    factor = global_scale.reshape(-1, *(1,) * (scale.dim() - 1)) if scale.dim() == 3 else global_scale
    factor = factor.reshape(()) if global_scale.numel() == 1 else factor
    if layout == "modelopt":
        return scale.to(torch.float32) * factor
    if layout == "compressed-tensors":
        return scale.to(torch.float32) / factor
    raise BlockscaleError("unknown layout", expected="modelopt | compressed-tensors", got=repr(layout))


def fp8_from_mxfp4(
    packed: torch.Tensor, scale: torch.Tensor, width: int, block_size: tuple[int, int] = (128, 128)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MXFP4 as block-scaled E4M3, exactly wherever the scales of a block are near enough to each other.

    E2M1 times 2**-8 to 2**6 is E4M3, so groups whose scales are within a factor of 2**14 share a block
    without a loss. The scale of a block is the smallest power of two at which nothing saturates: any larger
    one would only push more of the small values below what E4M3 has. Values that get there are rounded, and
    the mask says in which blocks.

    Args:
        packed: uint8 (..., N, ceil(K / 2)).
        scale: float8_e8m0fnu (..., N, ceil(K / 32)), without NaN.
        width: K.
        block_size: (block_n, block_k) of the result, block_k a multiple of 32.

    Returns:
        codes float8_e4m3fn (..., N, K); scale float32 (..., ceil(N/block_n), ceil(K/block_k)), powers of two;
        lossless, bool of the scale's shape: whether every value of the block is the same as before.

    Raises:
        BlockscaleError: wrong dtype or shape, a NaN scale, a block that cuts through groups.
    """
    op, block_size = "fp8_from_mxfp4", BlockFP8(block_size).block_size
    checks.check_dtype(f"{op}: scale", scale.dtype, (torch.float8_e8m0fnu,))
    if block_size[1] % MXFP4.group_size:
        raise BlockscaleError("cuts through groups", where=f"{op}: block_size", expected="32, 64, 96, ...")
    codes = unpack(packed, MXFP4.bits, width)
    checks.check_shape(f"{op}: scale", scale.shape, group_scale_shape(tuple(codes.shape), MXFP4()))
    exponent = scale.view(torch.uint8).to(torch.int32)
    if bool((exponent == _NAN_SCALE).any()):
        raise BlockscaleError("NaN among the scales", where=f"{op}: scale", expected="finite scales")
    each = spread_scale(exponent, (1, MXFP4.group_size), codes.shape)
    headroom = torch.tensor(_HEADROOM, dtype=torch.int32, device=codes.device)[codes.to(torch.int64) & 7]
    # The exponent that each value asks for, moved up to be positive: a value of zero asks for none.
    asked = torch.where(codes & 7 == 0, torch.zeros_like(each), each - headroom + _ABOVE_ZERO)
    most = _block_amax(asked.to(torch.float32), block_size).to(torch.int32)
    block_exponent = torch.where(most == 0, torch.full_like(most, _ONE), most - _ABOVE_ZERO).clamp_min(1)
    block_scale = (block_exponent << 23).view(torch.float32)
    # In float64 no quotient of two E8M0 numbers underflows.
    distance = (each - spread_scale(block_exponent, block_size, codes.shape)).to(torch.float64)
    moved = e2m1_value(codes) * torch.exp2(distance)
    result = _to_e4m3(moved.to(torch.float32))
    changed = _block_amax((result.to(torch.float64) != moved).to(torch.float32), block_size)
    return result, block_scale, changed == 0
