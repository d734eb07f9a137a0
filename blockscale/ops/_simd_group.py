"""Codes of 3 and 4 bits, 32 at a time, as LLVM intrinsics; conventions and helpers are those of `_simd.py`.

The kernels work on runs of 32 columns, which start on a byte of their own: 16 bytes, or 12 for 3 bits. Groups
are whole runs, except those of 16.

A magnitude has the code k if k of the ties between neighbouring values lie below it, a tie itself counting
for even k: to nearest, ties to even, for integers and for E2M1, whose even codes are its even mantissas.
BF16 magnitudes are compared as the integers their bits are, without a division:

    even k:   |x| / scale >= tie   <=>   bits(|x|) >= ceil(bits(tie * scale) / 2**16)
    odd k:    |x| / scale > tie    <=>   bits(|x|) > floor(bits(tie * scale) / 2**16)

where tie * scale is exact: 8 bits of a BF16 scale times 4. The division, rounded to float32, decides the
same: a quotient of two 8-bit mantissas that is no tie is at least 2**-10 away from it.

As `_simd.py` says, numba's cache does not notice when this file changes: delete `__pycache__`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from blockscale.ops._simd import (
    _NAN,
    F16,
    F32,
    I8,
    I16,
    I32,
    LANES,
    _const,
    _emit_as_float,
    _emit_from_float,
    _load,
    _pointer,
    _splat,
)

_LIMITS = 8  # entries of a table of limits; that of code k at k - 1, the last one unused
_INT4_TIES = (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5)
_INT3_TIES = (0.5, 1.5, 2.5)
_FP4_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_WORDS = ir.VectorType(I32, LANES)
_HALVES = ir.VectorType(I16, LANES)
_FLOATS = ir.VectorType(F32, LANES)


def _constants(element: ir.Type, values: list[Any]) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, len(values)), values)


def _shuffled(b: ir.IRBuilder, vector: ir.Value, order: list[int]) -> ir.Value:
    """Entries of the vector in the given order; indices past it take zeros."""
    return b.shuffle_vector(vector, _const(vector.type, 0), _constants(I32, order))


def _limits(ties: tuple[float, ...]) -> Callable[..., Any]:
    """Generator of the limits of a scale: |x| has code k or more if its bits are above limits[k - 1]."""
    factors = [*ties, *[1.0] * (_LIMITS - len(ties))]
    # Minus one, as the comparison is with > for all.
    addends = [0x10000 if number % 2 == 0 else 0xFFFF for number in range(_LIMITS)]

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        vector = ir.VectorType(F32, _LIMITS)
        single = b.insert_element(ir.Constant(vector, ir.Undefined), args[0], I32(0))
        scale = b.shuffle_vector(single, ir.Constant(vector, ir.Undefined), _constants(I32, [0] * _LIMITS))
        bits = b.bitcast(b.fmul(scale, _constants(F32, factors)), ir.VectorType(I32, _LIMITS))
        above = b.lshr(b.add(bits, _constants(I32, addends)), _constants(I32, [16] * _LIMITS))
        limits = b.trunc(b.sub(above, _constants(I32, [1] * _LIMITS)), ir.VectorType(I16, _LIMITS))
        b.store(limits, _pointer(context, b, sig.args[1], args[1], args[2], limits.type)).align = 2
        return context.get_dummy_value()

    return codegen


def _emit_count_bf16(b: ir.IRBuilder, bits: ir.Value, limits: ir.Value, ties: tuple[float, ...]) -> ir.Value:
    """How many of the limits, behind a pointer, each of 32 magnitudes is above."""
    magnitude = b.and_(bits, _const(_HALVES, 0x7FFF))
    count = _const(_HALVES, 0)
    for number in range(len(ties)):
        limit = _splat(b, _load(b, b.gep(limits, [I32(number)]), 2))
        count = b.sub(count, b.sext(b.icmp_signed(">", magnitude, limit), _HALVES))
    return count


def _emit_count_float(b: ir.IRBuilder, quotient: ir.Value, ties: tuple[float, ...]) -> ir.Value:
    """As _emit_count_bf16 for float32 quotients, with the ties themselves."""
    magnitude = b.bitcast(b.and_(b.bitcast(quotient, _WORDS), _const(_WORDS, 0x7FFFFFFF)), _FLOATS)
    count = _const(_WORDS, 0)
    for number, tie in enumerate(ties):
        beyond = b.fcmp_ordered(">" if number % 2 == 0 else ">=", magnitude, _const(_FLOATS, tie))
        count = b.sub(count, b.sext(beyond, _WORDS))
    return b.trunc(count, _HALVES)


def _emit_packed(b: ir.IRBuilder, fields: ir.Value, bits: int) -> ir.Value:
    """32 fields in 16 bits each as 16 bytes, or 12 for 3 bits."""
    pairs = b.bitcast(fields, ir.VectorType(I32, 16))
    pairs = b.or_(pairs, b.lshr(pairs, _const(pairs.type, 16 - bits)))
    if bits == 4:
        return b.trunc(pairs, ir.VectorType(I8, 16))
    sixes = b.and_(b.trunc(pairs, ir.VectorType(I16, 16)), _constants(I16, [0x3F] * 16))
    twelves = b.bitcast(sixes, ir.VectorType(I32, 8))
    twelves = b.or_(twelves, b.lshr(twelves, _constants(I32, [10] * 8)))
    twelves = b.and_(b.trunc(twelves, ir.VectorType(I16, 8)), _constants(I16, [0xFFF] * 8))
    words = b.bitcast(twelves, ir.VectorType(I32, 4))
    high = b.shl(b.lshr(words, _constants(I32, [16] * 4)), _constants(I32, [12] * 4))
    words = b.or_(b.and_(words, _constants(I32, [0xFFF] * 4)), high)
    order = [4 * word + byte for word in range(4) for byte in range(3)]
    return _shuffled(b, b.bitcast(words, ir.VectorType(I8, 16)), order)


def _quantizer(ties: tuple[float, ...], bits: int, integer: bool) -> Callable[..., Any]:
    """Generator of quantize32_*."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        fmt = sig.args[0].dtype
        lanes = _WORDS if fmt == types.uint32 else _HALVES
        x = _load(b, _pointer(context, b, sig.args[0], args[0], args[2], lanes), lanes.element.width // 8)
        negative = b.ashr(x, _const(lanes, lanes.element.width - 1))
        if fmt == types.uint16:
            limits = _pointer(context, b, sig.args[4], args[4], args[5], I16)
            count = _emit_count_bf16(b, x, limits, ties)
        else:
            negative = negative if lanes is _HALVES else b.trunc(negative, _HALVES)
            count = _emit_count_float(b, b.fdiv(_emit_as_float(b, fmt, x), _splat(b, args[6])), ties)
        if integer:
            fields = b.and_(b.sub(b.xor(count, negative), negative), _const(_HALVES, (1 << bits) - 1))
        else:
            fields = b.or_(count, b.and_(negative, _const(_HALVES, 8)))
        packed = _emit_packed(b, fields, bits)
        b.store(packed, _pointer(context, b, sig.args[1], args[1], args[3], packed.type)).align = 1
        return context.get_dummy_value()

    return codegen


def _emit_words(b: ir.IRBuilder, start: ir.Value, bits: int) -> ir.Value:
    """Four 32-bit words, eight codes each, the first in the lowest bits; above codes of 3 bits, anything."""
    words = ir.Constant(ir.VectorType(I32, 4), ir.Undefined)
    for number in range(4):
        # The last word of 12 bytes is read from a byte before its own: there is none after it.
        early = 1 if bits == 3 and number == 3 else 0
        address = b.gep(start, [I32(number * bits - early)])
        word = _load(b, b.bitcast(address, I32.as_pointer()), 1)
        words = b.insert_element(words, b.lshr(word, I32(8 * early)), I32(number))
    return words


def _emit_integers(b: ir.IRBuilder, words: ir.Value, bits: int) -> ir.Value:
    """float32 of two's complement codes, eight in each of four words (already repeated eight times)."""
    up = [32 - bits - bits * (lane % 8) for lane in range(LANES)]
    aligned = b.ashr(b.shl(words, _constants(I32, up)), _const(_WORDS, 32 - bits))
    return b.sitofp(aligned, _FLOATS)


def _emit_e2m1(b: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """float32 of E2M1 codes: their bits in a float16, whose exponent bias is 14 larger. Exact."""
    code = b.trunc(b.lshr(words, _constants(I32, [4 * (lane % 8) for lane in range(LANES)])), _HALVES)
    magnitude = b.shl(b.and_(code, _const(_HALVES, 7)), _const(_HALVES, 9))
    sign = b.shl(b.and_(code, _const(_HALVES, 8)), _const(_HALVES, 12))
    half = b.bitcast(b.or_(magnitude, sign), ir.VectorType(F16, LANES))
    return b.fmul(b.fpext(half, _FLOATS), _const(_FLOATS, 2.0**14))


def _dequantizer(bits: int, integer: bool) -> Callable[..., Any]:
    """Generator of dequantize32_*."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        fmt = sig.args[1].dtype
        start = _pointer(context, b, sig.args[0], args[0], args[2], I8)
        words = _emit_words(b, start, bits)
        words = _shuffled(b, words, [lane // 8 for lane in range(LANES)])
        value = _emit_integers(b, words, bits) if integer else _emit_e2m1(b, words)
        scales = b.insert_element(ir.Constant(ir.VectorType(F32, 2), ir.Undefined), args[4], I32(0))
        scales = b.insert_element(scales, args[5], I32(1))
        product = b.fmul(value, _shuffled(b, scales, [lane // 16 for lane in range(LANES)]))
        rounded = _emit_from_float(b, fmt, product)
        nan = b.fcmp_unordered("uno", product, product)
        rounded = b.select(nan, _const(rounded.type, _NAN[fmt]), rounded)
        store = b.store(rounded, _pointer(context, b, sig.args[1], args[1], args[3], rounded.type))
        store.align = 4 if fmt == types.uint32 else 2
        return context.get_dummy_value()

    return codegen


@intrinsic
def limits_int4(typing, scale, limits, at):
    """limits_int4(scale, limits, at): fill limits[at : at + 8], int16, for `quantize32_int4` of BF16."""
    return types.none(types.float32, limits, types.intp), _limits(_INT4_TIES)


@intrinsic
def limits_int3(typing, scale, limits, at):
    """limits_int3(scale, limits, at): as limits_int4."""
    return types.none(types.float32, limits, types.intp), _limits(_INT3_TIES)


@intrinsic
def limits_fp4(typing, scale, limits, at):
    """limits_fp4(scale, limits, at): as limits_int4."""
    return types.none(types.float32, limits, types.intp), _limits(_FP4_TIES)


@intrinsic
def amax_runs(typing, x, index, runs):
    """amax_runs(x, index, runs) -> largest magnitude bits of 32 * runs values from `index` on."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        lanes = _WORDS if sig.args[0].dtype == types.uint32 else _HALVES
        width = lanes.element.width
        start = _pointer(context, b, sig.args[0], args[0], args[1], lanes)
        largest = cgutils.alloca_once_value(b, _const(lanes, 0))
        with cgutils.for_range(b, args[2]) as loop:
            bits = _load(b, b.gep(start, [loop.index]), width // 8)
            magnitude = b.and_(bits, _const(lanes, (1 << (width - 1)) - 1))
            before = b.load(largest)
            b.store(b.select(b.icmp_unsigned(">", magnitude, before), magnitude, before), largest)
        name = f"llvm.vector.reduce.umax.v{LANES}i{width}"
        reduce = cgutils.get_or_insert_function(b.module, ir.FunctionType(lanes.element, [lanes]), name)
        return b.call(reduce, [b.load(largest)])

    return x.dtype(x, types.intp, types.intp), codegen


def _quantizes(x: Any, packed: Any, limits: Any) -> Any:
    intp = types.intp
    return types.none(x, packed, intp, intp, limits, intp, types.float32)


@intrinsic
def quantize32_int4(typing, x, packed, index, to, limits, at, scale):
    """quantize32_int4(x, packed, index, to, limits, at, scale): 32 values of one group, `index` on, as bytes.

    They go to `packed` from `to` on. `limits`, from `at` on, is what BF16 values are compared with; others
    are divided by `scale`.
    """
    return _quantizes(x, packed, limits), _quantizer(_INT4_TIES, 4, True)


@intrinsic
def quantize32_int3(typing, x, packed, index, to, limits, at, scale):
    """As quantize32_int4, to 12 bytes."""
    return _quantizes(x, packed, limits), _quantizer(_INT3_TIES, 3, True)


@intrinsic
def quantize32_fp4(typing, x, packed, index, to, limits, at, scale):
    """As quantize32_int4, to E2M1."""
    return _quantizes(x, packed, limits), _quantizer(_FP4_TIES, 4, False)


def _dequantizes(packed: Any, out: Any) -> Any:
    return types.none(packed, out, types.intp, types.intp, types.float32, types.float32)


@intrinsic
def dequantize32_int4(typing, packed, out, index, to, scale, scale16):
    """dequantize32_int4(packed, out, index, to, scale, scale16): 32 products from 16 bytes, `index` on.

    The last 16 are with `scale16`. Any scales; every NaN is the canonical one.
    """
    return _dequantizes(packed, out), _dequantizer(4, True)


@intrinsic
def dequantize32_int3(typing, packed, out, index, to, scale, scale16):
    """As dequantize32_int4, from 12 bytes."""
    return _dequantizes(packed, out), _dequantizer(3, True)


@intrinsic
def dequantize32_fp4(typing, packed, out, index, to, scale, scale16):
    """As dequantize32_int4, from E2M1."""
    return _dequantizes(packed, out), _dequantizer(4, False)
