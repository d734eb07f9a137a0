"""BF16 <-> block FP8 on the CPU: BF16 bytes a second, against a plain copy of the same tensor and others.

    python benchmarks/bench_cast.py [--rounds 31] [--threads N] [--no-append]

Every competitor is first compared with the reference, bit for bit. They are then timed in one process, in
interleaved rounds of random order, with outputs allocated beforehand where the interface allows it; ratios to
`copy_` are taken within a round. The slow ones run in a second, shorter group with a `copy_` of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from blockscale import ops, reference
from blockscale.formats import ScaleFmt
from blockscale.ops import dispatch
from blockscale.testing.asserts import assert_bitwise_equal, assert_quantized_equal
from blockscale.testing.bench import Timings, append_result, environment, time_interleaved
from blockscale.testing.data import gaussian
from blockscale.testing.shapes import CAST_SHAPES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cast.jsonl"
BLOCK = 128
COPY = "copy_"
Competitors = dict[str, Callable[[], object]]


def main() -> None:
    """Time every shape, print a table for each, append the figures to results/cast.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-append", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=110)
    where = environment()
    console.print(f"{where['machine']['cpu']}, {arguments.threads} threads, commit {where['commit']}")
    for shape in CAST_SHAPES:
        results = _bench(shape, arguments.threads, arguments.rounds, console)
        record = {
            "benchmark": "cast",
            "shape": shape,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
        }
        if not arguments.no_append:
            append_result(RESULTS, {**record, "results": results, **where})


