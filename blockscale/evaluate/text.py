"""Text to evaluate on: a file, compressed or not, or wikitext-2 as models are usually measured on it."""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from blockscale.errors import BlockscaleError
from blockscale.model.text import Tokenizer

WIKITEXT = "wikitext2"
# Of files that are packed, by their suffix.
OPENERS: dict[str, Callable[..., IO[Any]]] = {".xz": lzma.open, ".bz2": bz2.open}


def read_text(data: str) -> str:
    """The text of a file (UTF-8; .xz and .bz2 are unpacked), or of `wikitext2`.

    `wikitext2` is the test split of wikitext-2-raw-v1 on the Hub, its lines joined by blank ones.

    Raises:
        BlockscaleError: no such file, one that is not text, or the package `datasets` is missing.
    """
    if data == WIKITEXT and not Path(data).exists():
        return _wikitext()
    path = Path(data)
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError) as error:
        remedy = f"name a UTF-8 text file, or {WIKITEXT}"
        raise BlockscaleError(f"cannot be read as text: {error}", where=path, remedy=remedy) from error


def token_ids(text: str, tokenizer: Tokenizer, other: Tokenizer | None, limit: int | None) -> torch.Tensor:
    """The first tokens of a text, int64 (T,).

    Args:
        text: what is read.
        tokenizer: of the model.
        other: of the reference; has to give the same tokens.
        limit: most tokens; None for all.

    Raises:
        BlockscaleError: tokenizers that do not agree, or fewer than two tokens.
    """
    # Tokens are several characters, and a text may be many times what is asked for.
    some = text if limit is None else text[: 16 * limit + 1024]
    tokens = tokenizer.encode(some)[:limit]
    if other is not None and not tokenizer.is_known_as(other) and other.encode(some)[:limit] != tokens:
        raise BlockscaleError(
            "tokenizers differ",
            expected="the model and its reference read a text as the same tokens",
            got="other tokens",
            remedy="compare with the checkpoint that the model was made from",
        )
    if len(tokens) < 2:
        raise BlockscaleError("not enough text", expected="at least 2 tokens", got=len(tokens))
    return torch.tensor(tokens, dtype=torch.int64)


def read_sequences(data: str, tokenizer: Tokenizer, tokens: int, context: int) -> torch.Tensor:
    """The first tokens of a text in whole sequences, int64 (B, T).

    Args:
        data: see `read_text`.
        tokenizer: of the model.
        tokens: most tokens.
        context: tokens of a sequence, or `tokens` if these are fewer.

    Raises:
        BlockscaleError: no such text, or one that does not fill a sequence.
    """
    ids = token_ids(read_text(data), tokenizer, None, tokens)
    length = min(context, tokens)
    if len(ids) < length:
        raise BlockscaleError(
            "not enough text",
            where=data,
            expected=f"a sequence of {length} tokens",
            got=f"{len(ids)} tokens",
            remedy="give more text, or set --context",
        )
    return ids[: len(ids) // length * length].view(-1, length)


def _wikitext() -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        remedy = "pip install 'blockscale[eval]', or name a text file"
        raise BlockscaleError(f"{WIKITEXT} needs the package datasets", remedy=remedy) from error
    split = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    return "\n\n".join(split["text"])
