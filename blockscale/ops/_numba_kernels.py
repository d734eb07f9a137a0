"""CPU kernels of the block-scaled E4M3 casts, compiled by numba, bit-equal to `blockscale/reference/fp8.py`.

All take (E, N, K) contiguous arrays of bit patterns (which integer type carries which format: `_simd.py`) and
work on a range of strips. A strip is the `block_n` rows of one expert that share a row of scales; strip t
covers the rows from `(t % ceil(N / block_n)) * block_n` of expert `t // ceil(N / block_n)`. Strips are
independent, the kernels release the GIL, and each call is single-threaded: threads split the strips.

Quantization reads a strip twice, row by row: once for the amax of its blocks, once to write codes. The second
reading comes from the cache; the table way computes codes while the next strip is read. Two ways to a code:
- direct: e4m3(float32(x) / scale), a vectorized float32 loop; any input format;
- table: BF16 weights in blocks of at least `TABLE_MIN_BLOCK` values, on x86; 32 codes at a time by table
  look-up (`quantize32`). Values whose code is subnormal, and rows of a block narrower than 32, go the direct
  way.
Reading a strip in pieces that fit the second-level cache, software prefetch and non-temporal stores were
measured to be slower: what counts is that rows are read from end to end.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from blockscale.ops._simd import (
    LANES,
    abs_max,
    as_bits,
    as_float,
    dequantize1,
    dequantize32,
    direct32,
    e4m3_from_float,
    quantize32,
)

HAS_TABLE = platform.machine().lower() in ("x86_64", "amd64")
TABLE_MIN_BLOCK = 2048  # values in a block from which on building a mantissa table pays off
_TABLE_ROWS = 3  # base, threshold, limit
_E4M3_MAX = np.float32(448.0)
_MIN_SCALE = np.float32(2.0**-126)
_MAX_FAST_SCALE = np.float32(2.0**119)
_LIMIT_FACTOR = np.float32(2.0**-6)  # smallest normal E4M3
_INF = np.float32(np.inf)
_PIECE = 4096  # elements searched at a time for non-finite values


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; keep the machine code on disk where some cache directory is writable."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no writable directory for the cache
        return njit(nogil=True, error_model="numpy")(function)


@_jit
def _strip_rows(strip, n, grid_n, block_n):
    """First and one past the last row of a strip, counted through all experts."""
    top = strip // grid_n * n
    first = strip % grid_n * block_n
    return top + first, top + min(first + block_n, n)


@_jit
def _amax(x, start, stop, largest):
    # An unsigned index cannot be negative: without the wraparound of negative ones, the loop vectorizes.
    for i in range(np.uint64(start), np.uint64(stop)):
        largest = abs_max(largest, x[i])
    return largest


@_jit
def _block_scale(amax, amax_floor, pow2):
    """Scale of a block; a floor of 0 means weights, where an all-zero block gets 1."""
    if amax != amax:
        return np.float32(np.nan)
    amax = max(amax, amax_floor)
    if amax == np.float32(0.0):
        return np.float32(1.0)
    scale = max(np.float32(amax / _E4M3_MAX), _MIN_SCALE)
    if pow2 and scale < _INF:
        scale = as_float(np.uint32((as_bits(scale) + 0x7FFFFF) & 0xFF800000))
    return scale


@_jit
def _strip_amax(x, largest, rows, cols, block_k):
    """Raise `largest` (one entry a block, magnitude bits) to the amax over rows[0]:rows[1] of the flat x."""
    for row in range(rows[0], rows[1]):
        for block in range(largest.size):
            start = row * cols + block * block_k
            stop = row * cols + min(block * block_k + block_k, cols)
            largest[block] = _amax(x, start, stop, largest[block])


@_jit
def _strip_scales(largest, scale, amax_floor, pow2):
    """Turn amax bits into the scales of a strip and zero them; returns how many scales are NaN or Inf."""
    nonfinite = 0
    for block in range(scale.size):
        scale[block] = _block_scale(as_float(largest[block]), amax_floor, pow2)
        largest[block] = 0
        if not scale[block] < _INF:
            nonfinite += 1
    return nonfinite


@_jit
def _direct_rows(x, codes, scale, rows, cols, block_k):
    """Codes of rows[0]:rows[1] of the flat x in float32, given the scale of every block of the strip."""
    for row in range(rows[0], rows[1]):
        for block in range(scale.size):
            start = row * cols + block * block_k
            stop = row * cols + min(block * block_k + block_k, cols)
            if stop - start < LANES:
                _narrow(x, codes, start, stop, scale[block])
                continue
            for i in range(start, stop - LANES + 1, LANES):
                direct32(x, codes, i, scale[block])
            # The last 32 values once more: cheaper than a loop over the remainder, and the same codes.
            if (stop - start) % LANES:
                direct32(x, codes, stop - LANES, scale[block])


@_jit
def _narrow(x, codes, start, stop, scale):
    for i in range(np.uint64(start), np.uint64(stop)):
        codes[i] = e4m3_from_float(as_float(x[i]) / scale)


@_jit
def quantize_direct(x, codes, scale, block_size, amax_floor, pow2, strips):
    """Quantize strips[0]:strips[1] of x (E, N, K) in float32; returns how many scales are NaN or Inf.

    codes: uint8 (E, N, K); scale: float32 (E, ceil, ceil); amax_floor: 0 for weights; pow2: ue8m0 scales.
    """
    cols, grid_k, block_k = x.shape[2], scale.shape[2], block_size[1]
    x_flat, codes_flat, scale_flat = x.reshape(-1), codes.reshape(-1), scale.reshape(-1)
    largest = np.zeros(grid_k, x.dtype)
    nonfinite = 0
    for strip in range(strips[0], strips[1]):
        row0, row1 = _strip_rows(strip, x.shape[1], scale.shape[1], block_size[0])
        strip_scale = scale_flat[strip * grid_k : (strip + 1) * grid_k]
        _strip_amax(x_flat, largest, (row0, row1), cols, block_k)
        nonfinite += _strip_scales(largest, strip_scale, amax_floor, pow2)
        _direct_rows(x_flat, codes_flat, strip_scale, (row0, row1), cols, block_k)
    return nonfinite


@_jit
def _mantissa_table(table, scale, codes):
    """Fill `quantize32`'s table for one scale, by running the float32 path on the 128 mantissas."""
    binade = as_bits(scale) & 0xFF800000
    for mantissa in range(128):
        codes[mantissa] = e4m3_from_float(as_float(np.uint32(binade | (mantissa << 16))) / scale)
    offset = binade >> 20  # 8 times the exponent that the codes were computed at
    for entry in range(16):
        base = codes[entry * 8]
        same = 0  # how many of the 8 mantissas have the code of the first
        for mantissa in range(entry * 8, entry * 8 + 8):
            same += codes[mantissa] == base
        for copy in (entry, entry + 16):
            table[0, copy] = np.uint8((np.int64(base) - offset) & 0xFF)
            table[1, copy] = entry * 8 + same - 1
    # The compare sees exponents in steps of two: one step above that of scale * 2**-6 is surely large enough.
    table[2, :] = min(0x7F, (as_bits(np.float32(scale * _LIMIT_FACTOR)) >> 24) + 1)


