"""DeepSeek-V3 671B with routed experts in 4 bits: its bytes on the GPUs, and the speed of what they hold.

    python benchmarks/bench_671b.py [--layers auto|N] [--experts int4:g128]
    torchrun --nproc-per-node 4 benchmarks/bench_671b.py

Weights are random, made where they are computed with and stored as a `w4a8` checkpoint stores them: routed
experts in 4 bits, the other linear layers in FP8 blocks, the rest in BF16 and float32. They take the way of a
checkpoint's into the model. No multi-token prediction. With `--layers auto` a model has as many layers as fit
into the memory that is free on all GPUs, its dense ones first; figures are those of the layers named.

Before anything is timed a model of the dense layers and one with experts answers the same prompts
- with every product beside the float32 one of its dequantized operands (`ops.audit_gemms`), and
- on dequantized weights with activations as they are, from which its predictions may not diverge.
Then are timed, as in bench_generate.py, prefill and decode with random prompts, which choose experts about
evenly. The memory floor of a step is the time that reading what it touches takes at the rate of a large copy,
on the GPU that has to read the most. Results go to benchmarks/results/671b.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_generate import (
    bytes_of_step,
    copy_rate,
    prefill_rates,
    random_prompts,
    seconds_of_step,
    tensors_of,
    weight_bytes,
)

from blockscale import ops
from blockscale.formats import BlockFP8
from blockscale.group_spelling import WrittenFormat, parse_group_format, spell_group_format
from blockscale.metrics import kl_divergence
from blockscale.model.config import ModelConfig, load_config
from blockscale.model.decode import decode
from blockscale.model.gemm_names import gemm_names
from blockscale.model.launch import open_ranks
from blockscale.model.linear import Compute
from blockscale.model.prefill import all_logits
from blockscale.model.ranks import Ranks
from blockscale.model.slices import share
from blockscale.model.transformer import Transformer
from blockscale.ops import GemmLimits
from blockscale.testing.bench import append_result, environment, free_bytes, peak_bytes, release, wait
from blockscale.testing.random_model import random_model, stored_bytes, stored_tensors

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "671b.jsonl"
CONFIG = HERE.parent / "inference" / "configs" / "config_671B.json"
# The same architecture in small, for machines without a GPU.
TINY = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
}
MOST_CALC_DIFF = 1e-5  # of a product beside the float32 one
MOST_DIVERGENCE = 0.1  # nats, mean of all tokens; of other weights it is about one
RESERVE = 14 << 30  # of a GPU, for activations, caches, and the float32 that the head is rounded from
FP8 = BlockFP8()


@dataclass(frozen=True)
class Sizes:
    """What is timed: (prompts, tokens of each) and rounds of prefill; sequences and tokens before a step."""

    prefill: tuple[tuple[int, int], ...] = ((1, 2048), (4, 2048))
    rounds: int = 7
    decode: tuple[int, ...] = (1, 8, 32)
    context: int = 512
    checked: tuple[int, int] = (4, 100)
    copied: int = 1 << 30


SMALL = Sizes(
    prefill=((1, 40), (2, 40)), rounds=3, decode=(1, 2), context=40, checked=(2, 80), copied=1 << 20
)


@dataclass(frozen=True)
class Case:
    """A model to be made, in several depths, and the processes that share it."""

    config: ModelConfig
    experts: WrittenFormat
    ranks: Ranks

    def make(self, layers: int, compute: Compute = "fp8") -> Transformer:
        """Its first layers."""
        return random_model(
            self.cut(layers),
            self.ranks.device,
            fmt=FP8,
            experts=self.experts,
            ranks=self.ranks,
            compute=compute,
        )

    def cut(self, layers: int) -> ModelConfig:
        """The architecture with its first layers alone."""
        return self.config.model_copy(update={"num_hidden_layers": layers})

    @property
    def own(self) -> range:
        """The routed experts of this process."""
        return share(self.config.n_routed_experts, self.ranks).indices

    def stored(self, layers: int) -> int:
        """Bytes of its first layers in files, embedding and head included."""
        return stored_bytes(stored_tensors(self.cut(layers), FP8, self.experts).values())

    def most(self, value: float) -> float:
        """The largest value of all processes."""
        return max(self.ranks.gather(value))


def by_kind(model: Transformer) -> dict[str, int]:
    """Bytes of a model's tensors by what they are, each memory counted once; scales as they are in memory."""
    found = {"4-bit codes": 0, "4-bit scales": 0, "FP8 codes": 0, "other": 0}
    seen = set()
    for path, tensor in tensors_of(model):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        if path.endswith(".weight.words"):
            kind = "4-bit codes"
        elif path.endswith(".weight.scale"):
            kind = "4-bit scales"
        else:
            kind = "FP8 codes" if tensor.dtype == torch.float8_e4m3fn else "other"
        found[kind] += storage.nbytes()
    assert sum(found.values()) == weight_bytes(model)
    return found


