"""What training through the rounding wins back: against plain and calibrated rounding, at equal steps.

    python benchmarks/bench_training.py --model NAME=FOLDER --data TEXT --val TEXT [--recipe w4a8]
        [--cases dynamic learned:lr=1e-4,initial=calibrated dynamic:distill=source] [--steps 1000]
        [--batch 64] [--context 512] [--lr 1e-4]
        [--calibrate TEXT --calibration-tokens 131072] [--also NAME=TEXT] [--windows 160] [--device auto]

Everything has had the same steps on the same text, so that nothing is counted as won that more training alone
would have brought:

    bf16        the model, trained on without rounding: the reference of all others
    plain       that one, rounded to nearest by the recipe
    calibrated  that one, rounded by calibration on the text
    bf16:...    the same otherwise, of which the curve alone is recorded: whether bf16 is as good as it gets
    a case      trained through the rounding, as `blockscale train --recipe ...` does it;
                `initial=calibrated` begins with the codes of the model calibrated on the text,
                `distill=source` learns its predictions, `distill=bf16` those of the trained one
    source      the model before any training, which a case may not be worse than for all that, and
    source plain, rounded to nearest

All trainings run at once, a process each, but for those that learn from bf16, which begin when it is done;
seconds are therefore those of a shared device. Each checkpoint is
verified and read back by `evaluate` with quantized activations, beside bf16 on the same tokens. Of the gap of
perplexity between bf16 and plain, a case recovers (plain - case) / (plain - bf16); of that between source and
source plain likewise. Results, curves included, go to benchmarks/results/training.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from blockscale import quantize_checkpoint, verify_checkpoint
from blockscale.calibrate.checkpoint import CalibratedRounder
from blockscale.calibrate.text import Calibration
from blockscale.checkpoint.convert import RunOptions
from blockscale.checkpoint.lanes import usable_device
from blockscale.checkpoint.recipe import Recipe, read_recipe
from blockscale.checkpoint.source import open_source
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.run import Text, evaluate
from blockscale.evaluate.text import read_text
from blockscale.model.text import Tokenizer
from blockscale.qat import recovered
from blockscale.testing.bench import append_result, environment

RESULTS = Path(__file__).parent / "results" / "training.jsonl"
BF16, PLAIN, CALIBRATED = "bf16", "plain", "calibrated"
SOURCE, SOURCE_PLAIN, INITIAL = "source", "source plain", "initial"
CURVE = 200  # points of a curve that are kept


@dataclass(frozen=True)
class Case:
    """A training: `learned`, `dynamic:lr=2e-4`; bf16, or `bf16:lr=2e-4`, has no rounding."""

    name: str

    @property
    def is_unrounded(self) -> bool:
        """Whether it is trained without rounding."""
        return self.name.partition(":")[0] == BF16

    @property
    def needs_bf16(self) -> bool:
        """Whether it learns from the model that was trained without rounding."""
        return f"distill={BF16}" in self.name

    def arguments(self, options: argparse.Namespace, out: Path) -> list[str]:
        """Of `blockscale train`."""
        scales, _, changed = self.name.partition(":")
        asked = {
            "max-steps": options.steps, "batch": options.batch, "context": options.context, "lr": options.lr,
            "eval-data": options.val, "eval-windows": options.checks,
            "eval-every": max(1, options.steps // 10), "save-every": options.steps, "device": options.device,
            "out": out,
        }  # fmt: skip
        if self.is_unrounded:
            asked["recipe"] = "none"
        else:
            asked |= {
                "recipe": options.recipe,
                "scales": scales,
                "masters": out.with_name(out.name + "-masters"),
            }
        asked |= dict(pair.split("=") for pair in changed.split(",") if pair)
        named = {
            CALIBRATED: place(out.parent, INITIAL),
            SOURCE: options.source,
            BF16: place(out.parent, BF16),
        }
        asked |= {
            name: named.get(asked[name], asked[name]) for name in ("initial", "distill") if name in asked
        }
        flags = [part for name, value in asked.items() for part in (f"--{name}", str(value))]
        return [options.source, str(options.data), *flags, "--json"]


def train_all(cases: Sequence[Case], options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """What `blockscale train --json` said of every case, also in the folder; all of them run at once."""

    def begin(case: Case) -> subprocess.Popen[bytes]:
        arguments = case.arguments(options, place(folder, case.name))
        with said(folder, case.name).open("wb") as output:
            return subprocess.Popen([sys.executable, "-m", "blockscale", "train", *arguments], stdout=output)

    running = {case.name: begin(case) for case in cases if not case.needs_bf16}
    told = {}
    while running:
        name = next(iter(running))  # bf16 is the first
        if running.pop(name).wait():
            raise SystemExit(f"error: training of {name} failed")
        told[name] = json.loads(said(folder, name).read_text(encoding="utf-8"))
        print(f"{name}: trained in {told[name]['seconds']:.0f} s", flush=True)
        if name == BF16:
            running |= {case.name: begin(case) for case in cases if case.needs_bf16}
    return told


def said(folder: Path, name: str) -> Path:
    """Where the output of a training lies."""
    return place(folder, f"{name}-output.json")


def place(folder: Path, name: str) -> Path:
    """Where a checkpoint of this name lies."""
    return folder / re.sub(r"[^\w.-]+", "-", name)


def round_with(
    source: Path | str, out: Path, recipe: Recipe, options: argparse.Namespace, *, text: bool
) -> None:
    """Quantize a checkpoint, plainly or calibrated on the text for it."""
    rounder = None
    if text:
        read = (read_text(options.calibrate),)
        calibration = Calibration(read, Tokenizer(str(source)).encode, options.calibration_tokens)
        rounder = CalibratedRounder(open_source(str(source)), calibration, options.device)
    quantize_checkpoint(source, out, recipe, run=RunOptions(device=options.device), rounder=rounder)


def check(out: Path, against: Path | str) -> float:
    """The relative error of a checkpoint's weights; fails if it does not verify."""
    found = verify_checkpoint(out, against)
    if not found.ok:
        raise SystemExit(f"error: {out} does not verify: {found.problems[:1]}")
    return float(found.relative_error or 0.0)