@_jit
def _table_rows(x, codes, tables, scale, largest, rows, cols, block_k):
    """Codes of rows[0]:rows[1], given the table and the scale of every block of the strip.

    On the way, raises `largest` to the amax of as many of the following rows, up to rows[2]: while they come
    from memory, the codes are computed.
    """
    ahead = rows[1] - rows[0]
    for row in range(rows[0], rows[1]):
        for block in range(scale.size):
            start = row * cols + block * block_k
            stop = row * cols + min(block * block_k + block_k, cols)
            if row + ahead < rows[2]:
                largest[block] = _amax(x, start + ahead * cols, stop + ahead * cols, largest[block])
            table = block * _TABLE_ROWS * LANES
            if stop - start < LANES:
                _narrow(x, codes, start, stop, scale[block])
                continue
            for i in range(start, stop - LANES + 1, LANES):
                if quantize32(x, codes, i, tables, table):
                    direct32(x, codes, i, scale[block])
            if (stop - start) % LANES and quantize32(x, codes, stop - LANES, tables, table):
                direct32(x, codes, stop - LANES, scale[block])


@_jit
def quantize_table(x, codes, scale, block_size, pow2, strips):
    """As quantize_direct, for BF16 weights in large blocks; stops at the first strip with NaN or Inf."""
    cols, grid_k, block_k = x.shape[2], scale.shape[2], block_size[1]
    x_flat, codes_flat, scale_flat = x.reshape(-1), codes.reshape(-1), scale.reshape(-1)
    tables = np.empty((grid_k, _TABLE_ROWS, LANES), np.uint8)
    tables_flat = tables.reshape(-1)
    scratch = np.empty(128, np.uint8)
    largest = np.zeros(grid_k, x.dtype)
    seen = 0  # end of the rows whose amax is in `largest`
    for strip in range(strips[0], strips[1]):
        row0, row1 = _strip_rows(strip, x.shape[1], scale.shape[1], block_size[0])
        _strip_amax(x_flat, largest, (max(row0, seen), row1), cols, block_k)
        strip_scale = scale_flat[strip * grid_k : (strip + 1) * grid_k]
        nonfinite = _strip_scales(largest, strip_scale, np.float32(0.0), pow2)
        if nonfinite:
            return nonfinite
        for block in range(grid_k):
            _mantissa_table(tables[block], strip_scale[block], scratch)
        following = row1
        if strip + 1 < strips[1]:
            following = _strip_rows(strip + 1, x.shape[1], scale.shape[1], block_size[0])[1]
        rows = (row0, row1, following)
        _table_rows(x_flat, codes_flat, tables_flat, strip_scale, largest, rows, cols, block_k)
        seen = min(following, row1 + row1 - row0)
    return 0


