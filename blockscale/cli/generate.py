"""`blockscale generate --ckpt-path DIR`: text from a DeepSeek-V2/V3 checkpoint, quantized or not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli import console, options
from blockscale.errors import BlockscaleError

if TYPE_CHECKING:
    from blockscale.model.generate import Sampling
    from blockscale.model.ranks import Ranks
    from blockscale.model.text import Message, Tokenizer
    from blockscale.model.transformer import Transformer

_BATCH = 32  # prompts of a file that run at once


class CacheChoice(str, Enum):
    """What attention keeps of every token."""

    bf16 = "bf16"
    fp8 = "fp8"


def command(
    ckpt_path: Annotated[str, typer.Option(help="Checkpoint folder or Hub repo id.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Hugging Face or DeepSeek config, instead of the folder's; or precisions alone."),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Chat: /clear forgets, /exit ends.")
    ] = False,
    input_file: Annotated[Path | None, typer.Option(help="A prompt a line, all answered.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.2,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer (repeatable).")] = None,
    compute: options.Compute = options.ComputeChoice.auto,
    kv_cache: Annotated[
        CacheChoice, typer.Option(help="fp8 keeps 1.8 times the context in the same memory.")
    ] = CacheChoice.bf16,
    precision: options.Precision = None,
    mtp: Annotated[
        bool,
        typer.Option(
            "--mtp", help="Draft tokens with the multi-token prediction layer: same text, fewer steps."
        ),
    ] = False,
    debug_gemm: options.DebugGemm = False,
    on_missing_scale: options.OnMissingScale = options.KeepChoice.error,
    device: options.Device = options.DeviceChoice.auto,
    revision: options.Revision = None,
) -> None:
    """Generate text: a chat, or an answer to every line of a file.

    Started by torchrun, the processes share the model, and the first one reads and writes for all.
    """
    if interactive == (input_file is not None):
        raise BlockscaleError("give --interactive or --input-file, one of them", where="blockscale generate")

    from blockscale import ops
    from blockscale.checkpoint.precision import parse_precision
    from blockscale.checkpoint.source import open_source
    from blockscale.model.gemm_names import gemm_names
    from blockscale.model.generate import Sampling
    from blockscale.model.launch import open_ranks
    from blockscale.model.load import load_model
    from blockscale.model.text import Tokenizer

    sampling, asked = Sampling(temperature, top_p, seed), parse_precision(precision or ())
    with open_ranks(device.value) as ranks, console.log(ranks.rank):
        first = ranks.rank == 0
        with ranks.together():
            prompts = _read_prompts(input_file) if input_file is not None and first else []
            tokenizer = Tokenizer(ckpt_path, revision) if first else None
            source = open_source(ckpt_path, revision)
        prompts, tokenizer = ranks.broadcast((prompts, tokenizer))
        assert tokenizer is not None
        begin = time.perf_counter()
        model = load_model(
            source,
            config=config,
            device=ranks,
            compute=options.COMPUTE[compute],
            on_missing_scale=on_missing_scale.value,
            precision=asked,
            mtp=mtp,
        )
        if first:
            taken, many = console.seconds(time.perf_counter() - begin), f", {ranks.world} ranks"
            console.err.print(f"loaded in {taken} on {model.device}{many if ranks.world > 1 else ''}")
        limits = _Limits(max_new_tokens, tuple(stop or ()), kv_cache is CacheChoice.fp8)
        assistant = _Assistant(model, tokenizer, sampling, limits, ranks)
        with ops.audit_gemms(names=gemm_names(model)) if debug_gemm else nullcontext() as audit:
            if interactive:
                _chat(assistant)
            else:
                _answer(assistant, prompts)
        if audit is not None and first:
            console.err.print(audit.summary())


@dataclass(frozen=True)
class _Limits:
    """What ends an answer, and whether its cache is in FP8."""

    max_new_tokens: int
    stop: tuple[str, ...]
    fp8_cache: bool


@dataclass(frozen=True)
class _Assistant:
    """A model that continues conversations, on every rank the same ones; rank 0 speaks."""

    model: Transformer
    tokenizer: Tokenizer
    sampling: Sampling
    limits: _Limits
    ranks: Ranks

    def say(self, text: str) -> None:
        """Write to standard output as it is, at once."""
        if self.ranks.rank == 0:
            print(text, end="", flush=True)

    def answer(
        self, conversations: list[list[Message]], show: Callable[[str], None] = lambda text: None
    ) -> list[str]:
        """The next message of each; `show` gets text as it grows; the speed goes to standard error."""
        from blockscale.model.generate import generate
        from blockscale.model.text import Growing

        growing = [Growing(self.tokenizer, self.limits.stop) for _ in conversations]
        texts, start = [""] * len(conversations), time.perf_counter()
        drafts: list[bool] = []

        def add(number: int, text: str) -> None:
            texts[number] += text
            show(text)

        def on_token(number: int, token: int) -> bool:
            add(number, growing[number].push(token))
            return growing[number].stopped

        ids = [self.tokenizer.chat(messages) for messages in conversations]
        end = self.tokenizer.end  # DeepSeek's own config files name none
        tokens = generate(
            self.model,
            ids,
            max_new_tokens=self.limits.max_new_tokens,
            sampling=self.sampling,
            stop=self.model.config.eos_token_id or (() if end is None else (end,)),
            on_token=on_token,
            on_draft=lambda number, right: drafts.append(right),
            fp8_cache=self.limits.fp8_cache,
        )
        for number, each in enumerate(growing):
            add(number, each.rest())
        show("\n")
        read, written = (sum(map(len, each)) for each in (ids, tokens))
        rate = written / (time.perf_counter() - start)
        right = f", {sum(drafts) / len(drafts):.0%} of {len(drafts)} drafts accepted" if drafts else ""
        if self.ranks.rank == 0:
            console.err.print(f"{read} tokens read, {written} written, {rate:.1f} tokens/s{right}")
        return texts


def _answer(assistant: _Assistant, prompts: list[str]) -> None:
    for first in range(0, len(prompts), _BATCH):
        some = prompts[first : first + _BATCH]
        texts = assistant.answer([[{"role": "user", "content": prompt}] for prompt in some])
        for prompt, text in zip(some, texts, strict=True):
            assistant.say(f"Prompt: {prompt}\nCompletion: {text}\n\n")


def _chat(assistant: _Assistant) -> None:
    messages: list[Message] = []
    while (line := assistant.ranks.broadcast(_line() if assistant.ranks.rank == 0 else "")) is not None:
        if line == "/exit":
            return
        if line == "/clear":
            messages.clear()
        elif line:
            messages.append({"role": "user", "content": line})
            (text,) = assistant.answer([messages], assistant.say)
            messages.append({"role": "assistant", "content": text})


def _line() -> str | None:
    """What the user writes next; None at the end of input."""
    try:
        return input(">>> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BlockscaleError("cannot be read", where=path, got=error) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BlockscaleError("no prompt", where=path, expected="one a line")
    return prompts
