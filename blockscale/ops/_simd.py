"""What numba cannot express at full speed, as LLVM intrinsics: narrow integers and 32-lane vectors.

Formats are told apart by the integer type that carries their bits, here and in `_numba_kernels.py`:

    uint16 = bfloat16      int16 = float16      uint32 = float32      uint8 = float8_e4m3fn

Scalar intrinsics (`as_float`, `abs_max`, `e4m3_from_float`, ...) exist because numba widens every small
integer to 64 bits, after which LLVM no longer vectorizes the loop well; written as LLVM operations on the
narrow types, a plain loop over them does vectorize. The `..32` intrinsics process 32 elements at raw offsets
of flat arrays, so there is no bounds check, index wraparound or array slice (reference counts) in the hot
loop.

numba's on-disk cache looks only at the file a kernel is in: after editing this file, delete `__pycache__`
(the tests use a cache of their own that is keyed on both files).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numba.np import arrayobj

LANES = 32
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
F16 = ir.HalfType()
FLOAT_FORMATS = (types.uint16, types.int16, types.uint32)
# Canonical quiet NaN of each format.
_NAN = {types.uint16: 0x7FC0, types.int16: 0x7E00, types.uint32: 0x7FC00000}


def _like(shape: ir.Type, element: ir.Type) -> ir.Type:
    """`element`, or a vector of it if `shape` is a vector."""
    return ir.VectorType(element, shape.count) if isinstance(shape, ir.VectorType) else element


def _const(ty: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(ty, [value] * ty.count if isinstance(ty, ir.VectorType) else value)


def _splat(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The scalar in every one of 32 lanes."""
    vector = ir.VectorType(value.type, LANES)
    single = b.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return b.shuffle_vector(single, ir.Constant(vector, ir.Undefined), _const(ir.VectorType(I32, LANES), 0))


def _pointer(
    context: Any, b: ir.IRBuilder, array_type: Any, array: ir.Value, index: ir.Value, to: ir.Type
) -> ir.Value:
    """Address of element `index` of a flat array, typed as a pointer to `to`."""
    data = arrayobj.make_array(array_type)(context, b, array).data
    return b.bitcast(b.gep(data, [index]), to.as_pointer())


def _load(b: ir.IRBuilder, pointer: ir.Value, align: int) -> ir.Value:
    value = b.load(pointer)
    value.align = align
    return value


def _emit_as_float(b: ir.IRBuilder, fmt: Any, bits: ir.Value) -> ir.Value:
    """Exact float32 of BF16, F16 or F32 bits (scalar or vector)."""
    floats = _like(bits.type, F32)
    if fmt == types.uint16:
        wide = _like(bits.type, I32)
        return b.bitcast(b.shl(b.zext(bits, wide), _const(wide, 16)), floats)
    if fmt == types.int16:
        return b.fpext(b.bitcast(bits, _like(bits.type, F16)), floats)
    return b.bitcast(bits, floats)


def _emit_from_float(b: ir.IRBuilder, fmt: Any, value: ir.Value) -> ir.Value:
    """Bits of a float32 that is not NaN, rounded to nearest even to BF16, F16 or F32 (scalar or vector)."""
    wide = _like(value.type, I32)
    if fmt == types.int16:
        return b.bitcast(b.fptrunc(value, _like(value.type, F16)), _like(value.type, I16))
    bits = b.bitcast(value, wide)
    if fmt == types.uint32:
        return bits
    odd = b.and_(b.lshr(bits, _const(wide, 16)), _const(wide, 1))
    rounded = b.add(b.add(bits, _const(wide, 0x7FFF)), odd)
    return b.trunc(b.lshr(rounded, _const(wide, 16)), _like(value.type, I16))


