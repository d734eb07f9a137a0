"""Grouped W4A8 GEMMs: every expert's four-bit weight times the tokens it was sent.

    contiguous   out[m, n] = sum_k a[m, k] * b[m_indices[m], n, k]; rows with -1 are undefined
    masked       out[e, m, n] = sum_k a[e, m, k] * b[e, n, k] for m < masked_m[e]; other rows are not touched

(with scales as in `w4a8.py`). A program has a tile of one expert's weights and up to BLOCK_M of its tokens,
and looks up on the device how many there are. What it then computes is as narrow as the tokens allow, down to
16: with few of them reading weights is all that takes time, and every instruction counts against that.

Layouts: a (M, K) or (E, Mmax, K) and out row-major; scales of a of any strides, best when a column (of an
expert) is contiguous; the weight as in `reference/w4.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from blockscale.ops._triton import device
from blockscale.ops._triton.device import cdiv, next_power_of_2
from blockscale.ops._triton.gemm import tile_of_program
from blockscale.ops._triton.gemm_small_m import store_transposed
from blockscale.ops._triton.launch import quick
from blockscale.ops._triton.w4a8_weights import reads_whole_tiles, tokens_times_w4
from blockscale.reference.w4 import W4Weight

_SEGMENT = 128
_GROUP_M = 8


@dataclass(frozen=True)
class W4GroupedConfig:
    """Tokens and weights of a tile, stages in flight, warps, registers of a thread; block_m divides 128."""

    block_m: int
    block_n: int
    stages: int
    warps: int
    registers: int | None = None


@triton.jit
def _store_product(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    tokens,
    rows,
    N,
    K,
    stride_scale_m,
    stride_scale_g,
    WIDTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MXFP4: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply one tile and write it; with 3 WIDTHS it is 16 or 32 tokens wide where that is enough."""
    for i in tl.static_range(WIDTHS):
        if (tokens > 16 * i) & ((tokens <= 16 * i + 16) | (i == WIDTHS - 1)):
            total = tokens_times_w4(
                a_ptr,
                a_scale_ptr,
                w_ptr,
                w_scale_ptr,
                tokens,
                rows,
                N,
                K,
                stride_scale_m,
                stride_scale_g,
                0,
                tl.cdiv(K, 128),
                BLOCK_M if i == WIDTHS - 1 else 16 * i + 16,
                BLOCK_N,
                MXFP4,
                EVEN_K,
                WHOLE,
                STAGES,
            )
            store_transposed(
                out_ptr,
                total,
                None,
                tokens,
                rows,
                N,
                BLOCK_M if i == WIDTHS - 1 else 16 * i + 16,
                BLOCK_N,
            )


@quick
@triton.jit(do_not_specialize=["M", "stride_scale_g"])
def _m_grouped_w4a8_gemm_contiguous_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
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
    MXFP4: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile_m, tile_n = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0 = tile_m.to(tl.int64) * BLOCK_M
    n0 = tile_n.to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_M)
    experts = tl.load(m_indices_ptr + m0 + row)  # M is a multiple of BLOCK_M
    known = (experts >= 0) & (experts < E)
    tokens = tl.max(tl.where(known, row + 1, 0), 0)
    if tokens > 0:
        expert = tl.max(tl.where(known, experts, 0), 0).to(tl.int64)
        groups = tl.cdiv(K, 128)
        _store_product(
            a_ptr + m0 * K,
            a_scale_ptr + m0 * stride_scale_m,
            w_ptr + (expert * groups * N + n0) * 16,
            w_scale_ptr + expert * groups * N + n0,
            out_ptr + m0 * N + n0,
            tokens,
            (N - n0).to(tl.int32),
            N,
            K,
            stride_scale_m,
            stride_scale_g,
            1 if BLOCK_M == 16 else 2 if BLOCK_M == 32 else 3,
            BLOCK_M,
            BLOCK_N,
            MXFP4,
            EVEN_K,
            WHOLE,
            STAGES,
        )


