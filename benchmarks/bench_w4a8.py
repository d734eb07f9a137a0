"""Four-bit weights times FP8 activations on one GPU: blockscale W4A8, its own FP8, and humming-kernels.

    python benchmarks/bench_w4a8.py [--kind int4 mxfp4] [--layout L ...] [--tokens T ...] [--variants]
        [--results FILE] [--budget SECONDS]

Dense, and 32 experts in contiguous and in masked rows. Every competitor's product is compared with the
float32 reference before it is timed (humming's, whose own arithmetic differs, to 1e-4). Timing as in
bench_grouped.py: one process, interleaved rounds, L2 flushed, medians. `--variants` times every tile beside
the one that ships, without peers, so that a table can be chosen from one run; kernels are then compiled
before, in several processes. Result lines go to benchmarks/results/w4a8.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import w4a8_problem as problems
from triton.errors import TritonError
from w4a8_problem import Case, Problem, Run

from blockscale.metrics import calc_diff
from blockscale.ops._cuda.w4a8_configs import W4Tile
from blockscale.ops._triton.w4a8 import W4Config
from blockscale.ops._triton.w4a8_grouped import W4GroupedConfig
from blockscale.reference.w4 import W4Weight
from blockscale.testing.bench import append_result, environment, flushed_microseconds, interleave

RESULTS = Path(__file__).parent / "results" / "w4a8.jsonl"
SHAPES = ((4096, 7168), (7168, 2048))  # (N, K): gate_up and down of a DeepSeek-V3 expert
DENSE = (1, 16, 64, 4096)
GROUPED = (1, 8, 16, 32, 48, 128, 256)  # tokens an expert
# What a peer, or a tile that does not fit, may raise.
FAILURES = (
    RuntimeError,
    ValueError,
    AssertionError,
    AttributeError,
    TypeError,
    KeyError,
    OSError,
    TritonError,
)

G, D = W4GroupedConfig, W4Config
GROUPED_VARIANTS = (
    *(G(16, 64, stages, 4) for stages in (3, 4, 6)),
    G(16, 128, 4, 8),
    G(16, 128, 4, 4),
    *(G(32, 64, stages, 4) for stages in (3, 4)),
    G(32, 64, 5, 4, 96),
    G(32, 128, 4, 8),
    G(64, 64, 3, 4),
    G(64, 64, 4, 4, 128),
    G(64, 128, 3, 8, 128),
    G(64, 128, 4, 8),
    G(64, 256, 3, 8),
    G(128, 64, 3, 4),
    G(128, 128, 3, 8),
    G(128, 128, 4, 8),
)
CUDA_VARIANTS = (
    W4Tile(rows=64, warpgroups=1, waves=1),
    W4Tile(rows=64, waves=1),
    W4Tile(waves=1),
    W4Tile(rows=64),
    W4Tile(),
    W4Tile(cluster=2),
    # Half as many rows of a, twice as many blocks, where dense products give too few.
    W4Tile(rows=32, warpgroups=1, waves=1),
    # 32 rows at a time left out if none of them counts.
    W4Tile(unit=32),
)
DENSE_VARIANTS = {
    16: (
        *(D(16, 64, split, stages, 4) for split in (2, 4, 8, 14) for stages in (3, 5)),
        D(16, 128, 8, 4, 8),
    ),
    64: (
        *(D(64, 64, split, 4, 4) for split in (2, 4, 8)),
        D(64, 64, 4, 4, 4, 128),
        D(32, 64, 4, 4, 4),
        D(64, 128, 8, 4, 8, 128),
    ),
    4096: (
        D(64, 128, 1, 3, 8, 128),
        D(128, 64, 1, 3, 4),
        D(128, 128, 1, 3, 8),
        D(128, 128, 1, 4, 8),
        D(64, 256, 1, 3, 8),
    ),
}


def variants(case: Case) -> Iterator[Any]:
    """Tiles worth timing for a case."""
    if case.layout == "dense":
        yield from next(tiles for most, tiles in DENSE_VARIANTS.items() if case.tokens <= most)
        yield from CUDA_VARIANTS if case.tokens > 16 else ()
        return
    if case.tokens > 16 or case.layout == "contiguous":
        yield from (tile for tile in CUDA_VARIANTS if tile.waves == 2)
    least, most = max(16, min(64, case.tokens // 2)), max(16, 2 * case.tokens - 1)
    if case.layout == "contiguous" and case.tokens <= 48:
        least, most = 16, 64  # what a tile computes is narrower where there are few rows
    yield from (config for config in GROUPED_VARIANTS if least <= config.block_m <= most)


def checked_timer(
    p: Problem, run: Run, exact: torch.Tensor, name: str, limit: float = 1e-5
) -> Callable[[], float] | None:
    """A timer of a product that is right, or None after a line that says why."""
    p.out.fill_(math.nan)
    try:
        found = run()
        if found.numel() != exact.numel():  # with rows that do not count
            found = found.view(*p.counted.shape, -1)[p.counted]
        diff = calc_diff(found.view(exact.shape), exact)
    except FAILURES as error:
        print(f"  {name} cannot: {type(error).__name__} {' '.join(str(error).split())[:160]}", flush=True)
        return None
    if not diff < limit:
        print(f"  {name} is wrong at {p.case}: calc_diff {diff:.2e}", flush=True)
        return None
    return partial(flushed_microseconds, run)


def _compile(job: tuple[Case, Any]) -> None:
    """Launch one tile once, on operands that hold anything: the kernel is in the cache afterwards."""
    case, config = job
    n, k, lead = 256, 256, () if case.layout == "dense" else (problems.EXPERTS,)
    w4 = W4Weight(
        torch.zeros((*lead, 2, n, 16), dtype=torch.int32, device="cuda"),
        torch.zeros((*lead, 2, n), device="cuda"),
        k,
        case.kind,
    )
    total = case.experts * problems.SEGMENT
    a = torch.zeros((total, k), device="cuda").to(torch.float8_e4m3fn)
    a_scale = torch.zeros((2, total), device="cuda").t()
    rows = torch.zeros(
        problems.EXPERTS if case.layout == "masked" else total, dtype=torch.int32, device="cuda"
    )
    out = torch.empty((total, n), dtype=torch.bfloat16, device="cuda")
    if case.layout == "masked":
        shape = (problems.EXPERTS, problems.SEGMENT)
        a, a_scale = a.view(*shape, k), a_scale.t().view(2, *shape).permute(1, 2, 0)
        out = out.view(*shape, n)
    try:
        problems.run_w4(Problem(case, a, a_scale, w4, (a, a), rows, rows, out), config)()
        torch.cuda.synchronize()
    except FAILURES:  # told when it is its turn
        pass


def compile_all(cases: list[Case]) -> None:
    """Every tile of every case into the caches of compilers, several at a time."""
    jobs: dict[Any, tuple[Case, Any]] = {}
    for case in cases:
        for config in variants(case):
            jobs[(case.layout, case.kind, config)] = (case, config)
    workers = min(14, os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, jobs.values()))


def say(case: Case, medians: dict[str, float]) -> None:
    """A line of our fastest and how many times as long others take; then every tile, the fastest first."""
    ours = {name: us for name, us in medians.items() if name.startswith("w4a8")}
    if not ours:
        return
    best = min(ours, key=lambda name: ours[name])
    rivals = [
        f"{name} {us:.1f} us = {us / ours[best]:.2f}x" for name, us in medians.items() if name not in ours
    ]
    nbytes = case.experts * case.n * case.k // 2
    print(
        f"{case.kind} {case.layout} {case.tokens} x {case.n}x{case.k}: {best} {ours[best]:.1f} us "
        f"({nbytes / ours[best] / 1e3:.0f} GB/s) | {' | '.join(rivals)}",
        flush=True,
    )
    for name in sorted(ours, key=lambda name: ours[name])[1:]:
        print(f"      {name} {ours[name]:.1f}", flush=True)


class Peer:
    """humming's layers of the weights at hand, while it is there and works."""

    def __init__(self) -> None:
        self._works = importlib.util.find_spec("humming") is not None
        self._layers: dict[object, Any] = {}

    def timer(self, p: Problem, exact: torch.Tensor) -> Callable[[], float] | None:
        """A timer of its product, or None."""
        if not self._works or p.case.kind != "int4":
            return None
        try:
            import humming_peer

            key = p.case.layout == "dense", p.case.n, p.case.k
            if key not in self._layers:
                self._layers = {key: humming_peer.humming_layer(p.w4)}
            run = humming_peer.run_humming(p, self._layers[key])
        except (*FAILURES, ImportError) as error:
            print(
                f"  humming is out: {type(error).__name__} {' '.join(str(error).split())[:300]}", flush=True
            )
            self._works = False
            return None
        return checked_timer(p, run, exact, "humming", 1e-4)


