"""Draw benchmarks/results/training.jsonl: perplexity while models train through their rounding.

    python benchmarks/plot_training.py [--results F] [--output docs/images]

A picture for every model and recipe, training_MODEL_RECIPE.png, of the latest run. Left: perplexity of
text that is not trained on, at the checks of every training. Right: how far each lies above the one without
rounding after as many steps, in percent; dashed, what rounding makes of that one when it is done, and at the
end of a curve the 95 % interval of the checkpoint that was written, both on the windows of the figures, which
are more.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

RESULTS = Path(__file__).parent / "results" / "training.jsonl"
OUTPUT = Path(__file__).parent.parent / "docs" / "images"
BF16, TEXT = "bf16", "val"
GRAY, COLORS = "#7F7F7F", ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
# What is rounded after training, and how it is drawn.
ROUNDED = {"plain": ("rounded plainly", ":"), "calibrated": ("rounded, calibrated", "--")}
_SETTINGS = ("steps", "batch", "context", "lr", "data")  # what the records of a run have in common
_WORDS = {"initial": "from {} codes", "distill": "distilled from {}"}
Record = dict[str, Any]


def latest(path: Path) -> dict[tuple[str, str], dict[str, Record]]:
    """Model and recipe -> case -> record of the latest run."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = sorted(
        (each for each in records if each["benchmark"] == "training"), key=lambda each: each["date"]
    )
    if not records:
        raise SystemExit(f"error: {path} has no record of a training; run benchmarks/bench_training.py")
    runs: dict[tuple[str, str], dict[str, Record]] = {}
    for key in dict.fromkeys((each["model"], each["recipe"]) for each in records):
        own = [each for each in records if (each["model"], each["recipe"]) == key]
        last = [own[-1][name] for name in _SETTINGS]
        runs[key] = {each["case"]: each for each in own if [each[name] for name in _SETTINGS] == last}
    return runs


def spelled(case: str) -> str:
    """`learned:lr=2e-4,initial=calibrated` -> "learned scales, lr 2e-4, from calibrated codes"."""
    kind, _, options = case.partition(":")
    words = ["no rounding" if kind == BF16 else f"{kind} scales"]
    for option in filter(None, options.split(",")):
        name, value = option.split("=", 1)
        words.append(_WORDS.get(name, f"{name} {{}}").format(value))
    return ", ".join(words)


def perplexities(record: Record) -> dict[int, float]:
    """Step -> perplexity at the checks of a training."""
    return {check["step"]: math.exp(check["nll"]) for check in record["training"]["checks"]}


def above(found: dict[int, float], base: dict[int, float]) -> dict[int, float]:
    """Percent that perplexities lie above others after as many steps."""
    return {step: 100 * (value / base[step] - 1) for step, value in found.items() if step in base}


def draw(path: Path, model: str, run: dict[str, Record]) -> None:
    """Write the picture of a run."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    base = run[BF16]
    left.axhline(
        math.exp(base["training"]["reference"]["nll"]), color="black", linestyle="--", linewidth=1,
        label="before training",
    )  # fmt: skip
    left.plot(*_points(perplexities(base)), color=GRAY, marker="o", markersize=3, label=spelled(BF16))
    lowest = math.inf
    others = [case for case, record in run.items() if record["training"] and case != BF16]
    for case, color in zip(others, COLORS * len(others), strict=False):
        curve = perplexities(run[case])
        left.plot(*_points(curve), color=color, marker="o", markersize=3, label=spelled(case))
        if run[case]["figures"]:
            excess = above(curve, perplexities(base))
            lowest = min(lowest, *excess.values())
            right.plot(*_points(excess), color=color, marker="o", markersize=3)
            # Beside one another, not one upon the other.
            _interval(right, max(excess) * (1 + 0.015 * (1 + others.index(case))), run[case], color)
    for case, (label, style) in ROUNDED.items():
        if case in run:
            excess = 100 * (_against(run[case])["ratio"]["value"] - 1)
            right.axhline(
                excess, color=GRAY, linestyle=style, linewidth=1.3, label=f"{label}: {excess:.2g} %"
            )
    # Differences of less than a percent are noise, which a logarithm would blow up.
    right.set_yscale("log" if lowest > 1 else "linear")
    _label(left, right)
    machine = base["machine"].get("gpu") or base["machine"]["cpu"]
    figure.suptitle(
        f"{model}, {base['recipe']}, {base['steps']} steps of {base['batch']} x {base['context']} tokens, "
        f"{machine}",
        fontsize=11,
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _points(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())


def _against(record: Record) -> Record:
    found: Record = record["figures"]["texts"][TEXT]["against"]
    return found


def _interval(axis: Axes, step: float, record: Record, color: str) -> None:
    low, value, high = (100 * (_against(record)["ratio"][name] - 1) for name in ("low", "value", "high"))
    bars = [[value - low], [high - value]]
    axis.errorbar([step], [value], yerr=bars, color=color, capsize=4, marker="s", markersize=5)


def _label(left: Axes, right: Axes) -> None:
    left.set_yscale("log")
    # A few round numbers; those of logarithms are one or two where perplexity falls by a third.
    left.yaxis.set_major_locator(MaxNLocator(8))
    left.yaxis.set_minor_locator(NullLocator())
    for axis in (left, right):
        axis.set_xlabel("steps")
        axis.grid(axis="y", which="both", color="#E4E4E4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        for one in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            one(lambda value, _: f"{value:g}")
        axis.tick_params(axis="y", which="minor", labelsize=8)
    left.set_ylabel("perplexity of text not trained on")
    right.set_ylabel("above the training without rounding, %")
    right.legend(frameon=False, fontsize=9)


def main() -> None:
    """Draw the pictures from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    for (model, recipe), run in latest(arguments.results).items():
        path = arguments.output / f"training_{model}_{recipe}.png".lower()
        draw(path, model, run)
        print(path)


if __name__ == "__main__":
    main()