@quick
@triton.jit(do_not_specialize=["M_MAX", "row_programs", "stride_scale_e", "stride_scale_g"])
def _m_grouped_w4a8_gemm_masked_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    masked_m_ptr,
    out_ptr,
    M_MAX,
    N,
    K,
    row_programs,
    stride_scale_e,
    stride_scale_m,
    stride_scale_g,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MXFP4: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Programs that share weights are neighbours, so that one of them reads the weights from L2; those of rows
    # that are hardly ever there come last.
    tile_m = tl.program_id(2) * row_programs + tl.program_id(0) % row_programs
    tile_n = tl.program_id(0) // row_programs
    expert = tl.program_id(1).to(tl.int64)
    m0 = tile_m.to(tl.int64) * BLOCK_M
    n0 = tile_n.to(tl.int64) * BLOCK_N
    tokens = tl.minimum(tl.load(masked_m_ptr + expert), M_MAX)
    if WHOLE:
        stride_scale_e = tl.multiple_of(stride_scale_e.to(tl.int64), 4)
    # Not a loop over row tiles: that would keep 70 to 100 more registers.
    if m0 < tokens:
        groups = tl.cdiv(K, 128)
        _store_product(
            a_ptr + (expert * M_MAX + m0) * K,
            a_scale_ptr + expert * stride_scale_e + m0 * stride_scale_m,
            w_ptr + (expert * groups * N + n0) * 16,
            w_scale_ptr + expert * groups * N + n0,
            out_ptr + (expert * M_MAX + m0) * N + n0,
            (tokens - m0).to(tl.int32),
            (N - n0).to(tl.int32),
            N,
            K,
            stride_scale_m,
            stride_scale_g,
            1,
            BLOCK_M,
            BLOCK_N,
            MXFP4,
            EVEN_K,
            WHOLE,
            STAGES,
        )


def choose_grouped(typical: int) -> W4GroupedConfig:
    """The configuration for about that many tokens an expert."""
    if typical <= 32:
        return W4GroupedConfig(max(16, next_power_of_2(typical)), 64, 4, 4)
    if typical <= 64:
        return W4GroupedConfig(64, 64, 4, 4, 128)  # four programs a multiprocessor
    return W4GroupedConfig(128, 128, 3, 8)


def m_grouped_w4a8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    m_indices: torch.Tensor,
    out: torch.Tensor,
    config: W4GroupedConfig | None = None,
) -> torch.Tensor:
    """Launch on arguments that passed `w4a8_checks.contiguous_output`; see the reference of that name."""
    (m, k), (experts, n, _) = a.shape, b.shape
    if m == 0:
        return out
    # With one segment an expert, most of it may be padding.
    config = config or choose_grouped(64 if m <= experts * _SEGMENT else _SEGMENT)
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n),)
    with device.current(a.device):
        _m_grouped_w4a8_gemm_contiguous_kernel[grid](
            a,
            a_scale,
            b.words,
            b.scale,
            m_indices,
            out,
            m,
            n,
            k,
            experts,
            a_scale.stride(0),
            a_scale.stride(1),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            GROUP_M=_GROUP_M,
            MXFP4=b.kind == "mxfp4",
            EVEN_K=k % 128 == 0,
            WHOLE=reads_whole_tiles(m, config.block_m, a_scale),
            STAGES=config.stages,
            num_warps=config.warps,
            maxnreg=config.registers,
        )
    return out


def m_grouped_w4a8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    masked_m: torch.Tensor,
    expected_m: int,
    out: torch.Tensor,
    config: W4GroupedConfig | None = None,
) -> torch.Tensor:
    """Launch on arguments that passed `w4a8_checks.masked_output`; see the reference of that name."""
    (experts, m_max, k), n = a.shape, b.shape[1]
    if a.numel() == 0:
        return out
    typical = max(1, min(expected_m, m_max))
    # Every row tile has a program, so there had better not be hundreds of them.
    config = config or choose_grouped(max(typical, m_max // 16))
    row_programs = cdiv(typical, config.block_m)
    rounds = cdiv(cdiv(m_max, config.block_m), row_programs)
    grid = (cdiv(n, config.block_n) * row_programs, experts, rounds)
    with device.current(a.device):
        _m_grouped_w4a8_gemm_masked_kernel[grid](
            a,
            a_scale,
            b.words,
            b.scale,
            masked_m,
            out,
            m_max,
            n,
            k,
            row_programs,
            a_scale.stride(0),
            a_scale.stride(1),
            a_scale.stride(2),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            MXFP4=b.kind == "mxfp4",
            EVEN_K=k % 128 == 0,
            WHOLE=reads_whole_tiles(m_max, config.block_m, a_scale),
            STAGES=config.stages,
            num_warps=config.warps,
            maxnreg=config.registers,
        )
    return out
