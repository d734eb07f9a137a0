"""Speed of DeepSeek inference on several GPUs of one machine, against one of them; random weights, FP8.

    torchrun --nproc-per-node 2 benchmarks/bench_ranks.py [--config inference/configs/config_16B.json]

The first rank holds the whole model and its share of the divided one, and times both like bench_generate.py.
Greedy tokens of the two are compared first: sums over ranks are rounded otherwise, and a different token must
have been nearly as likely. Results go to benchmarks/results/ranks.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from bench_generate import CONFIG, FORMATS, PREFILL, prefill_rates, random_prompts, seconds_of_step

from blockscale.model.config import load_config
from blockscale.model.generate import generate
from blockscale.model.launch import open_ranks
from blockscale.model.transformer import Transformer
from blockscale.testing.bench import append_result, environment
from blockscale.testing.random_model import random_model

RESULTS = Path(__file__).parent / "results" / "ranks.jsonl"
DECODE = ((1, 512), (8, 512), (32, 512))


def rates(model: Transformer) -> dict[str, float]:
    """Tokens a second of every case."""
    found = {
        f"prefill {name}": prefill_rates({"": model}, batch, lengths)[""]
        for name, (batch, lengths) in PREFILL.items()
    }
    for batch, context in DECODE:
        found[f"decode batch {batch} at {context}"] = batch / seconds_of_step(
            model, batch, context, "different"
        )
    return found


def written(model: Transformer) -> torch.Tensor:
    """Greedy tokens of a few prompts."""
    return torch.tensor(generate(model, random_prompts(model, 8, 200), max_new_tokens=32, stop=()))


def main() -> None:
    """Compare and time, and append a line of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    with open_ranks("cuda") as ranks:
        shared = random_model(config, ranks.device, fmt=FORMATS["fp8"], ranks=ranks)
        together, tokens = rates(shared), written(shared)
        if ranks.rank == 0:
            alone = random_model(config, ranks.device, fmt=FORMATS["fp8"])
            same = (written(alone) == tokens).int()
            record: dict[str, Any] = {
                "benchmark": "ranks",
                "config": arguments.config.name,
                "ranks": ranks.world,
                # Behind the first token that differs a sequence is another one.
                "tokens_until_they_differ": same.cumprod(1).sum(1).tolist(),
                "tokens_per_second": {"one": rates(alone), "all": together},
                **environment(),
            }
            append_result(RESULTS, record)
            print("tokens that are the same, of 32 each:", record["tokens_until_they_differ"])
            for name, rate in together.items():
                one = record["tokens_per_second"]["one"][name]
                print(f"{name}: one {one:,.0f}, {ranks.world} ranks {rate:,.0f} tok/s, {rate / one:.2f} x")
        ranks.wait()


if __name__ == "__main__":
    main()