def check(case: Case, sizes: Sizes) -> dict[str, float]:
    """Worst calc_diff of a product and mean divergence of predictions; fails if they are not small.

    The model has one layer with experts. A prompt runs their contiguous products, a step the masked ones.
    """
    layers = case.config.first_k_dense_replace + 1
    model = case.make(layers)
    prompts = random_prompts(model, *sizes.checked)
    room = sizes.checked[1] + 1
    cache = model.cache(len(prompts), room)
    tokens = torch.arange(len(prompts), device=model.device)
    with ops.audit_gemms(limits=GemmLimits(calc_diff=MOST_CALC_DIFF), names=gemm_names(model)) as audit:
        logits = all_logits(model, cache, prompts)
        step = decode(model, cache, range(len(prompts)), tokens, [room] * len(prompts))
    # A step of few tokens may choose none of the experts of a process.
    seen = set().union(*case.ranks.gather({each.op for each in audit.records if "w4a8" in each.op}))
    if len(seen) < 2:
        raise SystemExit(f"of the products with 4-bit experts ran only {seen}")
    worst = max(record.accumulation.calc_diff for record in audit.records)
    del model, cache, audit  # whose names hold the weights
    plain = case.make(layers, "high")
    cache = plain.cache(len(prompts), room)
    expected = all_logits(plain, cache, prompts)
    after = decode(plain, cache, range(len(prompts)), tokens, [room] * len(prompts))
    divergence = float(kl_divergence(torch.cat([*expected, after]), torch.cat([*logits, step])).mean())
    if not divergence < MOST_DIVERGENCE:
        raise SystemExit(f"not the model of its dequantized weights: KL divergence {divergence}")
    del plain, cache
    release(case.ranks.device)
    return {"calc_diff": case.most(worst), "kl_divergence": divergence}


