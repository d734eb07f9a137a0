"""Whole-checkpoint quantization: wall time and peak memory against `cp` + `sync` and llm-compressor.

    python benchmarks/bench_convert.py --gb 1 4 20 [--peer-python /path/to/venv/bin/python] [--repeats 1]
    python benchmarks/bench_convert.py --device cuda [--gb 4] [--folder /dev/shm]

For every size a synthetic Llama-shaped BF16 checkpoint in shards of about 1 GB is made, then each competitor
runs as a process of its own on that one shard set, which is dropped from the page cache before (the software
is not), timed until `sync` returns. The first size is verified tensor by tensor before anything is timed.
With `--device cuda` blockscale runs on the GPU as well, once every file of it is the CPU's byte for byte.
Beside the time of the process there is that of the conversion in it, without imports and starting the GPU.
`--peer-python` names an interpreter of an environment with llm-compressor; its model-free PTQ then runs with
the scheme FP8_BLOCK and as many threads. Results go to benchmarks/results/convert.jsonl.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import blockscale
from blockscale.testing.bench import append_result, environment

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 32000
SHARD_BYTES = 1_000_000_000
RESULTS = Path(__file__).parent / "results" / "convert.jsonl"
_PEER = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="FP8_BLOCK",
               ignore=["lm_head", "model.embed_tokens"], max_workers=int(sys.argv[3]), device="cpu")
"""


@dataclass(frozen=True)
class Outcome:
    """One run of one competitor: seconds until synced; peak resident and peak anonymous memory in bytes.

    `conversion` is what blockscale reports: seconds from the plan to the commit.
    """

    seconds: float
    conversion: float | None
    resident: int
    anonymous: int


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a Llama-shaped checkpoint of about this size; returns its tensor bytes."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(VOCABULARY * HIDDEN + 4096, generator=generator).mul_(0.02).bfloat16()
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    total, layer = 2 * VOCABULARY * HIDDEN * 2, 0
    while total < gigabytes * 1e9:
        prefix = f"model.layers.{layer}."
        attention = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qo"}
        attention |= {f"self_attn.{name}_proj": (HIDDEN // 4, HIDDEN) for name in "kv"}
        mlp = {f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        mlp["mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
        for name, shape in (attention | mlp).items():
            shapes[f"{prefix}{name}.weight"] = shape
            total += shape[0] * shape[1] * 2
        layer += 1
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, int]]] = [{}]
    for name, shape in shapes.items():
        if sum(n * k * 2 for n, k in shards[-1].values()) >= SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for place, (name, shape) in enumerate(shard.items()):
            start = (number * 1009 + place * 7919) % 4096
            tensors[name] = pool[start : start + shape[0] * shape[1]].view(shape).clone()
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layer,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return total


def run(command: list[str], source: Path) -> Outcome:
    """Run a command on a source that is not in the page cache, then `sync`; samples its memory meanwhile."""
    subprocess.run(["sync"], check=True)
    for path in source.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    stop = threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, peaks, stop))
    sampler.start()
    stdout, stderr = process.communicate()
    stop.set()
    sampler.join()
    subprocess.run(["sync"], check=True)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed: {stderr.decode()[-2000:]}")
    seconds = time.monotonic() - started
    conversion = json.loads(stdout)["seconds"] if "--json" in command else None
    return Outcome(seconds, conversion, peaks["VmHWM"], peaks["RssAnon"])


def _sample(pid: int, peaks: dict[str, int], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            key, _, value = line.partition(":")
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", help="sizes; 1 4 20, or 4 with --device cuda")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: beside the CPU")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peer-python", help="interpreter of an environment with llm-compressor")
    parser.add_argument("--folder", help="where to put the checkpoints (needs 3 times the largest size)")
    arguments = parser.parse_args()
    sizes = arguments.gb or ([4] if arguments.device == "cuda" else [1, 4, 20])
    workers = len(os.sched_getaffinity(0))
    table = Table(title=f"quantize a BF16 checkpoint to 128x128 block FP8, {workers} cores")
    headings = (
        "GB",
        "competitor",
        "seconds",
        "GB/s in",
        "of cp + sync",
        "converting",
        "resident",
        "anonymous",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "competitor" else "right")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for place, gigabytes in enumerate(sizes):
            source, target = Path(folder) / "source", Path(folder) / "target"
            total = make_checkpoint(source, gigabytes)
            if place == 0:
                _check(source, target, arguments.device)
            outcomes = _compete(source, target, workers, arguments)
            _report(gigabytes, total, outcomes, table)
            shutil.rmtree(source)
    Console().print(table)


