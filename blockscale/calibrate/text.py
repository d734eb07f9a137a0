"""What a model reads to be calibrated: windows of a text, or text that it writes itself.

Other text than the model will see misleads: the correlations between inputs that the rounding relies on are
those of the text. What the model writes, sampled from its own distribution, is close to what it was trained
on, and needs no data (self-calibration, arXiv:2410.17170).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from blockscale.checkpoint.writer import io_errors
from blockscale.errors import BlockscaleError

SELF = "self"
_ROWS = 64  # sequences that are written at a time


@dataclass(frozen=True)
class Calibration:
    """The calibration tokens.

    Attributes:
        texts: each gives an equal share of the tokens; SELF is what the model writes.
        encode: text -> token ids.
        tokens: in all; rounded down to a multiple of `length`.
        length: of a sequence.
        seed: of what the model writes.
    """

    texts: tuple[str, ...]
    encode: Callable[[str], list[int]]
    tokens: int = 131072
    length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", self.tokens // self.length * self.length)

    def settings(self) -> dict[str, Any]:
        """What identifies the tokens."""
        texts = [SELF if text == SELF else hashlib.sha256(text.encode()).hexdigest() for text in self.texts]
        return {"texts": texts, "tokens": self.tokens, "length": self.length, "seed": self.seed}

    def token_ids(self, load: Callable[[], nn.Module], file: Path, device: str) -> torch.Tensor:
        """int64 (tokens / length, length).

        Args:
            load: the whole model, which writes its share; not called where it has none.
            file: where the tokens are kept for the next time: a model does not write the same everywhere.
            device: where it writes.

        Raises:
            BlockscaleError: a text has fewer tokens than its share.
        """
        if file.exists():
            return load_file(file)["tokens"]
        rows = [len(part) for part in torch.arange(self.tokens // self.length).tensor_split(len(self.texts))]
        parts = [
            write_tokens(load(), count, self.length, self.seed, device)
            if text == SELF
            else cut_tokens(text, self.encode, count, self.length)
            for text, count in zip(self.texts, rows, strict=True)
        ]
        ids = torch.cat(parts)
        save_whole({"tokens": ids}, file)
        return ids


def save_whole(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file under its final name when it is complete and on the disk, or not at all.

    Raises:
        BlockscaleError: it cannot be written.
    """
    unfinished = file.with_name(f".{file.name}.part")
    with io_errors(file):
        with unfinished.open("wb") as stream:
            stream.write(save(tensors))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, file)


def cut_tokens(text: str, encode: Callable[[str], list[int]], rows: int, length: int) -> torch.Tensor:
    """int64 (rows, length): pieces of the text that begin evenly spread over it.

    Raises:
        BlockscaleError: the text is too short.
    """
    room = 12 * length  # characters that surely hold so many tokens, if the text is of words
    pieces = []
    for row in range(rows):
        start = row * max(len(text) - room, 0) // max(rows - 1, 1) if len(text) > rows * room else -1
        if start < 0:
            break
        pieces.append(encode(text[start : start + room])[:length])
    if len(pieces) < rows or any(len(piece) < length for piece in pieces):
        whole = encode(text)
        if len(whole) < rows * length:
            raise BlockscaleError(
                "too few calibration tokens",
                expected=f"{rows * length} in the text",
                got=len(whole),
                remedy="name a longer text, or ask for less with --calibration-tokens",
            )
        starts = torch.linspace(0, len(whole) - length, rows).long().tolist()
        pieces = [whole[start : start + length] for start in starts]
    return torch.tensor(pieces, dtype=torch.int64)


@torch.inference_mode()
def write_tokens(model: nn.Module, rows: int, length: int, seed: int, device: str) -> torch.Tensor:
    """int64 (rows, length) that a transformers causal LM writes, sampled from what it predicts.

    Tokens that end a text are not sampled: every row is one text.

    Raises:
        BlockscaleError: NaN or Inf in what it predicts.
    """
    from transformers import DynamicCache

    config: Any = model.config
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    start = config.bos_token_id if config.bos_token_id is not None else (ends or [0])[0]
    generator = torch.Generator().manual_seed(seed)
    model.to(device)
    parts = []
    for count in (min(_ROWS, rows - done) for done in range(0, rows, _ROWS)):
        token, cache = torch.full((count, 1), start), DynamicCache(config=config)
        written = []
        for _ in range(length):
            output = model(input_ids=token.to(device), past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1].float().cpu()
            if not bool(logits.isfinite().all()):
                raise BlockscaleError("the model predicts NaN or Inf", remedy="evaluate names the layer")
            logits[:, ends] = -torch.inf
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            written.append(token)
        parts.append(torch.cat(written, 1))
    return torch.cat(parts)
