"""Train a small DeepSeek-V3 from nothing but text, to try quantization on a real mixture of experts.

    pip install 'blockscale[eval]'
    python examples/pretrain_deepseek.py OUT --text books.txt.xz --val other.txt [--steps 6000] [--batch 64]

The default is the architecture of DeepSeek-V3 in small (24.7M parameters: latent attention, 16 routed experts
of which 4 are taken, one shared expert, YaRN) with a tokenizer of 8192 tokens that is trained on the same
text. Compute is BF16 on a GPU, with float32 weights.

Experts are balanced without a loss of its own: after every step the bias by which the router of a layer
prefers an expert, but does not weigh it, moves by `RATE` towards even use,

    bias_e += RATE * sign(mean load - load_e)

(Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from blockscale.evaluate.text import read_text

RATE = 1e-3
VOCABULARY = 8192
SAMPLE = 20_000_000  # characters that the tokenizer is trained on
SPECIAL = ("<s>", "</s>", "<pad>")
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 192,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "num_nextn_predict_layers": 0,
}


def train_tokenizer(text: str, size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE of so many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text[:SAMPLE].splitlines(keepends=True), trainer)
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """All tokens, int32."""
    lines = tokenizer.backend_tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False)
    return torch.tensor([token for line in lines for token in line.ids], dtype=torch.int32)


@contextmanager
def counted_loads(model: nn.Module) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Router -> tokens that each of its experts was given since it was last set to zero."""
    loads: dict[nn.Module, torch.Tensor] = {}

    def count(router: nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
        loads[router] += torch.bincount(output[2].flatten(), minlength=len(loads[router]))

    hooks = []
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            loads[module] = torch.zeros_like(module.e_score_correction_bias, dtype=torch.int64)
            hooks.append(module.register_forward_hook(count))
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def balance(loads: dict[nn.Module, torch.Tensor], rate: float = RATE) -> float:
    """Move the biases of all routers; the largest load over the mean, and counts start again."""
    worst = 1.0
    for router, load in loads.items():
        mean = load.double().mean()
        router.e_score_correction_bias += rate * torch.sign(mean - load).float()
        worst = max(worst, float(load.max() / mean.clamp_min(1)))
        load.zero_()
    return worst


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear over the first twentieth, then a cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def windows(tokens: torch.Tensor, batch: int, context: int, generator: torch.Generator) -> torch.Tensor:
    """int64 (batch, context) from anywhere in the text."""
    starts = torch.randint(0, len(tokens) - context, (batch,), generator=generator)
    return torch.stack([tokens[start : start + context] for start in starts.tolist()]).long()


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: torch.Tensor, context: int, most: int = 160) -> float:
    """Of so many windows, spread over the text."""
    rows = tokens[: len(tokens) // context * context].view(-1, context).long()
    rows = rows[:: max(1, len(rows) // most)][:most].to(model.device)
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    return math.exp(sum(losses) / len(losses))


def train(model: nn.Module, tokens: torch.Tensor, options: argparse.Namespace) -> list[float]:
    """The loss of every step."""
    generator, device = torch.Generator().manual_seed(options.seed), model.device
    matrices = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    losses = []
    with counted_loads(model) as loads:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.steps, options.lr)
            ids = windows(tokens, options.batch, options.context, generator).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            worst = balance(loads)
            losses.append(loss.item())
            if step % options.every == 0 or step + 1 == options.steps:
                print(
                    f"step {step + 1}: loss {losses[-1]:.4f}, busiest expert {worst:.2f} x the mean",
                    flush=True,
                )
    return losses


def save(model: nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """BF16, as DeepSeek has it with the biases of routers in float32."""
    biases = {name: each.clone() for name, each in model.named_buffers() if name.endswith("correction_bias")}
    model.to(torch.bfloat16)
    for name, bias in biases.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, bias)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: list[str] | None = None, changes: dict[str, Any] | None = None) -> list[float]:
    """Run from the command line; `changes` to the architecture are for tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="what it reads, UTF-8, .xz too")
    parser.add_argument("--val", type=Path, help="text for a perplexity at the end")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between lines")
    options = parser.parse_args(arguments)
    config = DeepseekV3Config(**{**SMALL, **(changes or {})})
    text = read_text(str(options.text))
    tokenizer = train_tokenizer(text, config.vocab_size)
    tokens = encode(tokenizer, text)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DeepseekV3ForCausalLM(config).float().to(device)
    print(
        f"{sum(each.numel() for each in model.parameters()):,} parameters, {len(tokens):,} tokens", flush=True
    )
    losses = train(model, tokens, options)
    save(model, tokenizer, options.out)
    if options.val is not None:
        found = perplexity(model, encode(tokenizer, read_text(str(options.val))), options.context)
        print(f"perplexity {found:.2f} on {options.val.name}")
    return losses


if __name__ == "__main__":
    main()
