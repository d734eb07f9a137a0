"""Block-scaled FP8 GEMM on one GPU: blockscale and its peers at DeepSeek-V3's shapes.

    python benchmarks/bench_gemm.py [--rows 1 16 64 128 4096] [--backends auto triton] [--deepseek-kernel F]

Every competitor first computes a product that is compared with float32 arithmetic on the dequantized
operands; the output is poisoned with NaN before. They are then timed in one process, in rounds of random
order, each round a median of `triton.testing.do_bench` with the L2 cache flushed. DeepGEMM joins if it is
installed, and DeepSeek's own Triton kernel if its `inference/kernel.py` is given. Geometric means over the
weight shapes of the ratio to every peer end the table. Results: benchmarks/results/gemm.jsonl.

All are timed a second way, as decoding meets them: a CUDA graph of products with different weights, more than
the L2 cache holds. In the first way, the flush leaves the cache full of lines that have to be written back
while weights are read, and a launch that takes longer than the flush counts as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from blockscale import ops, reference
from blockscale.metrics import calc_diff
from blockscale.ops._cublas import multiply, padded_scale
from blockscale.ops.timing import captured, copies_past_cache
from blockscale.testing.bench import (
    append_result,
    environment,
    flushed_microseconds,
    interleave,
    load_module,
)
from blockscale.testing.shapes import GEMM_SHAPES

RESULTS = Path(__file__).parent / "results" / "gemm.jsonl"
ROWS = (1, 16, 64, 128, 4096)
FEW_ROWS = 128
SQUARE = (8192, 8192, 8192)
# calc_diff against float32 arithmetic on the dequantized operands: rounding to BF16 is 1e-6. The two that do
# not compute this product are held to the quantization error of their own operands.
TOLERANCE = {"bf16 matmul": 5e-3, "cublas fp8, one scale": 5e-3}
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """One product: BF16 operands, their FP8 forms, and the output all competitors share."""

    x: torch.Tensor
    w: torch.Tensor
    a: torch.Tensor
    a_scale: torch.Tensor  # column-major
    b: torch.Tensor
    b_scale: torch.Tensor
    out: torch.Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.x.shape[0], self.w.shape[0], self.x.shape[1]


Make = Callable[[Problem], Run | None]  # None: this competitor sits this problem out


def make_problem(m: int, n: int, k: int) -> Problem:
    """Gaussian operands on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    a, a_scale = ops.quantize_activation(x, scale_layout="column")
    b, b_scale = ops.quantize_weight(w)
    return Problem(x, w, a, a_scale, b, b_scale, torch.empty(m, n, device="cuda", dtype=torch.bfloat16))


def ours(backend: ops.GemmBackend) -> Make:
    """A competitor of this package."""

    def make(p: Problem) -> Run:
        return lambda: ops.fp8_gemm_nt(p.a, p.a_scale, p.b, p.b_scale, out=p.out, backend=backend)

    return make


def bf16_matmul(p: Problem) -> Run:
    """What the product costs without FP8."""
    return lambda: torch.matmul(p.x, p.w.t(), out=p.out)


def cublas_one_scale(p: Problem) -> Run:
    """The upper bound of FP8: one scale a tensor, fast accumulation."""
    a, b = ((t / 0.01).to(torch.float8_e4m3fn) for t in (p.x * 0.1, p.w * 0.1))
    scale = torch.full((), 0.1, device="cuda")

    def run() -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    return run


def cublas_blocks(p: Problem) -> Run | None:
    """cuBLASLt with the same block scales, through torch; scales padded beforehand as it wants them."""
    if p.sizes[0] == 1:
        return None  # it has no kernel for one row
    b_scale = padded_scale(p.b_scale)
    return lambda: multiply(p.a, p.a_scale, p.b, b_scale, torch.bfloat16)


def deepgemm(p: Problem) -> Run:
    """DeepGEMM's dense kernel, scales transformed beforehand."""
    import deep_gemm

    a_scale = deep_gemm.get_mn_major_tma_aligned_tensor(p.a_scale.contiguous())

    def run() -> torch.Tensor:
        operands = (p.a, a_scale), (p.b, p.b_scale)
        deep_gemm.fp8_gemm_nt(*operands, p.out, compiled_dims="nk", disable_ue8m0_cast=True)
        return p.out

    return run


def deepseek(kernel: Path) -> Make:
    """The Triton kernel of DeepSeek-V3's inference folder, at many rows.

    It tunes itself at its first call for a weight shape, whatever the number of rows, and keeps that. It sits
    out few rows, or it would be slow at many.
    """
    module = load_module(kernel)

    def make(p: Problem) -> Run | None:
        if p.sizes[0] <= FEW_ROWS:
            return None
        a_scale = p.a_scale.contiguous()

        def run() -> torch.Tensor:
            torch.set_default_dtype(torch.bfloat16)  # it takes the dtype of its result from there
            result = module.fp8_gemm(p.a, a_scale, p.b, p.b_scale)
            torch.set_default_dtype(torch.float32)
            return result

        return run

    return make


