"""Draw benchmarks/results/gemm.jsonl: TFLOPS over rows M, blockscale and its peers.

    python benchmarks/plot_gemm.py [--results F] [--output docs/images/gemm_tflops.png]

The GPU of the latest record is drawn, by its latest record of every (M, N, K) and timing. A point is the
geometric mean over the six weight shapes of DeepSeek-V3; a competitor that sits one of them out at some M has
no point there. Above: TFLOPS, which span three orders of magnitude. Below: the same, as a multiple of
DeepGEMM's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from blockscale.testing.shapes import GEMM_SHAPES

RESULTS = Path(__file__).parent / "results" / "gemm.jsonl"
OUTPUT = Path(__file__).parent.parent / "docs" / "images" / "gemm_tflops.png"
TIMINGS = {"graph": "CUDA graph, weights never in cache", "flushed": "one call, cache flushed before"}
BASE = "deepgemm"
# Competitor: how it is called in the picture, and its color (Okabe and Ito's, for the color-blind too).
LOOKS = {
    "blockscale auto": ("blockscale", "#D55E00"),
    "deepgemm": ("DeepGEMM", "#0072B2"),
    "cublas fp8, blocks": ("cuBLASLt, block scales", "#009E73"),
    "deepseek triton": ("DeepSeek-V3 Triton kernel", "#CC79A7"),
    "cublas fp8, one scale": ("cuBLASLt, one scale a tensor", "#56B4E9"),
    "bf16 matmul": ("cuBLAS, BF16", "#7F7F7F"),
}
Shape = tuple[int, int, int]
Lines = dict[str, dict[int, float]]  # competitor -> M -> TFLOPS


def latest(path: Path) -> tuple[str, dict[str, dict[Shape, dict[str, float]]]]:
    """GPU of the latest record, and timing -> (M, N, K) -> competitor -> microseconds on it, best round."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records.sort(key=lambda record: record["date"])  # stable: of one date, the last line counts
    gpu = records[-1]["machine"]["gpu"]
    tables: dict[str, dict[Shape, dict[str, float]]] = {}
    for record in records:
        if record["machine"]["gpu"] == gpu:
            m, n, k = record["m_n_k"]
            # The best round of each: a host that was late with a launch is no property of a kernel.
            best = {name: min(each) for name, each in record["microseconds"].items()}
            tables.setdefault(record["timing"], {})[m, n, k] = best
    return gpu, tables


def mean_tflops(table: Mapping[Shape, Mapping[str, float]]) -> Lines:
    """Geometric means over the weight shapes, where a competitor has all of them."""
    lines: Lines = {}
    for m in sorted({m for m, _, _ in table}):
        rows = [(n, k, table.get((m, n, k), {})) for n, k in GEMM_SHAPES]
        for name in LOOKS:
            if all(name in row for _, _, row in rows):
                logs = [math.log(2e-6 * m * n * k / row[name]) for n, k, row in rows]
                lines.setdefault(name, {})[m] = math.exp(statistics.fmean(logs))
    return lines


def draw(path: Path, gpu: str, tables: Mapping[str, Mapping[Shape, Mapping[str, float]]]) -> None:
    """Write the picture, a column for each timing."""
    timings = [timing for timing in TIMINGS if timing in tables]
    figure, axes = pyplot.subplots(
        2, len(timings), figsize=(5 * len(timings), 6.4), sharex=True, sharey="row", squeeze=False,
        gridspec_kw={"height_ratios": (3, 2)}, layout="constrained",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for column, timing in enumerate(timings):
        upper, lower = axes[:, column]
        lines = mean_tflops(tables[timing])
        base = lines.get(BASE, {})
        ratios = {
            name: {m: tflops / base[m] for m, tflops in line.items() if m in base}
            for name, line in lines.items()
        }
        handles |= _plot(upper, lines)
        _plot(lower, ratios)
        upper.set_title(TIMINGS[timing], fontsize=10)
        upper.set_yscale("log")
        lower.set_xlabel("rows M")
    rows = sorted({m for table in tables.values() for m, n, k in table if (n, k) in GEMM_SHAPES})
    _label(axes, rows)
    figure.suptitle(
        f"Block-scaled FP8 GEMM at DeepSeek-V3's weight shapes, geometric mean, {gpu}", fontsize=11
    )
    order = [handles[name] for name in LOOKS if name in handles]
    figure.legend(handles=order, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _plot(axis: Axes, lines: Lines) -> dict[str, Any]:
    """Draw the lines, ours last so that it lies above the others."""
    handles = {}
    for name in reversed([name for name in LOOKS if name in lines]):
        label, color = LOOKS[name]
        ours = name.startswith("blockscale")
        (handles[name],) = axis.plot(
            *zip(*sorted(lines[name].items()), strict=True), label=label, color=color,
            marker="o", markersize=5 if ours else 3.5, linewidth=2.4 if ours else 1.3,
        )  # fmt: skip
    return handles


def _label(axes: Any, rows: list[int]) -> None:
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_xticks(rows, [f"{m:,}" for m in rows])
        axis.minorticks_off()
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0, 0].set_ylabel("TFLOPS")
    axes[1, 0].set_ylabel("times DeepGEMM")


def main() -> None:
    """Draw the picture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    draw(arguments.output, *latest(arguments.results))
    print(arguments.output)


if __name__ == "__main__":
    main()
