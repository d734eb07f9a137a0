"""Masked grouped block-scaled FP8 GEMM: every expert's weight times the few tokens it was sent.

    out[e, m, n] = sum_g a_scale[e, m, g] * b_scale[e, n // 128, g] * (sum_{k in g} a[e, m, k] * b[e, n, k])
    for m < masked_m[e]; other rows of out are not touched.

As in `gemm_small_m.py` the weight tile is the left operand and is marked to leave L2 first: with few tokens
an expert, reading weights is all that takes time. One program has one column tile of one expert; it reads
masked_m[e] itself, so the host never waits for it, and walks the expert's row tiles in strides of
ROW_PROGRAMS (1 with few tokens, so that no program starts for nothing; an expert without tokens costs an
empty program).

Layouts: a (E, Mmax, K), b (E, N, K), b_scale (E, ceil(N/128), G) and out (E, Mmax, N) row-major, a_scale
(E, Mmax, G) of any strides, best when a column of an expert is contiguous. Rounding as in `gemm.py`.
The contiguous form is in `gemm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from blockscale.ops._triton import device
from blockscale.ops._triton.device import cdiv, next_power_of_2
from blockscale.ops._triton.gemm_small_m import store_transposed, weights_ahead
from blockscale.ops._triton.gemm_weights import tokens_times_weights
from blockscale.ops._triton.launch import quick


@dataclass(frozen=True)
class MaskedConfig:
    """How one GEMM is cut up: as `SmallMConfig`; `row_programs` share the row tiles of an expert."""

    block_m: int
    block_n: int
    row_programs: int
    depth: int
    stages: int
    warps: int


@quick
@triton.jit(do_not_specialize=["M_MAX", "stride_scale_e", "stride_scale_g"])
def _m_grouped_fp8_gemm_masked_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    masked_m_ptr,
    out_ptr,
    M_MAX,
    N,
    K,
    stride_scale_e,
    stride_scale_m,
    stride_scale_g,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_PROGRAMS: tl.constexpr,
    EVEN_K: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile_n, first_tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = expert.to(tl.int64)
    n0 = tile_n.to(tl.int64) * BLOCK_N
    groups = tl.cdiv(K, 128)
    tokens = tl.minimum(tl.load(masked_m_ptr + expert), M_MAX)
    rows = (N - n0).to(tl.int32)
    b_ptr += (expert * N + n0) * K
    b_scale_ptr += (expert * tl.cdiv(N, 128) + n0 // 128) * groups
    for tile_m in range(first_tile, tl.cdiv(tokens, BLOCK_M), ROW_PROGRAMS):
        m0 = tl.cast(tile_m, tl.int64) * BLOCK_M
        left = (tokens - m0).to(tl.int32)
        total = tokens_times_weights(
            a_ptr + (expert * M_MAX + m0) * K,
            a_scale_ptr + expert * stride_scale_e + m0 * stride_scale_m,
            b_ptr,
            b_scale_ptr,
            left,
            rows,
            K,
            stride_scale_m,
            stride_scale_g,
            0,
            groups,
            BLOCK_M,
            BLOCK_N,
            EVEN_K,
            DEPTH,
        )
        store_transposed(
            out_ptr + (expert * M_MAX + m0) * N + n0, total, None, left, rows, N, BLOCK_M, BLOCK_N
        )


def choose_masked(expected_m: int, m_max: int) -> MaskedConfig:
    """The configuration for about `expected_m` tokens an expert, at most `m_max`."""
    typical = max(1, min(expected_m, m_max))
    block_m = max(16, next_power_of_2(min(typical, 128)))
    depth, stages = weights_ahead(block_m)
    return MaskedConfig(block_m, 64, cdiv(typical, block_m), depth, stages, 4)


def m_grouped_fp8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    out: torch.Tensor,
    config: MaskedConfig | None = None,
) -> torch.Tensor:
    """Launch on arguments that passed `gemm_checks.masked_output`; see the reference of that name."""
    (experts, m_max, k), n = a.shape, b.shape[1]
    if a.numel() == 0:
        return out
    config = config or choose_masked(expected_m, m_max)
    grid = (cdiv(n, config.block_n), config.row_programs, experts)
    with device.current(a.device):
        _m_grouped_fp8_gemm_masked_kernel[grid](
            a,
            a_scale,
            b,
            b_scale,
            masked_m,
            out,
            m_max,
            n,
            k,
            a_scale.stride(0),
            a_scale.stride(1),
            a_scale.stride(2),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            ROW_PROGRAMS=config.row_programs,
            EVEN_K=k % 128 == 0,
            DEPTH=config.depth,
            num_stages=config.stages,
            num_warps=config.warps,
        )
    return out
