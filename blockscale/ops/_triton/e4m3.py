"""E4M3 arithmetic that the quantizing kernels share, bit-equal to `blockscale/reference/fp8.py`.

    scale = amax / 448        codes = e4m3(x / scale)

The amax is taken over the bits of |x| as integers: their order is that of the numbers, and NaN is above Inf
above everything else, so nothing is lost on the way to the scale.

Rounding rules:
- x / scale, once a value, is a correctly rounded quotient by multiply-add corrections (`exact_quotient`): a
  third of the instructions of an IEEE division and no branch. Triton's `/` on float32 is an approximation;
- 1 / scale, once a group, is an IEEE division;
- float32 to E4M3 is the conversion instruction where there is one (compute capability 8.9 on), integer
  arithmetic on the bits elsewhere (8.0, and Triton's interpreter).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

from blockscale.ops._triton.device import capability

# Triton's interpreter rounds a fused multiply-add twice, and converts BF16 its own way.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INF = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_ACTIVATION_FLOOR = tl.constexpr(0x38D1B717)  # float32(1e-4)
_MIN_WEIGHT_SCALE = tl.constexpr(0x00800000)  # 2**-126
_SMALL_SCALE = tl.constexpr(0x20800000)  # 2**-62


def converts_to_e4m3(device: torch.device) -> bool:
    """Whether the device has instructions between float32 and E4M3; Triton's interpreter has not."""
    return not INTERPRETED.value and capability(device) >= (8, 9)