def _emit_e4m3(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """E4M3 codes of float32 values, rounded to nearest even, saturating, NaN as 0x7F (scalar or vector)."""
    words = _like(value.type, I32)

    def number(constant: int) -> ir.Constant:
        return _const(words, constant)

    bits = b.bitcast(value, words)
    magnitude = b.and_(bits, number(0x7FFFFFFF))
    # Normal result: rebias the exponent (127 -> 7) and round away 20 of 23 mantissa bits, ties to even.
    odd = b.and_(b.lshr(magnitude, number(20)), number(1))
    rounded = b.add(b.add(magnitude, number(0x7FFFF)), odd)
    normal = b.lshr(b.sub(rounded, number(120 << 23)), number(20))
    normal = b.select(b.icmp_unsigned("<", normal, number(0x7E)), normal, number(0x7E))
    # Subnormal result (below 2**-6): adding 2**14 makes the hardware round to multiples of 2**-9.
    shifted = b.fadd(b.bitcast(magnitude, value.type), _const(value.type, 16384.0))
    subnormal = b.sub(b.bitcast(shifted, words), number(0x46800000))
    code = b.select(b.icmp_signed(">=", magnitude, number(121 << 23)), normal, subnormal)
    code = b.or_(code, b.and_(b.lshr(bits, number(24)), number(0x80)))
    code = b.select(b.icmp_signed(">", magnitude, number(0x7F800000)), number(0x7F), code)
    return b.trunc(code, _like(value.type, I8))


def _emit_half_of_e4m3(b: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    """float32 of E4M3 codes times 2**-8: E4M3 bits shifted into a float16, whose exponent bias is 8 larger.

    Exact, subnormals included; the NaN code comes out as 480 * 2**-8.
    """
    wide = _like(codes.type, I16)
    signed = b.sext(codes, wide)
    magnitude = b.and_(b.shl(signed, _const(wide, 7)), _const(wide, 0x3F80))
    half = b.or_(magnitude, b.and_(signed, _const(wide, 0x8000)))
    return b.fpext(b.bitcast(half, _like(codes.type, F16)), _like(codes.type, F32))


def _is_nan_code(b: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    mask = _const(codes.type, 0x7F)
    return b.icmp_unsigned("==", b.and_(codes, mask), mask)


@intrinsic
def as_float(typing, bits):
    """as_float(bits) -> float32: the value of BF16, F16 or F32 bits, exact."""
    if bits not in FLOAT_FORMATS:
        raise TypingError("as_float takes uint16, int16 or uint32")
    return types.float32(bits), lambda context, b, sig, args: _emit_as_float(b, sig.args[0], args[0])


@intrinsic
def as_bits(typing, value):
    """as_bits(value) -> uint32: the bit pattern of a float32."""
    return types.uint32(types.float32), lambda context, b, sig, args: b.bitcast(args[0], I32)


@intrinsic
def abs_max(typing, largest, bits):
    """abs_max(largest, bits) -> max(largest, bits without its sign), as unsigned integers of one type.

    On floating-point bits this is the order of magnitudes, with Inf above every number and NaN above Inf.
    """

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        magnitude = b.and_(args[1], ir.Constant(args[1].type, (1 << (args[1].type.width - 1)) - 1))
        return b.select(b.icmp_unsigned(">", args[0], magnitude), args[0], magnitude)

    return bits(bits, bits), codegen


@intrinsic
def e4m3_from_float(typing, value):
    """e4m3_from_float(value) -> uint8: round to nearest even, saturating at 448; every NaN gives 0x7F."""
    return types.uint8(types.float32), lambda context, b, sig, args: _emit_e4m3(b, args[0])


@intrinsic
def direct32(typing, x, codes, index, scale):
    """direct32(x, codes, index, scale): 32 codes e4m3(float32(x) / scale), from BF16, F16 or F32."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        fmt = sig.args[0].dtype
        lanes = ir.VectorType(I32 if fmt == types.uint32 else I16, LANES)
        bits = _load(b, _pointer(context, b, sig.args[0], args[0], args[2], lanes), lanes.element.width // 8)
        quotient = b.fdiv(_emit_as_float(b, fmt, bits), _splat(b, args[3]))
        at = _pointer(context, b, sig.args[1], args[1], args[2], ir.VectorType(I8, LANES))
        b.store(_emit_e4m3(b, quotient), at).align = 1
        return context.get_dummy_value()

    return types.none(x, codes, types.intp, types.float32), codegen


@intrinsic
def quantize32(typing, x, codes, index, table, row):
    """quantize32(x, codes, index, table, row) -> bool: 32 BF16 values of one block, by table (AVX2).

    As long as no result is an E4M3 subnormal, the code of x depends on its exponent e only through + 8 * e,
    and on its 7-bit mantissa m through a step function, in which two steps are at least 8 apart: each 8
    mantissas see one at most.

        code = (8 * e + base[m // 8] + [m > threshold[m // 8]]) mod 256

    `table` holds (from `row`, `mantissa_table` in `_numba_kernels.py`) base and threshold, 16 entries each
    repeated twice (a byte shuffle looks up within 16 bytes), and 32 times the smallest upper-seven exponent
    bits that are safe. Returns True if a nonzero value was below that limit: its code is not valid and the
    caller redoes the 32 elements.
    """
    signature = types.boolean(x, codes, types.intp, table, types.intp)

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        bytes32, words16 = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
        pack_type = ir.FunctionType(bytes32, [words16, words16])
        pack = cgutils.get_or_insert_function(b.module, pack_type, "llvm.x86.avx2.packuswb")
        look_up_type = ir.FunctionType(bytes32, [bytes32, bytes32])
        look_up = cgutils.get_or_insert_function(b.module, look_up_type, "llvm.x86.avx2.pshuf.b")
        rows = _pointer(context, b, sig.args[3], args[3], args[4], bytes32)
        base, threshold, limit = (_load(b, b.gep(rows, [I64(number)]), 1) for number in range(3))
        x_at = _pointer(context, b, sig.args[0], args[0], args[2], words16)
        codes_at = _pointer(context, b, sig.args[1], args[1], args[2], bytes32)

        def packed(shift: int, mask: int) -> ir.Value:
            halves = [b.and_(b.lshr(word, _const(words16, shift)), _const(words16, mask)) for word in words]
            return b.call(pack, halves)

        words = [_load(b, b.gep(x_at, [I64(half)]), 2) for half in range(2)]
        low = packed(0, 0xFF)  # exponent bit 0, mantissa
        high = packed(8, 0xFF)  # sign, exponent bits 7..1
        exponent8 = packed(4, 0xF8)
        mantissa = b.and_(low, _const(bytes32, 0x7F))
        eighth = b.lshr(mantissa, _const(bytes32, 3))
        above = b.sext(b.icmp_signed(">", mantissa, b.call(look_up, [threshold, eighth])), bytes32)
        code = b.sub(b.add(exponent8, b.call(look_up, [base, eighth])), above)

        high7 = b.and_(high, _const(bytes32, 0x7F))
        zero = b.icmp_unsigned("==", b.or_(high7, low), _const(bytes32, 0))
        code = b.select(zero, _const(bytes32, 0), code)
        code = b.or_(code, b.and_(high, _const(bytes32, 0x80)))
        # Packing interleaves the 64-bit quarters of the two loads: put them back in order.
        quarters = ir.VectorType(I64, 4)
        order = ir.Constant(ir.VectorType(I32, 4), [0, 2, 1, 3])
        code = b.shuffle_vector(b.bitcast(code, quarters), ir.Constant(quarters, ir.Undefined), order)
        b.store(b.bitcast(code, bytes32), codes_at).align = 1
        too_small = b.and_(b.icmp_signed("<", high7, limit), b.not_(zero))
        return b.icmp_unsigned("!=", b.bitcast(too_small, I32), I32(0))

    return signature, codegen


def _dequantizer(vector: bool) -> Callable[..., Any]:
    """Generator of dequantize32 (fast: finite scales below 2**120) and dequantize1 (any scale)."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        fmt = sig.args[1].dtype
        byte = ir.VectorType(I8, LANES) if vector else I8
        bits_type = _like(byte, I32 if fmt == types.uint32 else I16)
        codes = _load(b, _pointer(context, b, sig.args[0], args[0], args[2], byte), 1)
        value = _emit_half_of_e4m3(b, codes)
        nan = _is_nan_code(b, codes)
        if vector:
            # 2**8 goes into the scale, which is exact; the product is rounded once, as that of the reference.
            product = b.fmul(value, _splat(b, b.fmul(args[3], ir.Constant(F32, 256.0))))
        else:
            product = b.fmul(b.fmul(value, ir.Constant(F32, 256.0)), args[3])
            nan = b.or_(nan, b.fcmp_unordered("uno", product, product))
        bits = b.select(nan, _const(bits_type, _NAN[fmt]), _emit_from_float(b, fmt, product))
        store = b.store(bits, _pointer(context, b, sig.args[1], args[1], args[2], bits_type))
        store.align = 4 if fmt == types.uint32 else 2
        return context.get_dummy_value()

    return codegen


@intrinsic
def dequantize32(typing, codes, out, index, scale):
    """dequantize32(codes, out, index, scale): 32 products codes * scale, rounded to the format of `out`.

    The scale must be finite and below 2**120. NaN codes give the canonical NaN.
    """
    return types.none(codes, out, types.intp, types.float32), _dequantizer(vector=True)


@intrinsic
def dequantize1(typing, codes, out, index, scale):
    """dequantize1(codes, out, index, scale): one product, with any scale, NaN and Inf included."""
    return types.none(codes, out, types.intp, types.float32), _dequantizer(vector=False)