def depth(case: Case, asked: str) -> tuple[int, int]:
    """Layers that are asked for or fit, and bytes in memory that all layers of the config would take."""
    dense, device = case.config.first_k_dense_replace, case.ranks.device
    sizes = []
    for layers in (dense, dense + 1):
        sizes.append(weight_bytes(case.make(layers)))
        release(device)
    base, layer = sizes[0], sizes[1] - sizes[0]
    depths = case.config.num_hidden_layers
    total = sum(case.ranks.gather(base + (depths - dense) * layer))
    if asked != "auto":
        return int(asked), total
    fit = min(*case.ranks.gather(dense + (free_bytes(device) - RESERVE - base) // layer), depths)
    if fit <= dense:
        raise SystemExit(f"no layer with experts fits: {layer / 1e9:.1f} GB each beside {base / 1e9:.1f} GB")
    return fit, total


def speeds(case: Case, model: Transformer, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens a second of prefill and decode, and how near a step is to its memory floor."""
    rate = -case.most(-copy_rate(model.device, sizes.copied))
    found: dict[str, Any] = {"copy_bytes_per_second": rate, "prefill_tokens_per_second": {}, "decode": []}
    for batch, length in sizes.prefill:
        name = f"{batch}x{length}"
        value = prefill_rates({"": model}, batch, [length] * sizes.rounds)[""]
        found["prefill_tokens_per_second"][name] = value
        say(f"prefill {name}: {value:,.0f} tok/s")
    for batch in sizes.decode:
        needed = case.most(bytes_of_step(model, batch, sizes.context, "different", case.own))
        seconds = seconds_of_step(model, batch, sizes.context, "different")
        line = {
            "batch": batch,
            "context": sizes.context,
            "tokens_per_second": batch / seconds,
            "step_seconds": seconds,
            "step_bytes_per_gpu": int(needed),
            "floor_seconds": needed / rate,
            "of_memory_floor": needed / rate / seconds,
        }
        found["decode"].append(line)
        say(
            f"decode batch {batch} at {sizes.context}: {batch / seconds:,.1f} tok/s, {1e3 * seconds:.2f} ms "
            f"a step, floor {1e3 * line['floor_seconds']:.2f} ms ({line['of_memory_floor']:.0%})"
        )
    return found


def run(case: Case, sizes: Sizes, asked: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything that is to be recorded of a case."""
    begin, config, ranks = time.perf_counter(), case.config, case.ranks
    checked = check(case, sizes)
    say(f"products within calc_diff {checked['calc_diff']:.1e}, KL {checked['kl_divergence']:.4f}")
    layers, total = depth(case, asked)
    wait(ranks.device)
    start = time.perf_counter()
    model = case.make(layers)
    wait(ranks.device)
    made, kinds = time.perf_counter() - start, ranks.gather(by_kind(model))
    release(ranks.device)
    whole = case.stored(config.num_hidden_layers)
    held = [sum(each.values()) for each in kinds]
    say(
        f"{layers} of {config.num_hidden_layers} layers on {ranks.world} x {ranks.device.type}, made in "
        f"{made:.0f} s; in memory {sum(held) / 1e9:.2f} GB ({max(held) / 1e9:.2f} GB on one of them), in "
        f"files {case.stored(layers) / 1e9:.2f} GB"
    )
    say(f"all layers: in memory {total / 1e9:.2f} GB, in files {whole / 1e9:.2f} GB")
    return {
        "experts": spell_group_format(case.experts),
        "ranks": ranks.world,
        "layers": layers,
        "layers_of_config": config.num_hidden_layers,
        "dense_layers": config.first_k_dense_replace,
        "check": checked,
        "memory_bytes": sum(held),
        "memory_bytes_by_gpu": held,
        "memory_bytes_by_kind": {name: sum(each[name] for each in kinds) for name in kinds[0]},
        "file_bytes": case.stored(layers),
        "all_layers": {"memory_bytes": total, "file_bytes": whole},
        "make_seconds": made,
        **speeds(case, model, sizes, say),
        "peak_bytes_of_gpu": case.most(peak_bytes(ranks.device)),
        "seconds": time.perf_counter() - begin,
    }


def main(arguments: list[str] | None = None) -> None:
    """Check, time, and append a line of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(CONFIG), help="a config file, or tiny")
    parser.add_argument("--layers", default="auto", help="how many; auto: as many as fit")
    parser.add_argument("--experts", default="int4:g128", help="int4:g128, int4:g128:ue8m0 or mxfp4")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    tiny = given.config == "tiny"
    config = load_config(CONFIG if tiny else given.config)
    if tiny:
        config = config.model_copy(update=TINY)
    with open_ranks() as ranks:
        case = Case(config, parse_group_format(given.experts), ranks)
        first = ranks.rank == 0

        def say(line: str) -> None:
            if first:
                print(line, flush=True)

        found = run(case, SMALL if tiny else Sizes(), given.layers, say)
        if first:
            name = "tiny" if tiny else Path(given.config).name
            append_result(given.results, {"benchmark": "671b", "config": name, **found, **environment()})


if __name__ == "__main__":
    main()