@triton.jit
def fma(a, b, c):
    """float32 a * b + c, rounded once."""
    if INTERPRETED:
        product = tl.cast(a, tl.float64) * tl.cast(b, tl.float64)  # exact
        return (product + tl.cast(c, tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def magnitude(x):
    """Bits of |x|, float32, as int32."""
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def _round_up_to_power_of_two(bits):
    return tl.where(bits < _INF, (bits + 0x7FFFFF) & _INF, bits)


@triton.jit
def activation_scale(amax, POW2: tl.constexpr, FLOOR: tl.constexpr = _ACTIVATION_FLOOR):
    """float32 max(amax, floor) / 448 of the bits of an amax; NaN (the canonical one) and Inf stay.

    FLOOR is the bits of 1e-4 or another number, at least 2**-53.
    """
    floored = tl.maximum(amax, FLOOR).to(tl.float32, bitcast=True)
    # One correction is exact for 448: every mantissa was tried.
    bits = exact_quotient(floored, 448.0, 1.0 / 448.0, 1).to(tl.int32, bitcast=True)
    bits = tl.where(amax < _INF, bits, tl.where(amax == _INF, _INF, _NAN))
    if POW2:
        bits = _round_up_to_power_of_two(bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def weight_scale(amax, POW2: tl.constexpr):
    """float32 amax / 448, at least 2**-126, and 1 for amax 0, of the bits of a finite amax."""
    bits = tl.div_rn(amax.to(tl.float32, bitcast=True), 448.0).to(tl.int32, bitcast=True)
    bits = tl.where(amax == 0, 0x3F800000, tl.maximum(bits, _MIN_WEIGHT_SCALE))
    if POW2:
        bits = _round_up_to_power_of_two(bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def exact_quotient(x, divisor, reciprocal, CORRECTIONS: tl.constexpr):
    """x / divisor rounded to nearest, given 1 / divisor rounded to nearest.

    x * reciprocal is less than two ulps off; the first correction leaves one of the two neighbours of the
    quotient, and from there Markstein's theorem makes the second one exact, as long as the residuals are
    (they are multiples of 2**(log2 x - 48), so that must not be below 2**-149). Where x has so few bits that
    every pair of mantissas can be tried, one correction turned out to be enough. The signs are arranged so
    that a zero keeps its own: residual +0 times a negative number.
    """
    negative = reciprocal * -1.0
    quotient = x * reciprocal
    for _ in tl.static_range(CORRECTIONS):
        quotient = fma(fma(quotient, divisor, x * -1.0), negative, quotient)
    return quotient


@triton.jit
def scaled_codes(x, scale, CORRECTIONS: tl.constexpr, POW2: tl.constexpr, NATIVE: tl.constexpr):
    """uint8 E4M3 codes of x / scale, scale broadcast against x and at least 2**-62.

    A NaN scale makes every code NaN. An Inf scale (its reciprocal is 0) makes NaN of Inf and zero of the
    rest; the divisor is 0 then, because Inf would make the residuals NaN. CORRECTIONS may be 1 where x and
    the scale come from 16-bit floats.
    """
    reciprocal = tl.div_rn(1.0, scale)
    if POW2:
        quotient = x * reciprocal
    else:
        divisor = tl.where(magnitude(scale) < _INF, scale, 0.0)
        quotient = exact_quotient(x, divisor, reciprocal, CORRECTIONS)
    return e4m3_bits(quotient, NATIVE)


@triton.jit
def scaled_weight_codes(x, scale, CORRECTIONS: tl.constexpr, POW2: tl.constexpr, NATIVE: tl.constexpr):
    """As scaled_codes for any normal scale: below 2**-62, x and scale are first moved up by 2**64."""
    if POW2:
        return scaled_codes(x, scale, CORRECTIONS, POW2, NATIVE)
    else:
        factor = tl.where(magnitude(scale) < _SMALL_SCALE, 18446744073709551616.0, 1.0)
        return scaled_codes(x * factor, scale * factor, CORRECTIONS, POW2, NATIVE)


@triton.jit
def e4m3_bits(x, NATIVE: tl.constexpr):
    """uint8 E4M3 code of float32 x: nearest even, saturating at 448, 0x7F for every NaN."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        finite = tl.minimum(bits & _MAGNITUDE, 0x43E00000)  # 448
        normal = ((finite + 0x7FFFF + ((finite >> 20) & 1)) >> 20) - 960
        # Above 2**14 float32 numbers are 2**-9 apart, as E4M3 numbers are below 2**-6.
        shifted = finite.to(tl.float32, bitcast=True) + 16384.0
        subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(finite < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)
        return tl.where((bits & _MAGNITUDE) > _INF, 0x7F, code).to(tl.uint8)


@triton.jit
def e4m3_value(code, NATIVE: tl.constexpr):
    """float32 number of a uint8 E4M3 code."""
    if NATIVE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        wide = code.to(tl.int32)
        # The four exponent bits land at the bottom of float32's; 2**120 makes up for the other bias.
        bits = ((wide & 0x7F) << 20) | ((wide & 0x80) << 24)
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def widen(x):
    """x, of any high-precision dtype, as float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def operand(x, dtype: tl.constexpr):
    """x as tensor cores take it; the interpreter multiplies float32."""
    if INTERPRETED:
        return widen(x)
    else:
        return x.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x rounded to nearest even to `dtype`, with the bits of a NaN as they come."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & _MAGNITUDE) > _INF, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def through(x, dtype: tl.constexpr):
    """float32 x rounded to nearest even to a number of `dtype`, as float32."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        # Two at a time: single values are converted at a quarter of the rate.
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xFFFF0000; }",
            "=r,=r,f,f",
            [x],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
        return bits.to(tl.float32, bitcast=True)
    else:
        return widen(narrow(x, dtype))


@triton.jit
def narrow_canonical(x, dtype: tl.constexpr):
    """As `narrow`, and every NaN becomes the canonical one: sign clear, quiet."""
    result = narrow(x, dtype)
    if dtype == tl.float32:
        bits = tl.where(x != x, _NAN, result.to(tl.int32, bitcast=True))
    elif dtype == tl.bfloat16:
        bits = tl.where(x != x, 0x7FC0, result.to(tl.int16, bitcast=True)).to(tl.int16)
    else:
        bits = tl.where(x != x, 0x7E00, result.to(tl.int16, bitcast=True)).to(tl.int16)
    return bits.to(dtype, bitcast=True)
