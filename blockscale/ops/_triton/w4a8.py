"""Dense W4A8 GEMM: four-bit weights, E4M3 activations, for any M.

    out[m, n] = sum_g a_scale[m, g] * w_scale[n, g] * (sum_{k in g} a[m, k] * w[n, k]) + bias[n]

One program computes a (BLOCK_N, BLOCK_M) tile of out^T in steps of one group of 128 along K; a group's sum of
products is scaled and added in float32, and rounded once to the dtype of out. Where N and M give too few
programs to fill the machine, K is cut into SPLIT_K parts, added up in the order of K by the last program of a
tile to arrive: the same bits every time (`gemm_small_m.py` tells how).

Layouts: a (M, K) row-major, a_scale (M, G) of any strides, best when a column is contiguous; words and scales
of the weight as in `reference/w4.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from blockscale.ops._triton import device
from blockscale.ops._triton.device import cdiv, next_power_of_2
from blockscale.ops._triton.gemm import tile_of_program
from blockscale.ops._triton.gemm_small_m import TAG, arrive, store_transposed
from blockscale.ops._triton.launch import quick
from blockscale.ops._triton.w4a8_weights import reads_whole_tiles, tokens_times_w4
from blockscale.reference.w4 import W4Weight

_GROUP_M = 8


@dataclass(frozen=True)
class W4Config:
    """How one GEMM is cut up: tokens and weights of a tile, parts of K, stages, warps, registers."""

    block_m: int
    block_n: int
    split_k: int
    stages: int
    warps: int
    registers: int | None = None


@quick
@triton.jit(do_not_specialize=["M", "stride_scale_g"])
def _w4a8_gemm_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    counter_ptr,
    partial_ptr,
    M,
    N,
    K,
    stride_scale_m,
    stride_scale_g,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    MXFP4: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of_program(tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    part = tl.program_id(1)
    m0 = tile_m.to(tl.int64) * BLOCK_M
    n0 = tile_n.to(tl.int64) * BLOCK_N
    tokens = (M - m0).to(tl.int32)
    rows = (N - n0).to(tl.int32)
    groups = tl.cdiv(K, 128)
    tile = tile_m * tiles_n + tile_n
    if SPLIT_K > 1:
        counter_ptr += tile
        word = tl.load(counter_ptr)  # long before it is needed: the wait is hidden
    total = tokens_times_w4(
        a_ptr + m0 * K,
        a_scale_ptr + m0 * stride_scale_m,
        w_ptr + n0 * 16,
        w_scale_ptr + n0,
        tokens,
        rows,
        N,
        K,
        stride_scale_m,
        stride_scale_g,
        groups * part // SPLIT_K,
        groups * (part + 1) // SPLIT_K,
        BLOCK_M,
        BLOCK_N,
        MXFP4,
        EVEN_K,
        WHOLE,
        STAGES,
    )
    out_ptr += m0 * N + n0
    if bias_ptr is not None:
        bias_ptr += n0
    if SPLIT_K == 1:
        store_transposed(out_ptr, total, bias_ptr, tokens, rows, N, BLOCK_M, BLOCK_N)
    else:
        m = tl.arange(0, BLOCK_M)[None, :]
        n = tl.arange(0, BLOCK_N)[:, None]
        used = (n < rows) & (m < tokens)
        partial_ptrs = partial_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M) + (m * BLOCK_N + n)
        tl.store(partial_ptrs + part * (BLOCK_N * BLOCK_M), total, mask=used)
        if arrive(counter_ptr, word) == SPLIT_K - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for each in tl.static_range(SPLIT_K):
                part_ptrs = partial_ptrs + each * (BLOCK_N * BLOCK_M)
                total += tl.load(part_ptrs, mask=used, other=0.0, cache_modifier=".cg")  # L1 knows nothing
            store_transposed(out_ptr, total, bias_ptr, tokens, rows, N, BLOCK_M, BLOCK_N)
            tl.store(counter_ptr, TAG << 8)


@functools.cache
def choose_config(m: int, n: int, k: int, processors: int) -> W4Config:
    """The configuration for a shape on a GPU with that many multiprocessors, as measured on an H100."""
    if m > 64:
        return W4Config(128, 128, 1, 3, 8) if m > 256 else W4Config(64, 128, 1, 4, 8)
    block_m = max(16, next_power_of_2(m))
    programs, groups = cdiv(n, 64), cdiv(k, 128)
    # About two programs a multiprocessor, each with at least four groups to multiply.
    split_k = max(1, min(2 * processors // programs, groups // 4, 16))
    return W4Config(block_m, 64, split_k, 5 if block_m == 16 else 4, 4)


def w4a8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: W4Config | None = None,
) -> torch.Tensor:
    """Launch on arguments that passed `w4a8_checks.dense_output`; see `reference.w4a8.w4a8_gemm_nt`."""
    (m, k), n = a.shape, b.shape[0]
    if m == 0:
        return out
    config = config or choose_config(m, n, k, device.processors(a.device))
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    counters, partials = _workspace(tiles, config, a.device)
    with device.current(a.device):
        _w4a8_gemm_kernel[(tiles, config.split_k)](
            a,
            a_scale,
            b.words,
            b.scale,
            bias,
            out,
            counters,
            partials,
            m,
            n,
            k,
            a_scale.stride(0),
            a_scale.stride(1),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            SPLIT_K=config.split_k,
            GROUP_M=_GROUP_M,
            MXFP4=b.kind == "mxfp4",
            EVEN_K=k % 128 == 0,
            WHOLE=reads_whole_tiles(m, config.block_m, a_scale),
            STAGES=config.stages,
            num_warps=config.warps,
            maxnreg=config.registers,
        )
    return out


def _workspace(
    tiles: int, config: W4Config, target: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A counter (int64) and split_k partial sums (float32) for every tile, uninitialized."""
    if config.split_k == 1:
        return None, None
    floats = tiles * config.split_k * config.block_n * config.block_m
    counters = -(-tiles // 16) * 16  # the sums start at a multiple of 128 bytes
    memory = torch.empty(counters + floats // 2, dtype=torch.int64, device=target)
    return memory[:tiles], memory[counters:].view(torch.float32)
