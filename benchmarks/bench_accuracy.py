"""What few bits cost in accuracy, rounded plainly and calibrated: perplexity, KL divergence, top-1, by model.

    python benchmarks/bench_accuracy.py plain [NAME=TEXT[+TEXT] ...] --model NAME=FOLDER --text FILE
        [--formats float32 ue8m0] [--context 1024] [--limit N] [--first 32] [--tokens 262144] [--device auto]

The model is quantized in every format, plainly and calibrated on every NAME=TEXT ("self" is what the model
writes itself), each verified against its source, and read back by `evaluate` with quantized activations: in
FP8 arithmetic where the device has it, else emulated. Formats are FP8 with float32 or ue8m0 scales, a format
of fewer bits for all linear layers but the head (int4:g128), or the name of a recipe (w4a8). The reference
is the BF16 model on the same tokens; all else is computed in float32. A line for each, over all windows and
over the first few.
Results: benchmarks/results/accuracy.jsonl; `--table` prints the newest of every case as Markdown.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from blockscale import Recipe, quantize_checkpoint, verify_checkpoint
from blockscale.calibrate.checkpoint import CalibratedRounder
from blockscale.calibrate.text import SELF, Calibration
from blockscale.checkpoint.convert import RunOptions
from blockscale.checkpoint.lanes import usable_device
from blockscale.checkpoint.recipe import PRESETS
from blockscale.checkpoint.source import open_source
from blockscale.evaluate.compare import Scores, WindowScore, summarize
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.run import Text, evaluate
from blockscale.evaluate.text import read_text
from blockscale.model.text import Tokenizer
from blockscale.testing.bench import append_result, environment

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
FP8 = ("float32", "ue8m0")  # scales
PLAIN = "plain"


class Case(NamedTuple):
    """A conversion: format, name of the calibration ("plain" for none) and the texts of it."""

    format: str
    rounding: str
    texts: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """How to quantize."""
        if self.format in FP8:
            return Recipe(self.format)
        if self.format in PRESETS:
            return PRESETS[self.format]
        return Recipe(layout="blockscale", precision={"default": self.format})


def convert(source: Path, out: Path, case: Case, tokens: int, device: str) -> dict[str, Any]:
    """Quantize, verify, and say what was made."""
    rounder = None
    if case.texts:
        read = tuple(text if text == SELF else read_text(text) for text in case.texts)
        calibration = Calibration(read, Tokenizer(str(source)).encode, tokens)
        rounder = CalibratedRounder(open_source(str(source)), calibration, device)
    quantize_checkpoint(source, out, case.recipe, run=RunOptions(device=device), rounder=rounder)
    verified = verify_checkpoint(out, source)
    if not verified.ok:
        raise SystemExit(f"error: {out} does not verify")
    return {
        "relative_error": verified.relative_error,
        "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "calibration_tokens": tokens if case.texts else None,
    }


def read(model: Path, source: Path, text: Text, first: int, device: str) -> dict[str, Scores]:
    """Scores over all windows, and over the first few."""
    seen: list[WindowScore] = []
    loading = Loading(device=device, dtype=torch.float32)
    evaluate(
        str(model),
        text,
        reference=str(source),
        loading=loading,
        on_window=lambda score, _: seen.append(score),
    )
    return {"all": summarize(seen)} | ({f"first {first}": summarize(seen[:first])} if first else {})


def bf16_row(scores: dict[str, Scores], source: Path) -> dict[str, Any]:
    """The record of the reference, which every evaluation gives."""
    perplexities = {
        name: {"perplexity": asdict(each.against.perplexity), "tokens": each.tokens}
        for name, each in scores.items()
        if each.against is not None
    }
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return {"format": None, "rounding": None, "bytes": size, "windows": perplexities}


def cases(formats: list[str], roundings: list[str]) -> Iterator[Case]:
    """All formats, each with every rounding."""
    for fmt in formats:
        for rounding in roundings:
            name, _, texts = rounding.partition("=")
            yield Case(fmt, name, tuple(texts.split("+")) if texts else ())


def run(options: argparse.Namespace) -> None:
    """Measure every case of a model."""
    name, _, folder = options.model.partition("=")
    source, where = Path(folder), environment()
    text = Text(str(options.text), context=options.context, limit=options.limit)

    def keep(record: dict[str, Any]) -> None:
        setting = {"text": Path(options.text).name, "context": options.context}
        append_result(options.results, {"benchmark": "accuracy", "model": name, **setting, **record, **where})
        print(json.dumps({key: record[key] for key in ("format", "rounding", "windows")}), flush=True)

    device = usable_device(options.device)
    for number, case in enumerate(cases(options.formats, options.roundings)):
        with tempfile.TemporaryDirectory(prefix="blockscale-") as scratch:
            out = Path(scratch) / "quantized"
            made = convert(source, out, case, options.tokens, device)
            scores = read(out, source, text, options.first, device)
        if number == 0 and case.rounding == PLAIN:
            keep(bf16_row(scores, source))
        windows = {part: asdict(each) for part, each in scores.items()}
        texts = [each if each == SELF else Path(each).name for each in case.texts]
        keep(
            {
                "format": case.format,
                "rounding": case.rounding,
                "texts": texts,
                **made,
                "windows": windows,
            }
        )


def table(file: Path) -> Iterator[str]:
    """The newest record of every case over all windows, as lines of Markdown; in brackets 95 % intervals."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        newest[tuple(str(record[key]) for key in ("model", "format", "rounding"))] = record
    models = list(dict.fromkeys(record["model"] for record in newest.values()))
    yield "| model | weights | MB | perplexity | ratio to BF16 | KL, nats | same top token |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for record in sorted(newest.values(), key=lambda each: models.index(each["model"])):
        kind, scores = "BF16", record["windows"]["all"]
        if record["format"] is not None:
            how = PLAIN if record["rounding"] == PLAIN else f"calibrated on {record['rounding']}"
            kind = f"{'FP8 ' if record['format'] in FP8 else ''}{record['format']}, {how}"
        cells = [
            record["model"],
            kind,
            f"{record['bytes'] / 1e6:.0f}",
            f"{scores['perplexity']['value']:.3f}",
        ]
        yield f"| {' | '.join([*cells, *_against(scores.get('against'))])} |"


def _against(against: dict[str, Any] | None) -> list[str]:
    if against is None:
        return ["1", "0", "1"]
    ratio, kl, top1 = (against[name] for name in ("ratio", "kl", "top1"))
    return [
        f"{ratio['value']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})",
        f"{kl['value']:.4f} ({kl['low']:.4f} to {kl['high']:.4f})",
        f"{top1['value']:.3f}",
    ]


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("roundings", nargs="*", default=[PLAIN], metavar="plain | NAME=TEXT[+TEXT]")
    parser.add_argument("--table", action="store_true", help="print the results and measure nothing")
    parser.add_argument("--model", metavar="NAME=FOLDER")
    parser.add_argument("--text", help="file to read, or wikitext2")
    parser.add_argument("--formats", nargs="+", default=list(FP8), metavar="FORMAT")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--limit", type=int, help="most windows, spread over the text")
    parser.add_argument("--first", type=int, default=0, help="windows to count apart from the others as well")
    parser.add_argument("--tokens", type=int, default=262144, help="calibration tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(options.results)))
    elif options.model is None or options.text is None:
        parser.error("--model and --text are needed")
    else:
        run(options)


if __name__ == "__main__":
    main()
