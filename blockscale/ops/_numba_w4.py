"""CPU kernel that dequantizes prepared four-bit weights, compiled by numba (layout: `reference/w4.py`).

The sixteen values that codes of a block can have are rounded to the format of the result once, and looked up
then. Blocks share a scale: a whole group of INT4, 32 columns of MXFP4.
"""

from __future__ import annotations

import numpy as np

from blockscale.ops._numba_kernels import _jit
from blockscale.ops._simd import as_bits, as_float

_BLOCK, _GROUP, _HALF = 32, 128, 64
_UNIT = 6  # the exponent in a scale of MXFP4 at which values are those of E2M1


@_jit
def _fill_int4(table, scale):
    """Bits of magnitude * 2**-9 * scale, with the sign of bit 3."""
    for code in range(16):
        magnitude = np.float32((code & 7) / np.float32(512.0))
        table[code] = as_bits(np.float32((-magnitude if code & 8 else magnitude) * scale))


@_jit
def _fill_mxfp4(table, values, scale, exponent):
    """Bits of values (8,) * 2**(exponent - 6) * scale, with the sign of bit 3."""
    power = as_float(np.uint32((127 + exponent - _UNIT) << 23))
    for code in range(16):
        magnitude = np.float32(values[code & 7] * power)
        table[code] = as_bits(np.float32((-magnitude if code & 8 else magnitude) * scale))


@_jit
def _narrow(table, out):
    """Float32 bits (16,) as the bits that `out` (16,) has: the same, or BF16 rounded to nearest even."""
    for code in range(16):
        bits = np.int64(table[code])
        if out.itemsize == 4:
            out[code] = bits
        elif (bits & 0x7FFFFFFF) > 0x7F800000:
            out[code] = 0x7FC0
        else:
            out[code] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@_jit
def dequantize(words, scale, out, values, strips):
    """Rows strips[0]:strips[1] of out (E * N, K), bits of float32 or BF16.

    words: uint8 (E, G, N, 64), signs above their magnitudes; scale: float32 (E, G, N); values: float32 (8,)
    of the magnitudes of MXFP4 as they are stored, or empty for INT4.
    """
    groups, n, cols = words.shape[1], words.shape[2], out.shape[1]
    wide, table = np.empty(16, np.uint32), np.empty((4, 16), out.dtype)
    for row in range(strips[0], strips[1]):
        expert, own = row // n, row % n
        for group in range(groups):
            factor = scale[expert, group, own]
            if values.size == 0:
                _fill_int4(wide, factor)
                _narrow(wide, table[0])
            else:
                bits = np.int64(as_bits(factor))
                whole = as_float(np.uint32(bits & 0xFFFF0000))
                for block in range(4):
                    _fill_mxfp4(wide, values, whole, (bits >> (4 * block)) & 15)
                    _narrow(wide, table[block])
            data, first = words[expert, group, own], group * _GROUP
            for half in range(2):
                for part in range(2):
                    start = first + half * _HALF + part * _BLOCK
                    line = table[0 if values.size == 0 else 2 * half + part]
                    target = out[row, start : min(start + _BLOCK, cols)]
                    for i in range(target.size):
                        target[i] = line[(data[part * _BLOCK + i] >> (4 * half)) & 15]
