"""Where block sizes other than 128x128 pay: noise and bytes of every candidate, on planted and real weights.

    python benchmarks/bench_blocks.py [--model NAME=FOLDER ...] [--rounds 3] [--size 1024]

A line for each case and scale format: signal to quantization noise ratio, the relative noise of an
output, and bytes, of every candidate of `--block-size auto`; and which of them it chooses. Of a model (a
folder of safetensors files), the line has the noise of all linear weights together, the range of what
each candidate gains over 128x128 and how many weights choose which. A model is also quantized with and
without auto, in rounds of random order, for what the choice costs. Codes and scales of planted weights are
compared with the reference, bit for bit. Results: benchmarks/results/blocks.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blockscale import Recipe, metrics, ops, plan_checkpoint, quantize_checkpoint, reference
from blockscale.checkpoint.block_choice import CANDIDATES, Measured, gain_db, judge, together
from blockscale.checkpoint.block_measure import measure
from blockscale.checkpoint.families import family_of
from blockscale.checkpoint.strips import Span
from blockscale.formats import ScaleFmt, spell_block_size
from blockscale.testing.asserts import assert_bitwise_equal
from blockscale.testing.bench import append_result, environment, time_interleaved

RESULTS = Path(__file__).parent / "results" / "blocks.jsonl"
SIZES = [spell_block_size(size) for size in CANDIDATES]
FORMATS: tuple[ScaleFmt, ...] = ("float32", "ue8m0")
DEVIATION = 0.02


def planted(size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights (size, size) in BF16 whose distribution is known."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(size, size, generator=generator)

    def with_outlier(place: Any, factor: float) -> torch.Tensor:
        weight = normal() * DEVIATION
        weight[place] *= factor
        return weight.bfloat16()

    yield "Gaussian", (normal() * DEVIATION).bfloat16()
    for freedom in (5, 3, 2):
        chi = torch.stack([normal().square() for _ in range(freedom)]).mean(0)
        yield f"Student t, {freedom} degrees of freedom", (normal() / chi.sqrt() * DEVIATION).bfloat16()
    middle = size // 3
    for factor in (100, 10_000):
        yield f"one column x{factor}", with_outlier((slice(None), middle), factor)
        yield f"one row x{factor}", with_outlier(middle, factor)
    yield "one element x10000", with_outlier((middle, middle), 10_000)
    yield "one element x1000000", with_outlier((middle, middle), 1_000_000)


def candidates(measured: Measured) -> dict[str, dict[str, float]]:
    """The criterion's figures of every candidate."""
    return {
        size: {
            "noise": measured.noise[place],
            "gain_db": gain_db(measured, place),
            "scale_bytes": measured.scale_bytes[place],
            "bytes": measured.values + measured.scale_bytes[place],
        }
        for place, size in enumerate(SIZES)
    }


def planted_case(name: str, weight: torch.Tensor, scale_fmt: ScaleFmt) -> dict[str, Any]:
    """The record of one planted weight."""
    whole = [(Span(0, 0, weight.shape[0], 0), weight)]
    measured = measure(tuple(weight.shape), whole, family_of({}), scale_fmt)
    figures = candidates(measured)
    for spelled, size in zip(SIZES, CANDIDATES, strict=True):
        codes, scale = ops.quantize_weight(weight, size, scale_fmt)
        truth = reference.quantize_weight(weight, size, scale_fmt)
        assert_bitwise_equal(codes, truth[0], f"{name} {spelled}: codes")
        assert_bitwise_equal(scale, truth[1], f"{name} {spelled}: scales")
        values = reference.dequantize_weight(codes, scale, size, torch.float32)
        figures[spelled]["sqnr_db"] = metrics.sqnr_db(values, weight.float())
        figures[spelled]["flushed"] = float(((values == 0) & (weight != 0)).float().mean())
    place, reason = judge(measured)
    chosen = {"chosen": {SIZES[place]: 1}, "reason": reason}
    return {"case": name, "shape": list(weight.shape), "candidates": figures, **chosen}


def model_case(name: str, folder: Path, scale_fmt: ScaleFmt) -> dict[str, Any]:
    """The record of a model's linear weights, each chosen for by itself or with those fused with it."""
    plan = plan_checkpoint(folder, Recipe(scale_fmt, "auto", "compressed-tensors"))
    assert plan.block_choice is not None
    every = [
        Measured(each.values, tuple(each.noise.values()), tuple(each.scale_bytes.values()))
        for each in plan.block_choice.values()
    ]
    figures = candidates(together(every))
    for place, size in enumerate(SIZES):
        gains = [gain_db(each, place) for each in every]
        figures[size] |= {"lowest_gain_db": min(gains), "highest_gain_db": max(gains)}
        figures[size].pop("bytes")
    counts = Counter(spell_block_size(each.block_size) for each in plan.block_choice.values())
    return {"case": name, "weights": len(every), "candidates": figures, "chosen": dict(counts)}


def cost_of_auto(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a conversion with 128x128 blocks and with auto, which reads the weights twice."""
    with tempfile.TemporaryDirectory(prefix="blockscale-") as scratch:
        runs = iter(range(1_000_000))

        def convert(recipe: Recipe) -> None:
            quantize_checkpoint(folder, Path(scratch) / str(next(runs)), recipe)

        competitors: dict[str, Callable[[], None]] = {
            "128x128": partial(convert, Recipe()),
            "auto": partial(convert, Recipe(block_size="auto")),
        }
        timings = time_interleaved(competitors, rounds)
        return {run: asdict(timings.of(run)) for run in competitors}


def show(record: dict[str, Any]) -> None:
    """One line of figures."""
    gains = ", ".join(f"{size} {each['gain_db']:+.2f} dB" for size, each in record["candidates"].items())
    print(f"{record['case']}, {record['scale_fmt']}: {gains}; chosen {record['chosen']}", flush=True)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--no-append", action="store_true", help="print only")
    arguments = parser.parse_args()
    where = environment()

    def keep(record: dict[str, Any]) -> None:
        if not arguments.no_append:
            append_result(RESULTS, {"benchmark": "blocks", **record, **where})

    for scale_fmt in FORMATS:
        for name, weight in planted(arguments.size):
            record = {"scale_fmt": scale_fmt, **planted_case(name, weight, scale_fmt)}
            show(record)
            keep(record)
    for name, folder in (text.split("=", 1) for text in arguments.model):
        for scale_fmt in FORMATS:
            record = {"scale_fmt": scale_fmt, **model_case(name, Path(folder), scale_fmt)}
            show(record)
            keep(record)
        seconds = cost_of_auto(Path(folder), arguments.rounds)
        print(f"{name}: {seconds}")
        keep({"case": f"{name}, time of the conversion", "seconds": seconds, "rounds": arguments.rounds})


if __name__ == "__main__":
    main()
