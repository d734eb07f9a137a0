"""Block-scaled FP8 GEMM for any M, dense and grouped contiguous, on SM89 and newer.

    out[m, n] = sum_g a_scale[m, g] * b_scale[n // 128, g] * (sum_{k in g} a[m, k] * b[n, k]) + bias[n]

One program computes a (BLOCK_M, BLOCK_N) tile of out in steps of one group of 128 along K: the tensor cores
sum a group's products (on Hopper in registers that keep about 14 bits, hence not over more than a group),
then the partial sum is scaled and added in float32. No block is wider than the 128 columns that share a
weight scale, so the scale of a step is one number per row. Rounded once, to nearest even, to the dtype of
out.

Layouts: a (M, K) and b (N, K) or (E, N, K) row-major; a_scale (M, G) of any strides, best when a column is
contiguous; b_scale (..., ceil(N/128), G) and out (M, N) row-major. Programs walk groups of GROUP_M row tiles
column by column, so that programs that run together share tiles of a and b in L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from blockscale.ops._triton import device
from blockscale.ops._triton.device import cdiv
from blockscale.ops._triton.launch import quick

_GROUP_M = 8


@dataclass(frozen=True)
class TileConfig:
    """How one GEMM is cut up: rows and columns of a tile, stages of loads in flight, warps of a program."""

    block_m: int
    block_n: int
    stages: int
    warps: int


# Two warpgroups of 64 rows; a smaller tile would ask L2 for more bytes than it gives.
_HOPPER = TileConfig(128, 128, 4, 8)
# Few rows: half the tile, so that padding costs less.
_HOPPER_FEW_ROWS = TileConfig(64, 128, 4, 4)
# 99 KB of shared memory a program, and mma.sync keeps both operands in registers.
_ADA = TileConfig(64, 128, 3, 4)


@triton.jit
def tile_of_program(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column tile of this program."""
    program = tl.program_id(0)
    in_group = GROUP_M * tiles_n
    first_m = (program // in_group) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (program % in_group) % height, (program % in_group) // height


# M changes from call to call: a new value must not mean a new compilation.
@quick
@triton.jit(do_not_specialize=["M", "stride_scale_g"])
def _fp8_gemm_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    m_indices_ptr,
    out_ptr,
    M,
    N,
    K,
    E,
    stride_scale_m,
    stride_scale_g,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    tile_m, tile_n = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0 = tile_m.to(tl.int64) * BLOCK_M
    n0 = tile_n.to(tl.int64) * BLOCK_N
    groups = tl.cdiv(K, 128)
    row = tl.arange(0, BLOCK_M)
    valid = row < M - m0
    steps = groups
    if m_indices_ptr is not None:
        expert = tl.load(m_indices_ptr + m0).to(tl.int64)
        known = (expert >= 0) & (expert < E)
        steps = tl.where(known, groups, 0)  # a tile of padding: nothing is multiplied, zeros are stored
        expert = tl.where(known, expert, 0)
        b_ptr += expert * N * K
        b_scale_ptr += expert * tl.cdiv(N, 128) * groups
        padding = tl.load(m_indices_ptr + m0 + row, mask=valid, other=-1) < 0

    column = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n0).to(tl.int32)  # past the end: loaded, never stored
    k = tl.arange(0, 128)
    a_ptrs = a_ptr + m0 * K + (row[:, None] * K + k[None, :])  # (BLOCK_M, 128)
    b_ptrs = b_ptr + n0 * K + (column[:, None] * K + k[None, :])  # (BLOCK_N, 128)
    a_scale_ptrs = a_scale_ptr + (m0 + row) * stride_scale_m  # (BLOCK_M,)
    b_scale_ptr += n0 // 128 * groups

    # The compiler's pipeline leaves scales alone: they are loaded one step ahead by hand.
    a_scale = tl.load(a_scale_ptrs, mask=valid, other=0.0)
    b_scale = tl.load(b_scale_ptr)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=valid[:, None], other=0.0)
            b = tl.load(b_ptrs)
        else:
            inside = k[None, :] < K - step * 128
            a = tl.load(a_ptrs, mask=valid[:, None] & inside, other=0.0)
            b = tl.load(b_ptrs, mask=inside, other=0.0)
        a_ptrs += 128
        b_ptrs += 128
        a_scale_ptrs += stride_scale_g
        following = step + 1
        present = row < tl.where(following < steps, M - m0, 0)
        next_a = tl.load(a_scale_ptrs, mask=present, other=0.0)
        next_b = tl.load(b_scale_ptr + following, mask=following < steps, other=0.0)
        total += tl.dot(a, b.T) * (a_scale * b_scale)[:, None]
        a_scale, b_scale = next_a, next_b

    column = tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n0 + column, mask=column < N - n0, other=0.0).to(tl.float32)[None, :]
    if m_indices_ptr is not None:
        total = tl.where(padding[:, None], 0.0, total)
    out_ptrs = out_ptr + m0 * N + n0 + (row[:, None] * N + column[None, :])
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (column < N - n0)[None, :])


def choose_tile(rows: int, target: torch.device, capability: tuple[int, int] | None = None) -> TileConfig:
    """The tile for a GEMM of that many rows; `capability` stands in for the device's own."""
    if (capability or device.capability(target)) < (9, 0):
        return _ADA
    return _HOPPER_FEW_ROWS if rows <= 64 else _HOPPER


def fp8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Launch on arguments that passed `gemm_checks.dense_output`; see `reference.gemm.fp8_gemm_nt`."""
    return _launch((a, a_scale, b, b_scale), bias, None, out, config or choose_tile(a.shape[0], a.device))


def m_grouped_fp8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    m_indices: torch.Tensor,
    out: torch.Tensor,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Launch on arguments that passed `gemm_checks.contiguous_output`; see the reference of that name.

    block_m must divide 128: then a tile has one expert.
    """
    config = config or choose_tile(a.shape[0], a.device)
    return _launch((a, a_scale, b, b_scale), None, m_indices, out, config)


def _launch(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    m_indices: torch.Tensor | None,
    out: torch.Tensor,
    config: TileConfig,
) -> torch.Tensor:
    a, a_scale, b, b_scale = operands
    (m, k), n = a.shape, b.shape[-2]
    if m == 0:
        return out
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n),)
    with device.current(a.device):
        _fp8_gemm_kernel[grid](
            a,
            a_scale,
            b,
            b_scale,
            bias,
            m_indices,
            out,
            m,
            n,
            k,
            b.shape[0] if m_indices is not None else 1,
            a_scale.stride(0),
            a_scale.stride(1),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            GROUP_M=_GROUP_M,
            EVEN_K=k % 128 == 0,
            num_stages=config.stages,
            num_warps=config.warps,
        )
    return out
