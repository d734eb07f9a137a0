"""CPU kernels of the formats below 8 bits, compiled by numba, bit-equal to `blockscale/reference/group.py`.

A strip is a row of the weight, all experts counted through; arrays are (rows, ...) and contiguous, weights as
the integer type that carries their bits (`_simd.py`). Rows are worked through in runs of 32 columns
(`_simd_group.py`); a run that is cut off by the end of the row goes through memory of its own, filled up with
zeros. The kernels release the GIL, and each call is single-threaded: threads split the strips.

A kernel takes the sort of code as a number and branches on it at every run, always the same way.
"""

from __future__ import annotations

import numpy as np

from blockscale.ops._numba_kernels import _amax, _jit
from blockscale.ops._simd import LANES, as_bits, as_float
from blockscale.ops._simd_group import (
    amax_runs,
    dequantize32_fp4,
    dequantize32_int3,
    dequantize32_int4,
    limits_fp4,
    limits_int3,
    limits_int4,
    quantize32_fp4,
    quantize32_int3,
    quantize32_int4,
)

INT4, INT3, FP4 = 0, 1, 2  # sorts of codes
_MIN_SCALE = np.float32(2.0**-126)
_INF = np.float32(np.inf)
_ZERO = np.float32(0.0)
_ONE_BITS = 0x3F800000


@_jit
def _scale_bits(amax, largest, pow2):
    """Float32 bits of a scale that bf16, or E8M0, can hold."""
    if amax == _ZERO:
        return np.int64(_ONE_BITS)
    bits = np.int64(as_bits(max(np.float32(amax / largest), _MIN_SCALE)))
    if pow2:
        return (bits + 0x7FFFFF) & 0xFF800000
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000


@_jit
def _fill_limits(sort, scale, limits, at):
    if sort == INT4:
        limits_int4(scale, limits, at)
    elif sort == INT3:
        limits_int3(scale, limits, at)
    else:
        limits_fp4(scale, limits, at)


@_jit
def _quantize_run(sort, x, packed, index, to, limits, at, scale):
    if sort == INT4:
        quantize32_int4(x, packed, index, to, limits, at, scale)
    elif sort == INT3:
        quantize32_int3(x, packed, index, to, limits, at, scale)
    else:
        quantize32_fp4(x, packed, index, to, limits, at, scale)


@_jit
def _dequantize_run(sort, packed, out, index, to, scale, scale16):
    if sort == INT4:
        dequantize32_int4(packed, out, index, to, scale, scale16)
    elif sort == INT3:
        dequantize32_int3(packed, out, index, to, scale, scale16)
    else:
        dequantize32_fp4(packed, out, index, to, scale, scale16)


@_jit
def _row_scales(x, row, factors, limits, sort, group_size, largest, pow2):
    """Scales of a row, and what its BF16 values are compared with; False if one of them is NaN or Inf."""
    cols = x.shape[1]
    x_flat = x.reshape(-1)
    for group in range(factors.size):
        start, stop = group * group_size, min(group * group_size + group_size, cols)
        runs = (stop - start) // LANES
        amax = amax_runs(x_flat, row * cols + start, runs)
        if runs * LANES < stop - start:
            amax = _amax(x_flat, row * cols + start + runs * LANES, row * cols + stop, amax)
        if not as_float(amax) < _INF:
            return False
        factors[group] = as_float(np.uint32(_scale_bits(as_float(amax), largest, pow2)))
        _fill_limits(sort, factors[group], limits, group * 8)
    return True


@_jit
def quantize(x, packed, scale, sort, group_size, largest, strips):
    """Quantize rows strips[0]:strips[1] of x (rows, K); returns 1 at the first NaN or Inf, else 0.

    packed: uint8 (rows, bytes); scale: (rows, groups), uint16 for bf16 or uint8 for E8M0; largest: float32
    that the amax is divided by. All scales of a row come before its codes: they do not wait for each other,
    but the codes of a group do for its scale.
    """
    cols, width, groups = x.shape[1], packed.shape[1], scale.shape[1]
    x_flat, packed_flat = x.reshape(-1), packed.reshape(-1)
    pow2 = scale.itemsize == 1
    shift = 23 if pow2 else 16
    run_bytes = 12 if sort == INT3 else 16
    factors, limits = np.empty(groups, np.float32), np.empty(groups * 8, np.int16)
    rest, rest_packed = np.zeros(LANES, x.dtype), np.zeros(16, np.uint8)
    whole = cols // LANES * LANES
    for row in range(strips[0], strips[1]):
        if not _row_scales(x, row, factors, limits, sort, group_size, largest, pow2):
            return 1
        to = row * width
        for group in range(groups):
            factor = factors[group]
            scale[row, group] = as_bits(factor) >> shift
            first = group * group_size
            for column in range(first, min(first + group_size, whole), LANES):
                _quantize_run(sort, x_flat, packed_flat, row * cols + column, to, limits, group * 8, factor)
                to += run_bytes
        if whole < cols:
            rest[: cols - whole] = x[row, whole:]
            last = groups - 1
            _quantize_run(sort, rest, rest_packed, 0, 0, limits, last * 8, factors[last])
            packed[row, to - row * width :] = rest_packed[: (row + 1) * width - to]
    return 0


@_jit
def dequantize(packed, scale, out, sort, group_bits, strips):
    """Rows strips[0]:strips[1] of out (rows, K) = values of codes * scale, rounded to the format of out.

    packed: uint8 (rows, bytes); scale: float32 (rows, groups); group_bits: log2 of the group size.
    """
    cols, width, groups = out.shape[1], packed.shape[1], scale.shape[1]
    out_flat, packed_flat, scale_flat = out.reshape(-1), packed.reshape(-1), scale.reshape(-1)
    run_bytes = 12 if sort == INT3 else 16
    rest, rest_packed = np.zeros(LANES, out.dtype), np.zeros(16, np.uint8)
    half = LANES // 2
    for row in range(strips[0], strips[1]):
        start = row * width
        for column in range(0, cols, LANES):
            s = scale_flat[row * groups + (column >> group_bits)]
            s16 = scale_flat[row * groups + min((column + half) >> group_bits, groups - 1)]
            at = row * cols + column
            if column + LANES <= cols:
                _dequantize_run(sort, packed_flat, out_flat, start, at, s, s16)
                start += run_bytes
                continue
            end = (row + 1) * width
            rest_packed[: end - start] = packed_flat[start:end]
            _dequantize_run(sort, rest_packed, rest, 0, 0, s, s16)
            out_flat[at : at + cols - column] = rest[: cols - column]