def compete(p: Problem, peer: Peer | None, rounds: int) -> dict[str, list[float]]:
    """Microseconds of every round of every competitor; without a peer, all tiles of ours."""
    exact = problems.exact_w4(p)
    timers: dict[str, Callable[[], float] | None] = {}
    if peer is None:
        for config in variants(p.case):
            name = f"w4a8 {type(config).__name__} " + "-".join(str(part) for part in vars(config).values())
            timers[name] = checked_timer(p, problems.run_w4(p, config), exact, name)
    else:
        timers["humming"] = peer.timer(p, exact)
    timers["w4a8"] = checked_timer(p, problems.run_w4(p), exact, "w4a8")
    timers["fp8"] = checked_timer(p, problems.run_fp8(p), problems.exact_fp8(p), "fp8")
    return interleave({name: timer for name, timer in timers.items() if timer is not None}, rounds)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=("int4", "mxfp4"), default=["int4"])
    parser.add_argument("--layout", nargs="+", default=["masked", "contiguous", "dense"])
    parser.add_argument("--tokens", type=int, nargs="+", help="only these; rows where products are dense")
    parser.add_argument("--variants", action="store_true", help="time every tile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no case is begun")
    arguments = parser.parse_args()
    began, where = time.monotonic(), environment()
    shapes = [
        (kind, *shape, layout) for kind in arguments.kind for shape in SHAPES for layout in arguments.layout
    ]
    cases = [
        Case(layout, tokens, n, k, kind)
        for kind, n, k, layout in shapes
        for tokens in (DENSE if layout == "dense" else GROUPED)
        if arguments.tokens is None or tokens in arguments.tokens
    ]
    if arguments.variants:
        compile_all(cases)
        print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    peer, weights, made = None if arguments.variants else Peer(), None, None
    for case in cases:
        if time.monotonic() - began > arguments.budget:
            print(f"out of time before {case}", flush=True)
            break
        if made != (case.n, case.k, case.kind):
            made, weights = (case.n, case.k, case.kind), None
            weights = problems.make_weights(*made)
        assert weights is not None
        found = compete(problems.make_problem(case, *weights), peer, arguments.rounds)
        record = {"benchmark": "w4a8", **vars(case), "experts": case.experts, "microseconds": found, **where}
        append_result(arguments.results, record)
        say(case, {name: statistics.median(values) for name, values in found.items()})
    print(f"{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
