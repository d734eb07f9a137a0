"""What the runtime's formats and ranks change on a trained model: logits against transformers, greedy tokens.

    python benchmarks/bench_parity.py FOLDER [--prompts FILE] [--device cuda]
    torchrun --nproc-per-node 2 benchmarks/bench_parity.py FOLDER

transformers continues every prompt greedily in float32. Over these texts (a line of the file each, or the
few of this file) every format of the runtime then gives logits after every token, of which are recorded the
KL divergence from those of transformers and how often both find the same token likeliest; and it continues
the prompts itself, with graphs where it has them, of which is recorded how many tokens are those of
transformers. What BF16 changes in transformers itself is recorded beside. With several ranks the first also
does all of that alone, and what both wrote is compared. Results go to benchmarks/results/parity.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockscale.checkpoint.precision import parse_precision
from blockscale.metrics import kl_divergence
from blockscale.model.generate import generate
from blockscale.model.launch import open_ranks
from blockscale.model.load import load_model
from blockscale.model.prefill import all_logits
from blockscale.model.ranks import Ranks
from blockscale.testing.bench import append_result, environment

RESULTS = Path(__file__).parent / "results" / "parity.jsonl"
NEW_TOKENS = 64
FORMATS: dict[str, tuple[torch.dtype, list[str]]] = {
    "float32": (torch.float32, []),
    "bf16": (torch.bfloat16, []),
    "fp8": (torch.bfloat16, ["default=fp8"]),
}
PROMPTS = [
    start + word
    for start in ("The old man", "Once upon a time", "In the year 1815", "A letter from", "She said")
    for word in (" and the sea", ", who had", " was", " of the house and of the garden behind it")
]


def continued(
    folder: str, prompts: list[list[int]], device: torch.device
) -> tuple[list[list[int]], list[torch.Tensor], list[torch.Tensor]]:
    """What transformers makes of prompts.

    Returns:
        Greedy tokens of float32, as many of every prompt; logits after every token of prompts and those, of
        float32 and of BF16.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    model.generation_config.eos_token_id = None
    whole = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        mask = torch.ones_like(ids)
        whole.append(model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False))
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        with torch.inference_mode():
            logits.append([model(text[:, :-1]).logits[0] for text in whole])
    written = [text[0, len(prompt) :].tolist() for prompt, text in zip(prompts, whole, strict=True)]
    return written, logits[0], logits[1]


def until_other(tokens: list[int], expected: list[int]) -> int:
    """How many tokens are the same before one differs: behind it a sequence is another one."""
    pairs = zip(tokens, expected, strict=True)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(expected))


def main() -> None:
    """Compare, print, and append a line of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="checkpoint that transformers reads too")
    parser.add_argument("--prompts", type=Path, help="a prompt a line")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    lines = arguments.prompts.read_text().splitlines() if arguments.prompts else PROMPTS
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    prompts = [tokenizer(line)["input_ids"] for line in lines]
    with open_ranks(arguments.device) as ranks:
        alone = Ranks(device=ranks.device)
        expected, logits, narrow = continued(arguments.folder, prompts, ranks.device)
        record: dict[str, Any] = {
            "benchmark": "parity",
            "model": Path(arguments.folder).name,
            "ranks": ranks.world,
            "prompts": len(prompts),
            "new_tokens": NEW_TOKENS,
            "transformers_bf16": compared(narrow, logits),
            "formats": {},
            **environment(),
        }
        for name, (dtype, precision) in FORMATS.items():
            found: dict[str, Any] = {}
            written = {}
            for place in (ranks, alone) if ranks.world > 1 else (alone,):
                if place is alone and ranks.rank:
                    continue
                model = load_model(
                    arguments.folder, device=place, dtype=dtype, precision=parse_precision(precision)
                )
                got = [
                    all_logits(model, model.cache(1, len(prompt) + len(new)), [[*prompt, *new][:-1]])[0]
                    for prompt, new in zip(prompts, expected, strict=True)
                ]
                written[place.world] = generate(model, prompts, max_new_tokens=NEW_TOKENS, stop=())
                found[f"{place.world} ranks" if place.world > 1 else "1 rank"] = {
                    **compared(got, logits),
                    "tokens_until_they_differ": [
                        until_other(*pair) for pair in zip(written[place.world], expected, strict=True)
                    ],
                }
            if len(written) > 1:
                found["tokens_until_ranks_differ"] = [
                    until_other(*pair) for pair in zip(*written.values(), strict=True)
                ]
            record["formats"][name] = found
        if ranks.rank == 0:
            report(record)
            append_result(RESULTS, record)
        ranks.wait()


def compared(got: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, float]:
    """Logits of all texts against those of transformers."""
    ours, theirs = torch.cat(got), torch.cat(expected)
    divergence = kl_divergence(theirs, ours)
    return {
        "largest_difference": (ours - theirs).abs().max().item(),
        "mean_kl": divergence.mean().item(),
        "largest_kl": divergence.max().item(),
        "same_likeliest": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }


def report(record: dict[str, Any]) -> None:
    """Print a line of every format and number of ranks."""
    print(f"bf16 of transformers: {_line(record['transformers_bf16'])}")
    for name, found in record["formats"].items():
        for ranks, figures in found.items():
            if ranks == "tokens_until_ranks_differ":
                print(f"{name}: tokens that ranks write the same, of {NEW_TOKENS} each: {figures}")
                continue
            same = figures["tokens_until_they_differ"]
            print(
                f"{name} on {ranks}: {_line(figures)}; tokens as transformers, of {NEW_TOKENS} each: {same}"
            )


def _line(figures: dict[str, Any]) -> str:
    return (
        f"KL mean {figures['mean_kl']:.2g}, largest {figures['largest_kl']:.2g}, same likeliest token "
        f"{figures['same_likeliest']:.2%}, largest difference of logits {figures['largest_difference']:.2g}"
    )


if __name__ == "__main__":
    main()
