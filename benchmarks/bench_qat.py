"""What a step of quantization-aware training costs beside one in BF16: forward, backward, fused AdamW.

    python benchmarks/bench_qat.py [--small] [--models NAME ...] [--rounds N] [--out FILE]

Models of transformers with random weights, random tokens. On a GPU all is timed twice: "launched" kernel by
kernel, as most training is, and with forward and backward pass "replayed" as a CUDA graph where they can be
captured, as `blockscale train` does. Competitors take turns, one step each a round, in an order drawn anew;
medians in milliseconds, and ratios to the first of

    autocast         float32 weights under torch.autocast(bfloat16), as most models are trained
    bf16             BF16 weights, gradients and moments: less memory than any master weights allow
    fp8              QAT, FP8 blocks with dynamic scales, BF16 products
    w4a8             QAT, experts int4:g128, all others FP8, where there are experts
    int4             QAT, all linear layers int4:g128, dynamic scales
    int4 learned     the same, with learned scales
    fp8 products     QAT, FP8 blocks, compute="fp8", on GPUs with FP8 arithmetic

QAT has float32 masters and runs under the same autocast. First every kind of QAT step is compared with one in
float32 on the CPU, on two layers of the same model: loss and norm of the difference of all gradients.
`--small` runs everything on tiny models, on a CPU in seconds. Results: benchmarks/results/qat.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from blockscale.checkpoint.recipe import Recipe, read_recipe
from blockscale.ops.gemm_dispatch import has_fp8
from blockscale.qat import QatOptions, prepare
from blockscale.qat.gradients import Gradients, one_sequence_a_row
from blockscale.testing.bench import append_result, environment, load_module, release, time_interleaved, wait

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "qat.jsonl"
_WARM_STEPS = 2  # kernels are compiled, memory and moments are there
_INT4 = Recipe(layout="blockscale", precision={"default": "int4:g128"})
# Of the loss, and of the norm of all gradients. What BF16 differs from float32 makes some FP8 codes of inputs
# others, 6 % away: that is 5 % of the gradients of two layers on a CPU, and 11 % where experts are chosen
# otherwise. FP8 products add 1 %.
LOSS_BOUND = 2e-3
GRADIENT_BOUNDS = {"llama": 0.1, "deepseek_v3": 0.2}


@dataclass(frozen=True)
class Shape:
    """A model and what it is trained on.

    Attributes:
        kind: "llama" or "deepseek_v3".
        config: of transformers.
        batch, context: tokens of a step.
    """

    kind: str
    config: dict[str, Any]
    batch: int
    context: int

    def make(self, device: torch.device) -> Any:
        """With random weights, float32, training."""
        torch.manual_seed(0)
        kinds = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
        }
        config, model = kinds[self.kind]
        with torch.device(device):
            return model(config(**self.config)).float().train()


@dataclass(frozen=True)
class Competitor:
    """How a model trains.

    Attributes:
        recipe: None trains without quantization.
        options: of QAT; None for BF16 weights instead of float32 ones under autocast.
    """

    recipe: Recipe | None
    options: QatOptions | None


def _llama(
    hidden: int, layers: int, heads: tuple[int, int], intermediate: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }


def shapes(small: bool) -> dict[str, Shape]:
    """Name -> model: SmolLM2-135M, one where matrix products are most of a step, and a small DeepSeek-V3."""
    deepseek = load_module(HERE.parent / "examples" / "pretrain_deepseek.py").SMALL
    if small:
        tiny = {"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
        return {
            "llama": Shape("llama", _llama(64, 2, (2, 1), 128, 64), 2, 16),
            "deepseek": Shape("deepseek_v3", {**deepseek, **tiny, "moe_intermediate_size": 32}, 2, 16),
        }
    return {
        "SmolLM2-135M": Shape("llama", _llama(576, 30, (9, 3), 1536, 49152), 8, 1024),
        "2048 wide": Shape("llama", _llama(2048, 8, (16, 16), 8192, 32000), 8, 1024),
        "small DeepSeek-V3": Shape("deepseek_v3", deepseek, 64, 512),
    }


def competitors(kind: str, device: torch.device) -> dict[str, Competitor]:
    """Name -> how it trains; the first is what ratios are to."""
    narrow = QatOptions(compute=torch.bfloat16)
    made = {
        "autocast": Competitor(None, narrow),
        "bf16": Competitor(None, None),
        "fp8": Competitor(Recipe(), narrow),
        "w4a8": Competitor(read_recipe("w4a8"), narrow),
        "int4": Competitor(_INT4, narrow),
        "int4 learned": Competitor(_INT4, replace(narrow, scales="learned")),
        "fp8 products": Competitor(Recipe(), QatOptions(compute="fp8")),
    }
    absent = {"w4a8"} if kind == "llama" else set()
    return {name: each for name, each in made.items() if name not in absent | _unfit(device)}


def _unfit(device: torch.device) -> set[str]:
    return set() if has_fp8(device) else {"fp8 products"}


def prepared(base: Any, competitor: Competitor) -> Any:
    """A copy of a model that trains so."""
    model = copy.deepcopy(base)
    if competitor.options is None:
        return model.bfloat16()
    return model if competitor.recipe is None else prepare(model, competitor.recipe, competitor.options)


def loss_of(model: Any, tokens: torch.Tensor, autocast: bool) -> torch.Tensor:
    """Of predicting tokens."""
    context: AbstractContextManager[Any] = nullcontext()
    if autocast:
        context = torch.autocast(tokens.device.type, torch.bfloat16)
    with context:
        return model(input_ids=tokens, labels=tokens).loss


def step_of(
    base: Any, competitor: Competitor, tokens: torch.Tensor, captures: bool, beside: Gradients | None
) -> tuple[Callable[[], None], Gradients]:
    """A whole step of training, until the device is done, and its gradients, which may share memory."""
    model, autocast = prepared(base, competitor), competitor.options is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def backward(ids: torch.Tensor) -> torch.Tensor:
        with one_sequence_a_row():
            loss = loss_of(model, ids, autocast)
        loss.backward()
        return loss.detach()

    gradients = Gradients(backward, model.parameters(), captures, beside)

    def step() -> None:
        gradients(tokens)
        optimizer.step()
        gradients.clear()
        wait(tokens.device)

    return step, gradients


def check(shape: Shape, name: str, competitor: Competitor, device: torch.device) -> dict[str, float]:
    """Errors of loss and gradients of two layers against float32 on the CPU; fails if one is large."""
    assert competitor.recipe is not None
    assert competitor.options is not None
    small = {"num_hidden_layers": 2, "vocab_size": min(2048, shape.config["vocab_size"])}
    base = replace(shape, config={**shape.config, **small}).make(torch.device("cpu"))
    exact = prepare(
        copy.deepcopy(base), competitor.recipe, replace(competitor.options, compute=torch.float32)
    )
    model = prepared(base.to(device), competitor)
    tokens = torch.randint(small["vocab_size"], (2, 128), generator=torch.Generator().manual_seed(1))
    wanted, found = loss_of(exact, tokens, False), loss_of(model, tokens.to(device), True)
    for loss in (wanted, found):
        loss.backward()
    pairs = [
        (mine.grad.cpu().double(), theirs.grad.double())
        for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True)
        if theirs.grad is not None
    ]
    error = math.sqrt(sum(float((mine - theirs).square().sum()) for mine, theirs in pairs))
    errors = {
        "loss": abs(found.item() / wanted.item() - 1),
        "gradients": error / math.sqrt(sum(float(theirs.square().sum()) for _, theirs in pairs)),
    }
    if not (errors["loss"] < LOSS_BOUND and errors["gradients"] < GRADIENT_BOUNDS[shape.kind]):
        raise SystemExit(f"{name} is not the step in float32: {errors}")
    return errors


def timed(
    ways: dict[str, Competitor], base: Any, tokens: torch.Tensor, captures: bool, rounds: int
) -> dict[str, Any]:
    """Median milliseconds of every competitor, their ratio to the first, and which were captured."""
    steps: dict[str, Callable[[], None]] = {}
    captured: dict[str, Gradients] = {}
    for name, each in ways.items():
        before = next(iter(captured.values()), None)
        steps[name], gradients = step_of(base, each, tokens, captures, before)
        for _ in range(_WARM_STEPS):
            steps[name]()
        if gradients.is_captured:
            captured[name] = gradients
    timings, first = time_interleaved(steps, rounds), next(iter(ways))
    return {
        "captured": list(captured),
        "milliseconds": {name: 1e3 * timings.of(name).median for name in ways},
        "ratio": {name: timings.speedup(first, name).median for name in ways},
    }


def measure(title: str, shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """Check, then time, every competitor on a model; what is recorded."""
    ways = competitors(shape.kind, device)
    errors = {
        name: check(shape, name, each, device) for name, each in ways.items() if each.recipe is not None
    }
    base = shape.make(device)
    vocabulary, size = shape.config["vocab_size"], (shape.batch, shape.context)
    tokens = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0)).to(device)
    record: dict[str, Any] = {"model": title, "tokens": list(size), "rounds": rounds, "errors": errors}
    for kind, captures in {"launched": False, "replayed": True}.items():
        if captures and device.type != "cuda":
            continue
        record[kind] = timed(ways, base, tokens, captures, rounds)
        print(f"{title}, {shape.batch} x {shape.context} tokens, {kind}")
        for name in ways:
            times = f"{record[kind]['milliseconds'][name]:9.2f} ms {record[kind]['ratio'][name]:6.2f} x"
            told = f", gradients {errors[name]['gradients']:.1%} off" if name in errors else ""
            told += ", launched" if captures and name not in record[kind]["captured"] else ""
            print(f"  {name:13} {times}{told}", flush=True)
        release(device)
    return record


def main(arguments: list[str] | None = None) -> None:
    """Run everything and append a line for every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny models, on a CPU in seconds")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for title, shape in shapes(options.small).items():
        if options.models and title not in options.models:
            continue
        record = measure(title, shape, options.rounds, device)
        append_result(options.out, {"benchmark": "qat", **record, **environment()})
        release(device)


if __name__ == "__main__":
    main()
