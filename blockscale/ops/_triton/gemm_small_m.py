"""Block-scaled FP8 GEMM for few rows (decoding), where reading the weight is all that takes time.

    out[m, n] = sum_g a_scale[m, g] * b_scale[n // 128, g] * (sum_{k in g} a[m, k] * b[n, k]) + bias[n]

What follows from being bound by memory:
- the weight tile is the left operand of the product: the tensor cores' 64-row side is full of weights, and
  the side that holds tokens is as narrow as 16 (out^T = b @ a^T);
- K is cut into SPLIT_K parts where N alone gives too few programs to keep enough bytes in flight;
- weights are read once, so they are marked to leave L2 first and do not push out what others still need.

A program of a split K stores its float32 sum in a workspace and counts itself in; the last one to arrive adds
the parts in the order of K and writes the result: one launch, and the same bits every time. The counters need
no clearing and no state between calls: a word of fresh memory lacks the tag that counters carry and is
replaced by a count of zero, and the last program leaves a count of zero behind. So the workspace is an
ordinary uninitialized allocation of the call, safe with several streams and in CUDA graphs.

Layouts and rounding as in `gemm.py`; M up to 128 makes sense, any M works.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from blockscale.ops._triton import device
from blockscale.ops._triton.device import cdiv, next_power_of_2
from blockscale.ops._triton.gemm_weights import tokens_times_weights
from blockscale.ops._triton.launch import quick

# Upper 56 bits of a counter. As float32 pairs it is a NaN with an odd payload, which no tensor holds by
# chance.
TAG = tl.constexpr(0x7FA5C3961E2D4B)


@dataclass(frozen=True)
class SmallMConfig:
    """How one GEMM is cut up.

    Attributes:
        block_m, block_n: tokens and weights of a tile.
        split_k: parts of K that different programs sum.
        depth: groups of weights that are loaded ahead into registers; 0: through shared memory.
        stages: of the pipeline through shared memory, which tokens always take.
        warps: of a program.
    """

    block_m: int
    block_n: int
    split_k: int
    depth: int
    stages: int
    warps: int


@triton.jit
def arrive(counter_ptr, word):
    """Count this program in; how many came before. `word` is what the counter was some time earlier."""
    if (word >> 8) != TAG:
        # Not a counter yet. Whoever comes first makes it one; the exchange of the others fails, as it should.
        tl.atomic_cas(counter_ptr, word, TAG << 8, sem="relaxed")
    tl.debug_barrier()  # every thread's part of the sum is stored before this program is counted
    return (tl.atomic_add(counter_ptr, 1, sem="acq_rel") & 255).to(tl.int32)


@triton.jit
def store_transposed(out_ptr, total, bias_ptr, tokens, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write total (BLOCK_N, BLOCK_M) plus bias to out (tokens, rows); pointers are those of the tile."""
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    mask = (n < rows)[:, None] & (m < tokens)[None, :]
    tl.store(out_ptr + (n[:, None] + m[None, :] * N), total.to(out_ptr.dtype.element_ty), mask=mask)


@quick
@triton.jit(do_not_specialize=["M", "stride_scale_g"])
def _fp8_gemm_small_m_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
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
    EVEN_K: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile_n, part, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m0 = tile_m.to(tl.int64) * BLOCK_M
    n0 = tile_n.to(tl.int64) * BLOCK_N
    tokens = (M - m0).to(tl.int32)
    rows = (N - n0).to(tl.int32)
    groups = tl.cdiv(K, 128)
    tile = tile_m * tl.num_programs(0) + tile_n
    if SPLIT_K > 1:
        counter_ptr += tile
        word = tl.load(counter_ptr)  # long before it is needed: the wait is hidden
    total = tokens_times_weights(
        a_ptr + m0 * K,
        a_scale_ptr + m0 * stride_scale_m,
        b_ptr + n0 * K,
        b_scale_ptr + n0 // 128 * groups,
        tokens,
        rows,
        K,
        stride_scale_m,
        stride_scale_g,
        groups * part // SPLIT_K,
        groups * (part + 1) // SPLIT_K,
        BLOCK_M,
        BLOCK_N,
        EVEN_K,
        DEPTH,
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


def choose_config(m: int, n: int, k: int, processors: int) -> SmallMConfig:
    """The configuration for a shape on a GPU with that many multiprocessors."""
    block_m = max(16, next_power_of_2(min(m, 128)))
    programs = cdiv(n, 64) * cdiv(m, block_m)
    groups = cdiv(k, 128)
    # About two programs a multiprocessor, each with at least four groups to multiply.
    split_k = max(1, min(2 * processors // programs, groups // 4, 16))
    depth, stages = weights_ahead(block_m)
    return SmallMConfig(block_m, 64, split_k, depth, stages, 4)


def weights_ahead(block_m: int) -> tuple[int, int]:
    """(depth, stages) for a tile of 64 weights and 4 warps: the most bytes in flight that registers allow."""
    if block_m <= 32:
        return 3, 2  # 165 registers at 16 tokens: three programs a multiprocessor, 72 KB in flight
    return (2, 2) if block_m == 64 else (0, 4)  # 32 KB and 48 KB


def fp8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: SmallMConfig | None = None,
) -> torch.Tensor:
    """Launch on arguments that passed `gemm_checks.dense_output`; see `reference.gemm.fp8_gemm_nt`."""
    (m, k), n = a.shape, b.shape[0]
    if m == 0:
        return out
    config = config or choose_config(m, n, k, device.processors(a.device))
    grid = (cdiv(n, config.block_n), config.split_k, cdiv(m, config.block_m))
    counters, partials = _workspace(grid, config, a.device)
    with device.current(a.device):
        _fp8_gemm_small_m_kernel[grid](
            a,
            a_scale,
            b,
            b_scale,
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
            EVEN_K=k % 128 == 0,
            DEPTH=config.depth,
            num_stages=config.stages,
            num_warps=config.warps,
        )
    return out


def _workspace(
    grid: tuple[int, int, int], config: SmallMConfig, target: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A counter (int64) and split_k partial sums (float32) for every tile, uninitialized."""
    if config.split_k == 1:
        return None, None
    tiles = grid[0] * grid[2]
    floats = tiles * config.split_k * config.block_n * config.block_m
    counters = -(-tiles // 16) * 16  # the sums start at a multiple of 128 bytes
    memory = torch.empty(counters + floats // 2, dtype=torch.int64, device=target)
    return memory[:tiles], memory[counters:].view(torch.float32)