def find_competitors(arguments: argparse.Namespace) -> dict[str, Make]:
    """Ours, then every peer that is there."""
    found: dict[str, Make] = {f"blockscale {name}": ours(name) for name in arguments.backends}
    found |= {"bf16 matmul": bf16_matmul, "cublas fp8, one scale": cublas_one_scale}
    found |= {"cublas fp8, blocks": cublas_blocks}
    if importlib.util.find_spec("deep_gemm") is not None:
        found["deepgemm"] = deepgemm
    if arguments.deepseek_kernel is not None:
        found["deepseek triton"] = deepseek(arguments.deepseek_kernel)
    return found


def compile_peers(arguments: argparse.Namespace, shapes: list[tuple[int, int, int]]) -> None:
    """Fill the disk caches of the peers that compile at run time, in parallel."""
    context = multiprocessing.get_context("spawn")
    largest = {shape[1:]: shape for shape in sorted(shapes)}
    jobs = [(arguments, "deepgemm", shape) for shape in shapes]
    jobs += [(arguments, "deepseek triton", shape) for shape in largest.values() if shape[0] > FEW_ROWS]
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=context) as pool:
        list(pool.map(_call_once, jobs))


def _call_once(job: tuple[argparse.Namespace, str, tuple[int, int, int]]) -> None:
    arguments, name, shape = job
    make = find_competitors(arguments).get(name)
    run = make(make_problem(*shape)) if make is not None else None
    if run is not None:
        run()
        torch.cuda.synchronize()


def compete(p: Problem, competitors: dict[str, Make], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds by timing, competitor and round; a competitor is checked before it is timed."""
    exact = reference.fp8_gemm_nt(p.a, p.a_scale, p.b, p.b_scale, out_dtype=torch.float32)
    copies = copies_past_cache(p.b.nbytes)
    problems = [replace(p, b=p.b.clone(), b_scale=p.b_scale.clone(), w=p.w.clone()) for _ in range(copies)]
    timers: dict[str, dict[str, Callable[[], float]]] = {"flushed": {}, "graph": {}}
    for name, make in competitors.items():
        p.out.fill_(math.nan)
        run = make(p)
        if run is None:
            continue
        diff = calc_diff(run(), exact)
        assert diff < TOLERANCE.get(name, 1e-5), f"{name} is wrong at {p.sizes}: calc_diff {diff:.2e}"
        timers["flushed"][name] = partial(flushed_microseconds, run)
        timers["graph"][name] = captured([one for each in problems if (one := make(each)) is not None])
    return {timing: interleave(each, rounds) for timing, each in timers.items()}


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--backends", nargs="+", default=["auto"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deepseek-kernel", type=Path)
    arguments = parser.parse_args()
    shapes = [(m, n, k) for m in arguments.rows for n, k in GEMM_SHAPES]
    shapes += [SQUARE] if max(arguments.rows) >= 4096 else []
    compile_peers(arguments, shapes)
    competitors, where = find_competitors(arguments), environment()
    copy_rate = measure_copy()
    print(
        f"{where['machine']['gpu']}, device copy {copy_rate / 1e12:.2f} TB/s, microseconds (TFLOPS), medians"
    )
    tables: dict[str, dict[tuple[int, int, int], dict[str, float]]] = {"flushed": {}, "graph": {}}
    for shape in shapes:
        found = compete(make_problem(*shape), competitors, arguments.rounds)
        for timing, rounds in found.items():
            tables[timing][shape] = {name: statistics.median(values) for name, values in rounds.items()}
            record = {"benchmark": "gemm", "m_n_k": shape, "timing": timing, "microseconds": rounds}
            append_result(RESULTS, {**record, "copy_bytes_per_s": copy_rate, **where})
            m, n, k = shape
            floor = (n * k + m * k + 2 * m * n) / copy_rate * 1e6
            flops = 2 * m * n * k
            cells = [
                f"{name} {us:.1f} ({flops / us / 1e6:.0f})" for name, us in tables[timing][shape].items()
            ]
            print(f"{timing:7} {m:5d} {n:5d} {k:5d} floor {floor:5.1f} | " + " | ".join(cells), flush=True)
    for timing, table in tables.items():
        print(f"{timing}:")
        print_ratios(table, f"blockscale {arguments.backends[0]}")


def measure_copy() -> float:
    """Bytes a second, read and written, of a 1 GiB device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2e6 * source.nbytes / flushed_microseconds(lambda: target.copy_(source))


def print_ratios(table: dict[tuple[int, int, int], dict[str, float]], us: str) -> None:
    """Geometric means, over the weight shapes, of how many times faster we are."""
    for m in sorted({shape[0] for shape in table}):
        rows = [row for shape, row in table.items() if shape[0] == m and us in row]
        for peer in {name: None for row in rows for name in row if name != us}:
            ratios = [row[peer] / row[us] for row in rows if peer in row]
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            print(f"M = {m}: {mean:.3f} x {peer} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