@_jit
def dequantize(codes, scale, out, block_size, strips):
    """out = codes * scale for strips[0]:strips[1], rounded to the format of out (E, N, K)."""
    cols, grid_k, block_k = codes.shape[2], scale.shape[2], block_size[1]
    codes_flat, out_flat, scale_flat = codes.reshape(-1), out.reshape(-1), scale.reshape(-1)
    for strip in range(strips[0], strips[1]):
        row0, row1 = _strip_rows(strip, codes.shape[1], scale.shape[1], block_size[0])
        for row in range(row0, row1):
            for block in range(grid_k):
                s = scale_flat[strip * grid_k + block]
                start = row * cols + block * block_k
                stop = row * cols + min(block * block_k + block_k, cols)
                if stop - start < LANES or not abs(s) < _MAX_FAST_SCALE:
                    for i in range(start, stop):
                        dequantize1(codes_flat, out_flat, i, s)
                    continue
                for i in range(start, stop - LANES + 1, LANES):
                    dequantize32(codes_flat, out_flat, i, s)
                if (stop - start) % LANES:
                    dequantize32(codes_flat, out_flat, stop - LANES, s)


@_jit
def find_nonfinite(bits, limit, start, stop):
    """(count, first index or -1) of the elements of bits[start:stop] with magnitude bits >= `limit`."""
    count = 0
    position = -1
    none = np.zeros(1, bits.dtype)[0]
    for piece in range(start, stop, _PIECE):
        end = min(piece + _PIECE, stop)
        if _amax(bits, piece, end, none) < limit:
            continue
        for i in range(piece, end):
            if abs_max(none, bits[i]) >= limit:
                count += 1
                if position < 0:
                    position = i
    return count, position