def score(out: Path, reference: Path | str, text: Text, device: str) -> dict[str, Any]:
    """Perplexity beside the one without rounding, paired."""
    loading = Loading(device=device, dtype=torch.float32)
    scores = evaluate(str(out), text, reference=str(reference), loading=loading).scores
    assert scores is not None
    return asdict(scores)


def thinned(values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some of the steps, evenly."""
    every = max(1, len(values) // CURVE)
    return [{key: each[key] for key in ("step", "loss")} for each in values[::every]]


def run(options: argparse.Namespace, folder: Path) -> None:
    """Train, round, read back, record."""
    model, _, options.source = options.model.partition("=")
    recipe, bf16 = read_recipe(options.recipe), place(folder, BF16)
    if any(f"initial={CALIBRATED}" in name for name in options.cases):
        round_with(options.source, place(folder, INITIAL), recipe, options, text=True)
    cases = [Case(name) for name in (BF16, *options.cases)]
    told = train_all(cases, options, folder)
    masters = {
        each.name: place(folder, each.name).with_name(place(folder, each.name).name + "-masters")
        for each in cases
        if not each.is_unrounded
    }
    made_from: dict[str, Path | str] = {PLAIN: bf16, SOURCE_PLAIN: options.source, **masters}
    made_from |= {CALIBRATED: bf16} if options.calibrate else {}
    texts = {"val": options.val, **dict(each.split("=", 1) for each in options.also)}
    figures: dict[str, dict[str, Any]] = {}
    unrounded = [each.name for each in cases if each.is_unrounded]
    for name in (*unrounded, *made_from):  # each is on the disk before the next is begun
        if name in made_from:
            figures[name] = measured(name, made_from[name], recipe, texts, options, folder)
        record = {
            "benchmark": "training", "model": model, "case": name, "recipe": Path(options.recipe).stem,
            "steps": options.steps, "batch": options.batch, "context": options.context, "lr": options.lr,
            "data": Path(options.data).name, "windows": options.windows,
            "training": name in told and curve(told[name]),
            "figures": figures.get(name),
            "recovered": name in (*masters, CALIBRATED) and share(figures, name), **environment(),
        }  # fmt: skip
        append_result(options.results, record)


def measured(
    name: str,
    against: Path | str,
    recipe: Recipe,
    texts: dict[str, str],
    options: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:
    """Round what was not trained so, verify a checkpoint and read it back."""
    out = place(folder, name)
    if name in (PLAIN, SOURCE_PLAIN, CALIBRATED):
        round_with(against, out, recipe, options, text=name == CALIBRATED)
    error = check(out, against)
    reference = options.source if name == SOURCE_PLAIN else place(folder, BF16)
    found = {
        label: score(
            out, reference, Text(data, context=options.context, limit=options.windows), options.device
        )
        for label, data in texts.items()
    }
    say(name, found)
    return {"relative_error": error, "texts": found}


def share(figures: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, float | None]]:
    """Text -> shares of the gaps to plain rounding that a case closes, after training and before any.

    None where there is no gap.
    """
    found: dict[str, dict[str, float | None]] = {}
    for label, each in figures[name]["texts"].items():
        own = each["perplexity"]["value"]
        for reference, plain in ((BF16, PLAIN), (SOURCE, SOURCE_PLAIN)):
            rounded = figures[plain]["texts"][label]
            won = recovered(rounded["against"]["perplexity"]["value"], rounded["perplexity"]["value"], own)
            found.setdefault(label, {})[reference] = None if math.isnan(won) else won
    return found


def curve(told: dict[str, Any]) -> dict[str, Any]:
    """Of what a training said, what is recorded."""
    options = {key: told["training"][key] for key in ("lr", "scale_lr", "qat", "distill", "initial")}
    # Where a checkpoint lay says nothing; which one it was does.
    options |= {key: options[key] and Path(options[key]).name for key in ("distill", "initial")}
    return {
        "options": options,
        "seconds": told["seconds"],
        "steps": thinned(told["steps"]),
        "checks": told["checks"],
        "reference": told["reference"],
    }


def say(name: str, found: dict[str, Any]) -> None:
    """A line for each text."""
    for label, each in found.items():
        ratio = each["against"]["ratio"]
        print(
            f"{name} on {label}: perplexity {each['perplexity']['value']:.3f}, bf16 "
            f"{each['against']['perplexity']['value']:.3f}, ratio {ratio['value']:.4f} "
            f"({ratio['low']:.4f} to {ratio['high']:.4f})",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument("--val", required=True, help="text to measure on")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=TEXT", help="more texts to measure on")
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument(
        "--cases", nargs="+", default=["dynamic", "learned"], metavar="SCALES[:OPTION=VALUE,...]"
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--checks", type=int, default=40, help="windows for the curve of perplexity")
    parser.add_argument("--windows", type=int, default=160, help="windows for the figures")
    parser.add_argument("--calibrate", help="text for calibrated rounding")
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints; by default they go")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.device = usable_device(options.device)
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        run(options, options.keep)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
