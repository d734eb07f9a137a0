"""Speed of DeepSeek inference on one GPU: FP8 against BF16 of the same runtime, random weights, one run.

    python benchmarks/bench_generate.py [--config inference/configs/config_16B.json] [--layers N] [--quick]

First both models read the same prompt, and the KL divergence of FP8 from BF16 is checked. Then are timed
- prefill: prompts of 2048 random tokens to the logits after them, and of a few less, every time another
  number of them, as prompts come; the median of several calls, in which FP8 and BF16 take turns;
- decode: `generate` itself with random prompts, the median time between two tokens of its callback, so that
  sampling, graphs and the host's part are in it;
- start-up: a fresh process with empty caches, from weights in memory to the first token.
Weights are random and tokens are too, so that experts are chosen about evenly: that is the most that a step
can have to read; prompts that are all the same, which choose the same experts, are the least. The memory
floor is the time that reading what a step touches takes at the rate of a large copy: the experts that were
really chosen (counted), all other weights and the cached tokens. Results go to
benchmarks/results/generate.jsonl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from blockscale import ops
from blockscale.formats import BlockFP8
from blockscale.metrics import kl_divergence
from blockscale.model.config import ModelConfig, load_config
from blockscale.model.decode import decode
from blockscale.model.generate import generate, prefill
from blockscale.model.transformer import Transformer
from blockscale.testing.bench import append_result, environment, wait
from blockscale.testing.random_model import random_model

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "generate.jsonl"
CONFIG = HERE.parent / "inference" / "configs" / "config_16B.json"
_ROUNDS, _WARM_ROUNDS = 11, 2
# Number of prompts, and tokens of each in every round.
PREFILL = {
    "1x2048": (1, [2048] * _ROUNDS),
    "1x2048, new lengths": (1, [2047 - round for round in range(_ROUNDS)]),
    "4x2048": (4, [2048] * _ROUNDS),
}
# Sequences of a batch differ, or are all the same, so that they choose the same experts.
DECODE = (
    *((batch, context, "different") for context in (512, 4096) for batch in (1, 8, 32, 128)),
    *((batch, 512, "same") for batch in (8, 32, 128)),
)
NEW_TOKENS = 48
WARM_TOKENS = 8  # of those, until graphs are there
MOST_DIVERGENCE = 0.1  # nats, of the worst prompt; 0.025 was measured
FORMATS = {"bf16": None, "fp8": BlockFP8()}


def random_prompts(model: Transformer, count: int, length: int, kind: str = "different") -> list[list[int]]:
    """Tokens drawn evenly."""
    generator = torch.Generator().manual_seed(0)
    shape = count if kind == "different" else 1, length
    drawn = torch.randint(model.config.vocab_size, shape, generator=generator)
    return drawn.expand(count, -1).tolist()


def prefill_rates(models: dict[str, Transformer], batch: int, lengths: list[int]) -> dict[str, float]:
    """Median tokens a second of reading prompts into an empty cache, until their logits are there."""
    caches = {name: model.cache(batch, max(lengths)) for name, model in models.items()}
    rates: dict[str, list[float]] = {name: [] for name in models}
    for length in lengths:
        for name, model in models.items():
            prompts = random_prompts(model, batch, length)
            wait(model.device)
            start = time.perf_counter()
            prefill(model, caches[name], prompts)
            wait(model.device)
            rates[name].append(batch * length / (time.perf_counter() - start))
    return {name: statistics.median(each[_WARM_ROUNDS:]) for name, each in rates.items()}


def seconds_of_step(model: Transformer, batch: int, context: int, kind: str) -> float:
    """Median time between two tokens of sequences that reach `context` tokens on average."""
    prompts = random_prompts(model, batch, context - NEW_TOKENS // 2, kind)
    times: list[float] = []

    def on_token(number: int, token: int) -> None:
        if number == batch - 1:
            times.append(time.perf_counter())

    generate(model, prompts, max_new_tokens=NEW_TOKENS, stop=(), on_token=on_token)
    steps = [later - earlier for earlier, later in pairwise(times)]
    return statistics.median(steps[WARM_TOKENS:])


@contextmanager
def counted_experts(own: range | None = None) -> Iterator[list[int]]:
    """Experts chosen by each call of the router, those of `own`; by default all, the shared ones too."""
    counts: list[int] = []
    choose = ops.moe_choose

    def counting(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        experts, weights = choose(*arguments, **options)
        counts.append(sum(own is None or expert in own for expert in experts.unique().tolist()))
        return experts, weights

    ops.moe_choose = counting
    try:
        yield counts
    finally:
        ops.moe_choose = choose


def tensors_of(part: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that an object holds, with the names of attributes on the way to it."""
    if isinstance(part, torch.Tensor):
        yield path, part
    elif isinstance(part, (list, tuple)):
        for each in part:
            yield from tensors_of(each, path)
    elif hasattr(part, "__dict__") and type(part).__module__.startswith("blockscale"):
        for name, each in vars(part).items():
            yield from tensors_of(each, f"{path}.{name}")


def weight_bytes(model: Transformer) -> int:
    """Bytes of all weights, each memory counted once."""
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in tensors_of(model)}
    return sum(memory.values())


