"""Seconds from the start of a fresh process to its first FP8 product, kernels compiled on the way.

    python benchmarks/bench_first_gemm.py [--rounds 3]

Each round is two new processes: one with empty caches of compiled kernels, one with the caches that the
first left. Both import the package, quantize activations and a weight and multiply them, at 16 and at 4096
rows, and compare the products with the reference. Results: benchmarks/results/first_gemm.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from blockscale.testing.bench import append_result, environment

RESULTS = Path(__file__).parent / "results" / "first_gemm.jsonl"
LIMIT_SECONDS = 15
CHILD = """
import json, time
start = time.perf_counter()
import torch
from blockscale import ops, reference
from blockscale.metrics import calc_diff
imported = time.perf_counter()
weight = torch.randn(4096, 7168, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
ready = time.perf_counter()
products = {}
for rows in (16, 4096):
    begin = time.perf_counter()
    x = torch.randn(rows, 7168, device="cuda", dtype=torch.bfloat16)
    operands = *ops.quantize_activation(x, scale_layout="column"), *ops.quantize_weight(weight)
    out = ops.fp8_gemm_nt(*operands)
    torch.cuda.synchronize()
    products[rows] = time.perf_counter() - begin
    assert calc_diff(out, reference.fp8_gemm_nt(*operands, out_dtype=torch.float32)) < 1e-5
print(json.dumps({"import": imported - start, "device": ready - imported,
                  **{f"product of {rows} rows": seconds for rows, seconds in products.items()}}))
"""


def measure(cache: str) -> dict[str, float]:
    """Seconds by part of a new process whose compiled kernels are kept in `cache`."""
    places = {"XDG_CACHE_HOME": cache, "TRITON_CACHE_DIR": str(Path(cache) / "triton")}
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, env={**os.environ, **places}, check=True, stdout=subprocess.PIPE)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {name: round(each, 3) for name, each in seconds.items()}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled"):
                seconds = measure(cache)
                first = seconds["import"] + seconds["device"] + seconds["product of 16 rows"]
                print(f"caches {state}: first product after {first:.1f} s (limit {LIMIT_SECONDS})", seconds)
                record = {"benchmark": "first_gemm", "caches": state, "seconds": seconds, "first": first}
                append_result(RESULTS, {**record, **environment()})


if __name__ == "__main__":
    main()
