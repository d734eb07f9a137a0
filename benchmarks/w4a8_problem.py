"""Problems of bench_w4a8.py: random operands, the exact products, and our own ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from blockscale import ops, reference
from blockscale.ops import w4a8_gemm
from blockscale.ops._cuda import w4a8_gemm as cuda_kernel
from blockscale.ops._cuda.w4a8_configs import W4Tile
from blockscale.ops._triton import w4a8 as dense_kernel
from blockscale.ops._triton import w4a8_grouped as grouped_kernel
from blockscale.reference import w4a8
from blockscale.reference.w4 import Kind, W4Weight

EXPERTS = 32
SEGMENT = 128
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """What is multiplied; `tokens` are rows (dense) or rows of an expert."""

    layout: str
    tokens: int
    n: int
    k: int
    kind: Kind

    @property
    def experts(self) -> int:
        return 1 if self.layout == "dense" else EXPERTS


@dataclass(frozen=True)
class Problem:
    """Operands of a case; `rows` is m_indices or masked_m, `counted` the rows of the result that count."""

    case: Case
    a: torch.Tensor
    a_scale: torch.Tensor
    w4: W4Weight
    fp8: tuple[torch.Tensor, torch.Tensor]
    rows: torch.Tensor
    counted: torch.Tensor
    out: torch.Tensor


def make_weights(n: int, k: int, kind: Kind) -> tuple[W4Weight, tuple[torch.Tensor, torch.Tensor]]:
    """Random four-bit and FP8 weights of all experts."""
    generator = torch.Generator("cuda").manual_seed(0)
    groups = k // 128
    bits = partial(torch.randint, device="cuda", dtype=torch.int32, generator=generator)
    words = bits(-(1 << 31), 1 << 31, (EXPERTS, groups, n, 16))
    scale = torch.rand((EXPERTS, groups, n), device="cuda", generator=generator) + 0.5
    scale = scale.to(torch.bfloat16).float() * 512
    if kind == "mxfp4":
        exponents = bits(122, 130, scale.shape) << 23
        for block in range(4):
            exponents |= bits(4, 13, scale.shape) << 4 * block
        scale = exponents.view(torch.float32)
    codes = torch.randn((EXPERTS, n, k), device="cuda", dtype=torch.bfloat16, generator=generator)
    b = (32 * codes).to(torch.float8_e4m3fn)
    b_scale = torch.rand((EXPERTS, n // 128, groups), device="cuda", generator=generator) + 0.5
    return W4Weight(words, scale, k, kind), (b, b_scale)


def make_problem(case: Case, w4: W4Weight, fp8: tuple[torch.Tensor, torch.Tensor]) -> Problem:
    """Gaussian activations; contiguous experts are padded to segments of 128 rows."""
    cuda, tokens, experts = torch.device("cuda"), case.tokens, case.experts
    room = -(-tokens // SEGMENT) * SEGMENT if case.layout != "dense" else tokens
    total = experts * room
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(total, case.k, device=cuda, dtype=torch.bfloat16, generator=generator)
    a, a_scale = ops.quantize_activation(x, scale_layout="column")
    valid = torch.arange(room, device=cuda).expand(experts, room) < tokens
    out = torch.empty(total, case.n, dtype=torch.bfloat16, device=cuda)
    if case.layout == "masked":
        rows = torch.full((experts,), tokens, dtype=torch.int32, device=cuda)
        # A column of an expert is contiguous, as moe_permute_masked has it.
        a, a_scale = a.view(experts, room, -1), a_scale.t().view(-1, experts, room).permute(1, 2, 0)
        out = out.view(experts, room, -1)
        return Problem(case, a, a_scale, w4, fp8, rows, valid, out)
    numbers = torch.arange(experts, dtype=torch.int32, device=cuda)[:, None].expand(experts, room)
    rows = torch.where(valid, numbers, -1).flatten().contiguous()
    if case.layout == "dense":
        return Problem(case, a, a_scale, w4[0], (fp8[0][0], fp8[1][0]), rows, valid.flatten(), out)
    return Problem(case, a, a_scale, w4, fp8, rows, valid.flatten(), out)


def exact_w4(p: Problem) -> torch.Tensor:
    """The reference, float32, of the rows that count."""
    operands, out = (p.a, p.a_scale, p.w4), torch.zeros_like(p.out, dtype=torch.float32)
    if p.case.layout == "dense":
        w4a8.w4a8_gemm_nt(*operands, out=out, out_dtype=torch.float32)
    elif p.case.layout == "contiguous":
        w4a8.m_grouped_w4a8_gemm_nt_contiguous(*operands, p.rows, out=out)
    else:
        w4a8.m_grouped_w4a8_gemm_nt_masked(*operands, p.rows, p.case.tokens, out=out)
    return out[p.counted]


def exact_fp8(p: Problem) -> torch.Tensor:
    """The same for the FP8 weights."""
    operands, out = (p.a, p.a_scale, *p.fp8), torch.zeros_like(p.out, dtype=torch.float32)
    if p.case.layout == "dense":
        reference.fp8_gemm_nt(*operands, out=out, out_dtype=torch.float32)
    elif p.case.layout == "contiguous":
        reference.m_grouped_fp8_gemm_nt_contiguous(*operands, p.rows, out=out)
    else:
        reference.m_grouped_fp8_gemm_nt_masked(*operands, p.rows, p.case.tokens, out=out)
    return out[p.counted]


def run_w4(p: Problem, config: Any = None) -> Run:
    """Our W4A8 product, with the tile that ships or a given one."""
    operands = p.a, p.a_scale, p.w4
    if config is None:
        if p.case.layout == "dense":
            return lambda: w4a8_gemm.w4a8_gemm_nt(*operands, out=p.out)
        if p.case.layout == "contiguous":
            return lambda: w4a8_gemm.m_grouped_w4a8_gemm_nt_contiguous(*operands, p.rows, out=p.out)
        return lambda: w4a8_gemm.m_grouped_w4a8_gemm_nt_masked(*operands, p.rows, p.case.tokens, out=p.out)
    if p.case.layout == "dense":
        dense = cuda_kernel if isinstance(config, W4Tile) else dense_kernel
        return lambda: dense.w4a8_gemm_nt(*operands, None, p.out, config)
    grouped = cuda_kernel if isinstance(config, W4Tile) else grouped_kernel
    if p.case.layout == "contiguous":
        return lambda: grouped.m_grouped_w4a8_gemm_nt_contiguous(*operands, p.rows, p.out, config)
    return lambda: grouped.m_grouped_w4a8_gemm_nt_masked(*operands, p.rows, p.case.tokens, p.out, config)


def run_fp8(p: Problem) -> Run:
    """Our FP8 product of the same sizes."""
    operands = p.a, p.a_scale, *p.fp8
    if p.case.layout == "dense":
        return lambda: ops.fp8_gemm_nt(*operands, out=p.out)
    if p.case.layout == "contiguous":
        return lambda: ops.m_grouped_fp8_gemm_nt_contiguous(*operands, p.rows, out=p.out)
    return lambda: ops.m_grouped_fp8_gemm_nt_masked(*operands, p.rows, p.case.tokens, out=p.out)