def _bench(
    shape: tuple[int, int], threads: int, rounds: int, console: Console
) -> dict[str, dict[str, dict[str, float]]]:
    weight = gaussian(shape)
    truth = ops.quantize_weight(weight, backend="reference")
    back = ops.dequantize_weight(*truth, backend="reference")
    copy = {COPY: _copy(weight)}
    fast = {**_ours(weight, truth, back, threads), **_cpp_loop(weight, truth, back, threads)}
    fast |= _numba_loop(weight, truth, threads)
    slow = {**_eager(weight, truth), **_compiled(weight, truth, back)}
    timings = [time_interleaved(copy | fast, rounds), time_interleaved(copy | slow, max(3, rounds // 8))]

    table = Table(title=f"{shape[0]} x {shape[1]}, {weight.nbytes / 1e6:.0f} MB of BF16")
    table.add_column("")
    for heading in ("GB/s", "(range)", "of copy_", "(range)"):
        table.add_column(heading, justify="right")
    results = {}
    for group, (names, timing) in zip((fast, slow), zip((fast, slow), timings, strict=True), strict=True):
        for name in [COPY, *names] if group is fast else names:
            results[name] = _summary(timing, name, weight.nbytes / 1e9)
            rate, ratio = results[name]["gb_per_s"], results[name]["of_copy"]
            table.add_row(
                name,
                f"{rate['median']:.2f}",
                f"{rate['low']:.2f} - {rate['high']:.2f}",
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} - {ratio['high']:.2f}",
            )
    console.print(table)
    return results


def _summary(timing: Timings, name: str, gigabytes: float) -> dict[str, dict[str, float]]:
    return {
        "gb_per_s": asdict(timing.rate(name, gigabytes)),
        "of_copy": asdict(timing.speedup(name, COPY)),
    }


def _copy(weight: torch.Tensor) -> Callable[[], object]:
    target = torch.empty_like(weight)
    return lambda: target.copy_(weight)


def _ours(
    weight: torch.Tensor, truth: tuple[torch.Tensor, torch.Tensor], back: torch.Tensor, threads: int
) -> Competitors:
    out = torch.empty_like(truth[0]), torch.empty_like(truth[1])
    target = torch.empty_like(back)

    def quantize(scale_fmt: ScaleFmt) -> object:
        return ops.quantize_weight(weight, scale_fmt=scale_fmt, out=out, threads=threads, backend="numba")

    def dequantize() -> object:
        return ops.dequantize_weight(*truth, out=target, threads=threads, backend="numba")

    quantize("ue8m0")
    assert_quantized_equal(out, ops.quantize_weight(weight, scale_fmt="ue8m0", backend="reference"))
    quantize("float32")
    assert_quantized_equal(out, truth)
    dequantize()
    assert_bitwise_equal(target, back)
    return {
        "blockscale quantize": lambda: quantize("float32"),
        "blockscale quantize ue8m0": lambda: quantize("ue8m0"),
        "blockscale dequantize": dequantize,
    }


def _numba_loop(weight: torch.Tensor, truth: tuple[torch.Tensor, torch.Tensor], threads: int) -> Competitors:
    """The float32 loop in numba that the table path replaces."""
    kernels = dispatch.numba_kernels("bench_cast", weight.device, "numba")
    assert kernels is not None
    codes, scale = torch.empty_like(truth[0]), torch.empty_like(truth[1])
    shape, grid = (1, *weight.shape), (1, *scale.shape)
    x, q, s = dispatch.bits(weight, shape), dispatch.bits(codes, shape), scale.numpy().reshape(grid)

    def work(strips: tuple[int, int]) -> None:
        kernels.quantize_direct(x, q, s, (BLOCK, BLOCK), np.float32(0.0), False, strips)

    def quantize() -> None:
        dispatch.run_strips(work, grid[1], weight.numel(), threads)

    quantize()
    assert_quantized_equal((codes, scale), truth)
    return {"numba float32 loop quantize": quantize}


def _cpp_loop(
    weight: torch.Tensor, truth: tuple[torch.Tensor, torch.Tensor], back: torch.Tensor, threads: int
) -> Competitors:
    if shutil.which("g++") is None:
        print("C++ loop: skipped, no g++")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        library_path = f"{folder}/cast_loop.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-o", library_path]
        subprocess.run(["g++", *flags, str(HERE / "cast_loop.cpp")], check=True)
        library = ctypes.CDLL(library_path)
    (n, k), (codes, scale) = weight.shape, truth
    out = torch.empty_like(codes), torch.empty_like(scale)
    target = torch.empty_like(back)
    pool = ThreadPoolExecutor(threads)
    step = BLOCK * max(1, n // (BLOCK * threads * 8))

    def call(function: Callable[..., object], *tensors: torch.Tensor, last: tuple[object, ...] = ()) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]

        def work(row: int) -> None:
            numbers = map(ctypes.c_int64, (n, k, row, min(row + step, n)))
            function(*pointers, *numbers, *last)

        list(pool.map(work, range(0, n, step)))

    def quantize() -> None:
        call(library.quantize, weight, *out, last=(ctypes.c_int(0),))

    def dequantize() -> None:
        call(library.dequantize, *truth, target)

    quantize()
    assert_quantized_equal(out, truth)
    dequantize()
    assert_bitwise_equal(target, back)
    return {"C++ loop quantize": quantize, "C++ loop dequantize": dequantize}


def _eager(weight: torch.Tensor, truth: tuple[torch.Tensor, torch.Tensor]) -> Competitors:
    return {
        "eager torch quantize": lambda: reference.quantize_weight(weight),
        "eager torch dequantize": lambda: reference.dequantize_weight(*truth),
    }


def _compiled(
    weight: torch.Tensor, truth: tuple[torch.Tensor, torch.Tensor], back: torch.Tensor
) -> Competitors:
    if shutil.which("g++") is None:
        print("torch.compile: skipped, it needs a C++ compiler")
        return {}
    quantize = torch.compile(_quantize_blocks, dynamic=False)
    dequantize = torch.compile(_dequantize_blocks, dynamic=False)
    assert_quantized_equal(quantize(weight), truth)
    assert_bitwise_equal(dequantize(*truth), back)
    return {
        "torch.compile quantize": lambda: quantize(weight),
        "torch.compile dequantize": lambda: dequantize(*truth),
    }


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """(N, K), padded to whole blocks, as (N / 128, 128, K / 128, 128)."""
    n, k = x.shape
    if n % BLOCK or k % BLOCK:
        x = torch.nn.functional.pad(x, (0, -k % BLOCK, 0, -n % BLOCK))
    return x.view(x.shape[0] // BLOCK, BLOCK, x.shape[1] // BLOCK, BLOCK)


def _rows(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    rows = blocks.reshape(blocks.shape[0] * BLOCK, blocks.shape[2] * BLOCK)
    return rows[: shape[0], : shape[1]].contiguous()


def _quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = _blocks(weight.float())
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.where(amax == 0, 1.0, (amax / 448.0).clamp_min(2.0**-126))
    codes = (blocks / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return _rows(codes, weight.shape), scale[:, 0, :, 0].contiguous()


def _dequantize_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    blocks = _blocks(codes.float()) * scale[:, None, :, None]
    return _rows(blocks.to(torch.bfloat16), codes.shape)


if __name__ == "__main__":
    main()
