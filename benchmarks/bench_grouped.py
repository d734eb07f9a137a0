"""Grouped FP8 GEMM of a mixture of experts on one GPU: blockscale against DeepGEMM.

    python benchmarks/bench_grouped.py [--backends auto triton]

Method and result lines as in bench_gemm.py; results go to benchmarks/results/grouped.jsonl. Contiguous: every
expert has its rows, TFLOPS count rows that are no padding. Masked: every expert has room for 128 rows and the
first few count; that is bound by reading weights, so GB/s of weights are given beside microseconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from blockscale import ops, reference
from blockscale.metrics import calc_diff
from blockscale.testing.bench import append_result, environment, flushed_microseconds, interleave

RESULTS = Path(__file__).parent / "results" / "grouped.jsonl"
# (experts, tokens an expert, N, K)
CONTIGUOUS = ((8, 1024, 4096, 7168), (8, 1024, 7168, 2048), (32, 256, 4096, 7168), (32, 256, 7168, 2048))
MASKED = (
    *((32, tokens, 4096, 7168) for tokens in (1, 8, 32)),
    (32, 32, 7168, 2048),
    (64, 1, 2816, 2048),
    (64, 1, 2048, 1408),
)
M_MAX = 128
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """Operands of a grouped product; `layout` is m_indices or masked_m."""

    w: torch.Tensor
    a: torch.Tensor
    a_scale: torch.Tensor
    b: torch.Tensor
    b_scale: torch.Tensor
    layout: torch.Tensor
    expected_m: int
    out: torch.Tensor


def make_problem(experts: int, tokens: int, n: int, k: int, *, masked: bool) -> Problem:
    """Gaussian operands on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    rows = (experts, M_MAX) if masked else (experts * tokens,)
    x = torch.randn(*rows, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    b, b_scale = ops.quantize_weight(w)
    if masked:
        parts = [ops.quantize_activation(part, scale_layout="column") for part in x]
        a = torch.stack([codes for codes, _ in parts])
        a_scale = torch.stack([scale.t() for _, scale in parts]).transpose(1, 2)
        layout = torch.full((experts,), tokens, dtype=torch.int32, device="cuda")
    else:
        a, a_scale = ops.quantize_activation(x, scale_layout="column")
        layout = torch.arange(experts, dtype=torch.int32, device="cuda").repeat_interleave(tokens)
    out = torch.empty(*rows, n, dtype=torch.bfloat16, device="cuda")
    return Problem(w, a, a_scale, b, b_scale, layout, tokens, out)


def ours(backend: ops.GemmBackend, *, masked: bool) -> Callable[[Problem], Run]:
    """A competitor of this package."""

    def make(p: Problem) -> Run:
        operands = p.a, p.a_scale, p.b, p.b_scale, p.layout
        if masked:
            return lambda: ops.m_grouped_fp8_gemm_nt_masked(
                *operands, p.expected_m, out=p.out, backend=backend
            )
        return lambda: ops.m_grouped_fp8_gemm_nt_contiguous(*operands, out=p.out, backend=backend)

    return make


def deepgemm(*, masked: bool) -> Callable[[Problem], Run]:
    """DeepGEMM's kernels of the same names."""

    def make(p: Problem) -> Run:
        import deep_gemm

        # Earlier releases have the words of the name in another order.
        named = getattr(deep_gemm, "m_grouped_fp8_gemm_nt_masked", None)
        run_masked = named or deep_gemm.fp8_m_grouped_gemm_nt_masked
        a_scale = deep_gemm.get_mn_major_tma_aligned_tensor(p.a_scale.contiguous())
        operands = (p.a, a_scale), (p.b, p.b_scale), p.out, p.layout

        def run() -> torch.Tensor:
            if masked:
                run_masked(*operands, p.expected_m, compiled_dims="nk", disable_ue8m0_cast=True)
            else:
                deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
                    *operands, compiled_dims="nk", disable_ue8m0_cast=True
                )
            return p.out

        return run

    return make


def compete(
    p: Problem, competitors: dict[str, Callable[[Problem], Run]], *, masked: bool, rounds: int
) -> dict[str, list[float]]:
    """Microseconds of every round of every competitor that can do this problem, checked before."""
    operands = p.a, p.a_scale, p.b, p.b_scale, p.layout
    counts = (slice(None), slice(p.expected_m)) if masked else slice(None)
    if masked:
        exact = reference.m_grouped_fp8_gemm_nt_masked(*operands, p.expected_m)
    else:
        exact = reference.m_grouped_fp8_gemm_nt_contiguous(*operands)
    timers: dict[str, Callable[[], float]] = {}
    for name, make in competitors.items():
        p.out.fill_(math.nan)
        try:
            run = make(p)
            diff = calc_diff(run()[counts], exact[counts])
        except (RuntimeError, ValueError) as error:
            print(f"{name} cannot: {str(error).splitlines()[0][:100]}")
            continue
        assert diff < 1e-5, f"{name} is wrong: calc_diff {diff:.2e}"
        timers[name] = partial(flushed_microseconds, run)
    return interleave(timers, rounds)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["auto"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    where = environment()
    for masked, cases in ((False, CONTIGUOUS), (True, MASKED)):
        kind = "masked" if masked else "contiguous"
        competitors = {f"blockscale {name}": ours(name, masked=masked) for name in arguments.backends}
        if importlib.util.find_spec("deep_gemm") is not None:
            competitors["deepgemm"] = deepgemm(masked=masked)
        for case in cases:
            problem = make_problem(*case, masked=masked)
            rounds = compete(problem, competitors, masked=masked, rounds=arguments.rounds)
            append_result(
                RESULTS,
                {"benchmark": "grouped", "kind": kind, "e_m_n_k": case, "microseconds": rounds, **where},
            )
            medians = {name: statistics.median(values) for name, values in rounds.items()}
            experts, tokens, n, k = case
            flops, weights = 2 * experts * tokens * n * k, experts * n * k
            cells = [
                f"{name} {us:.1f} us ({flops / us / 1e6:.0f} TF, {weights / us / 1e3:.0f} GB/s)"
                for name, us in medians.items()
            ]
            ratio = medians.get("deepgemm", math.nan) / next(iter(medians.values()))
            print(f"{kind} {case}: {' | '.join(cells)} | {ratio:.3f} x deepgemm", flush=True)


if __name__ == "__main__":
    main()
