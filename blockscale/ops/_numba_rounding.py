"""CPU kernels of `blockscale/reference/rounding.py`, compiled by numba, bit-equal to it.

A strip is `LANES` rows of the block, one a lane, with one candidate: they do not depend on each other. A
column is updated when its turn comes, by all columns before it at once and in their order: the same
operations on every element as if each column had updated those after it, but the element stays in a register.
The kernels release the GIL, and each call is single-threaded: threads split the strips.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from blockscale.ops._numba_kernels import _jit
from blockscale.ops._simd import F32, I32, I64, _load, _pointer, as_bits, as_float
from blockscale.reference.rounding import Grid

LANES = 64  # eight AVX2 registers, enough to hide how long a subtraction takes


def grid_numbers(grid: Grid) -> tuple[np.float32, np.float32, np.float32]:
    """Of a grid, as the kernels take it."""
    return np.float32(grid.largest), np.float32(grid.smallest_normal), np.float32(grid.to_last_bit)


@intrinsic
def _subtract_products(typing, values, at, rows, factors, first, count):
    """values[at : at + LANES] -= rows[j * LANES : (j + 1) * LANES] * factors[first + j], j < count, in order.

    All flat float32 arrays; product and difference are rounded one after the other.
    """

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        vector = ir.VectorType(F32, LANES)
        lanes = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
        target = _pointer(context, b, sig.args[0], args[0], args[1], vector)
        row = _pointer(context, b, sig.args[2], args[2], I64(0), vector)
        factor = _pointer(context, b, sig.args[3], args[3], args[4], F32)
        total = cgutils.alloca_once_value(b, _load(b, target, 4))
        with cgutils.for_range(b, args[5]) as loop:
            undefined = ir.Constant(vector, ir.Undefined)
            single = b.insert_element(undefined, b.load(b.gep(factor, [loop.index])), I32(0))
            many = b.shuffle_vector(single, undefined, lanes)
            product = b.fmul(_load(b, b.gep(row, [loop.index]), 4), many)
            b.store(b.fsub(b.load(total), product), total)
        b.store(b.load(total), target).align = 4
        return context.get_dummy_value()

    return types.none(values, types.intp, rows, factors, types.intp, types.intp), codegen


@_jit
def _to_grid(x, grid):
    """The number of the grid nearest to x: ties to even, saturating, a zero keeps its sign."""
    largest, smallest_normal, to_last_bit = grid
    bits = as_bits(x)
    magnitude = as_float(np.uint32(bits & 0x7FFFFFFF))
    magnitude = largest if magnitude > largest else magnitude
    binade = as_float(np.uint32(as_bits(magnitude) & 0x7F800000))
    binade = smallest_normal if binade < smallest_normal else binade
    # The sum has its last bit where a number of the grid has its own.
    rounder = binade * to_last_bit
    rounded = (magnitude + rounder) - rounder
    return as_float(np.uint32(as_bits(rounded) | (bits & 0x80000000)))


@_jit
def _round_lanes(work, codes, errors, loss, scale, diagonal, grid):
    for lane in range(LANES):
        s = scale[lane]
        code = _to_grid(work[lane] / s, grid)
        error = (work[lane] - code * s) / diagonal
        codes[lane] = code
        errors[lane] = error
        loss[lane] += error * error


@_jit
def _descend_lanes(work, codes, changes, scale, diagonal, grid):
    for lane in range(LANES):
        s = scale[lane]
        before = codes[lane] * s
        code = _to_grid((before + work[lane] / diagonal) / s, grid)
        codes[lane] = code
        changes[lane] = code * s - before


@_jit
def _transposed(source, target, first, count):
    """target[k * LANES + r] = source[first + r, k]; lanes past `count` are zeros."""
    for row in range(count):
        for column in range(source.shape[1]):
            target[column * LANES + row] = source[first + row, column]


@_jit
def _put_back(source, target, first, count):
    """The inverse of _transposed."""
    for row in range(count):
        for column in range(target.shape[1]):
            target[first + row, column] = source[column * LANES + row]


@_jit
def round_columns(columns, factor, scale, group_size, grid, outputs, strips):
    """Strips of `reference.rounding.round_columns`: strip t has candidate t // T and rows t % T * LANES on.

    T = ceil(N / LANES). columns (N, B), factor (B, B) TRANSPOSED, scale (F, N, G), outputs codes and errors
    (F, N, B), loss (F, N): float32, contiguous. `grid`: of `grid_numbers`.
    """
    codes, errors, loss = outputs
    rows, width = columns.shape
    tiles = (rows + LANES - 1) // LANES
    work = np.zeros(width * LANES, np.float32)
    q, e = np.zeros(width * LANES, np.float32), np.zeros(width * LANES, np.float32)
    spread = np.ones(LANES, np.float32)
    flat = factor.reshape(-1)
    for strip in range(strips[0], strips[1]):
        candidate, first = strip // tiles, strip % tiles * LANES
        count = min(LANES, rows - first)
        _transposed(columns, work, first, count)
        total = np.zeros(LANES, np.float32)
        for k in range(width):
            if k % group_size == 0:
                spread[:count] = scale[candidate, first : first + count, k // group_size]
            here, past = k * LANES, (k + 1) * LANES
            _subtract_products(work, here, e, flat, k * width, k)
            _round_lanes(work[here:past], q[here:past], e[here:past], total, spread, factor[k, k], grid)
        _put_back(q, codes[candidate], first, count)
        _put_back(e, errors[candidate], first, count)
        loss[candidate, first : first + count] = total[:count]


@_jit
def descend_columns(slope, codes, norm, scale, group_size, grid, result, strips):
    """Strips of `reference.rounding.descend_columns`; strip t has rows t * LANES on.

    slope, codes and result (N, B), norm (B, B) TRANSPOSED, scale (N, G): float32, contiguous.
    """
    rows, width = slope.shape
    work = np.zeros(width * LANES, np.float32)
    q, changes = np.zeros(width * LANES, np.float32), np.zeros(width * LANES, np.float32)
    spread = np.ones(LANES, np.float32)
    flat = norm.reshape(-1)
    for strip in range(strips[0], strips[1]):
        first = strip * LANES
        count = min(LANES, rows - first)
        _transposed(slope, work, first, count)
        _transposed(codes, q, first, count)
        for k in range(width):
            if k % group_size == 0:
                spread[:count] = scale[first : first + count, k // group_size]
            here, past = k * LANES, (k + 1) * LANES
            _subtract_products(work, here, changes, flat, k * width, k)
            _descend_lanes(work[here:past], q[here:past], changes[here:past], spread, norm[k, k], grid)
        _put_back(q, result, first, count)