def bytes_of_step(model: Transformer, batch: int, context: int, kind: str, own: range | None = None) -> int:
    """Bytes that one step of decoding has to read: weights, chosen experts alone, and cached tokens.

    own: the routed experts that this model has, if it has not all of them.
    """
    cache = model.cache(batch, 256)
    tokens = torch.tensor(random_prompts(model, batch, 1, kind), device=model.device)[:, 0]
    with counted_experts(own) as counts:
        decode(model, cache, range(batch), tokens, [1] * batch)
    experts, others = 0, 0
    for path, tensor in tensors_of(model):
        if tensor.dim() >= 3 and ".mlp." in path:  # (E, N, K), or as words; in layers of one shape
            experts += tensor.nbytes // len(tensor)
        elif not any(part in path for part in ("._kv_b.", "._embedding", "._table.")):
            others += tensor.nbytes
    touched = experts * sum(counts) // max(len(counts), 1)
    return others + touched + batch * context * cache.bytes_per_token


def copy_rate(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        wait(device)
        times.append((time.perf_counter() - start) / 10)
    return 2 * size / statistics.median(times)


def check(models: dict[str, Transformer]) -> float:
    """KL divergence of FP8 from BF16 after a prompt; fails if it is not small."""
    logits = {}
    for name, model in models.items():
        prompts = random_prompts(model, 4, 300)
        logits[name] = prefill(model, model.cache(4, 300), prompts)
    divergence = float(kl_divergence(logits["bf16"], logits["fp8"]).max())
    if not divergence < MOST_DIVERGENCE:
        raise SystemExit(f"FP8 is not BF16: KL divergence {divergence}")
    return divergence


def first_token(config: ModelConfig, name: str) -> None:
    """Print seconds from weights in memory to the first token of a first prompt, and to the third."""
    model = random_model(config, torch.device("cuda"), fmt=FORMATS[name])
    torch.cuda.synchronize()
    start, times = time.perf_counter(), []
    generate(
        model,
        random_prompts(model, 1, 300),
        max_new_tokens=3,
        stop=(),
        on_token=lambda *_: times.append(time.perf_counter() - start),
    )
    print(times[0], times[-1])


def startup(arguments: argparse.Namespace, name: str) -> list[float]:
    """`first_token` in a process of its own with empty caches of kernels."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "XDG_CACHE_HOME": folder, "CUDA_CACHE_PATH": folder}
        command = [sys.executable, __file__, "--config", str(arguments.config), "--first-token", name]
        if arguments.layers:
            command += ["--layers", str(arguments.layers)]
        result = subprocess.run(
            command, env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True, check=True
        )
    return [float(each) for each in result.stdout.split()]


def main() -> None:
    """Run everything and append a line of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--layers", type=int, help="fewer layers than the config has")
    parser.add_argument("--quick", action="store_true", help="context 512 only, no start-up")
    parser.add_argument("--first-token", choices=FORMATS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    if arguments.layers:
        config = config.model_copy(update={"num_hidden_layers": arguments.layers})
    if arguments.first_token:
        first_token(config, arguments.first_token)
        return
    record: dict[str, Any] = {"benchmark": "generate", "config": arguments.config.name, **environment()}
    if not arguments.quick:
        record["startup_seconds"] = {name: startup(arguments, name) for name in FORMATS}
        print("start-up to the first and third token, seconds:", record["startup_seconds"])
    device = torch.device("cuda")
    models = {name: random_model(config, device, fmt=fmt) for name, fmt in FORMATS.items()}
    record["kl_divergence"] = check(models)
    record["weight_bytes"] = {name: weight_bytes(model) for name, model in models.items()}
    rate = record["copy_bytes_per_second"] = copy_rate(device)
    print(f"KL {record['kl_divergence']:.4f}, weights {record['weight_bytes']}, copy {rate / 1e12:.2f} TB/s")
    record["prefill_tokens_per_second"] = {
        name: prefill_rates(models, batch, lengths) for name, (batch, lengths) in PREFILL.items()
    }
    for key, values in record["prefill_tokens_per_second"].items():
        ratio = values["fp8"] / values["bf16"]
        print(f"prefill {key}: " + ", ".join(f"{n} {v:,.0f}" for n, v in values.items()) + f", {ratio:.2f} x")
    record["decode"] = []
    for batch, context, kind in DECODE:
        if arguments.quick and context > 512:
            continue
        line: dict[str, Any] = {"batch": batch, "context": context, "prompts": kind}
        for name, model in models.items():
            seconds = seconds_of_step(model, batch, context, kind)
            floor = bytes_of_step(model, batch, context, kind) / rate
            line[name] = {"tokens_per_second": batch / seconds, "of_memory_floor": floor / seconds}
        record["decode"].append(line)
        ratio = line["fp8"]["tokens_per_second"] / line["bf16"]["tokens_per_second"]
        parts = (
            f"{n} {line[n]['tokens_per_second']:,.0f} tok/s ({line[n]['of_memory_floor']:.0%} of floor)"
            for n in models
        )
        print(f"decode batch {batch} at {context}, {kind}: {', '.join(parts)}, {ratio:.2f} x", flush=True)
    append_result(RESULTS, record)


if __name__ == "__main__":
    main()