def _check(source: Path, target: Path, device: str) -> None:
    """Look at the results before anything is timed."""
    blockscale.quantize_checkpoint(source, target, run=blockscale.RunOptions(device="cpu"))
    assert blockscale.verify_checkpoint(target, source).ok, "the result is wrong: nothing is timed"
    if device == "cuda":
        other = target.with_name("other")
        blockscale.quantize_checkpoint(source, other, run=blockscale.RunOptions(device="cuda"))
        names = sorted(path.name for path in target.iterdir())
        assert names == sorted(path.name for path in other.iterdir())
        _, different, missing = filecmp.cmpfiles(target, other, names, shallow=False)
        assert not different, f"not the bytes of the CPU, nothing is timed: {different}"
        assert not missing, f"cannot be compared, nothing is timed: {missing}"
        shutil.rmtree(other)
    shutil.rmtree(target)


def _compete(
    source: Path, target: Path, workers: int, arguments: argparse.Namespace
) -> dict[str, list[Outcome]]:
    ours = [sys.executable, "-m", "blockscale", "quantize", str(source), str(target), "--json"]
    commands = {
        "cp + sync": ["cp", "-r", str(source), str(target)],
        "blockscale": [*ours, "--device", "cpu"],
    }
    if arguments.device == "cuda":
        commands["blockscale cuda"] = [*ours, "--device", "cuda"]
    if arguments.peer_python:
        peer = [arguments.peer_python, "-c", _PEER, str(source), str(target), str(workers)]
        commands["llm-compressor"] = peer
    outcomes: dict[str, list[Outcome]] = {name: [] for name in commands}
    for _ in range(arguments.repeats):
        for name, command in commands.items():
            outcomes[name].append(run(command, source))
            shutil.rmtree(target)
    return outcomes


def _report(gigabytes: float, total: int, outcomes: dict[str, list[Outcome]], table: Table) -> None:
    baseline = [outcome.seconds for outcome in outcomes["cp + sync"]]
    for name, runs in outcomes.items():
        seconds = statistics.median(outcome.seconds for outcome in runs)
        pairs = zip(runs, baseline, strict=True)
        ratio = statistics.median(outcome.seconds / base for outcome, base in pairs)
        conversions = [outcome.conversion for outcome in runs if outcome.conversion]
        converting = total / statistics.median(conversions) if conversions else None
        resident, anonymous = max(o.resident for o in runs), max(o.anonymous for o in runs)
        record = {
            "benchmark": "convert",
            "competitor": name,
            "tensor_bytes": total,
            "seconds": [round(outcome.seconds, 2) for outcome in runs],
            "median_seconds": round(seconds, 2),
            "gb_per_s": round(total / seconds / 1e9, 3),
            "ratio_to_cp": round(ratio, 3),
            "converting": converting
            and {
                "seconds": [round(value, 3) for value in conversions],
                "gb_per_s": round(converting / 1e9, 3),
            },
            "peak_resident_bytes": resident,
            "peak_anonymous_bytes": anonymous,
        }
        append_result(RESULTS, {**record, **environment()})
        figures = f"{seconds:.1f}", f"{total / seconds / 1e9:.2f}", f"{ratio:.2f}"
        alone = f"{converting / 1e9:.2f} GB/s" if converting else ""
        memory = f"{resident / 1e9:.2f} GB", f"{anonymous / 1e9:.2f} GB"
        table.add_row(f"{gigabytes:g}", name, *figures, alone, *memory)


if __name__ == "__main__":
    main()
