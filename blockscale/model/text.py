"""Between text and token ids: a checkpoint's tokenizer, its chat template, text that grows by tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from blockscale.errors import BlockscaleError

Message = dict[str, str]  # "role" and "content"


def load_tokenizer(folder: str | os.PathLike[str], revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint, as transformers has it.

    Raises:
        BlockscaleError: transformers is not installed, or the folder has no tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        remedy = "pip install 'blockscale[generate]'"
        raise BlockscaleError("tokenizers need the package transformers", remedy=remedy) from error
    try:
        return AutoTokenizer.from_pretrained(folder, revision=revision)
    except (OSError, ValueError) as error:
        expected = "tokenizer.json and tokenizer_config.json"
        raise BlockscaleError("no tokenizer", where=folder, expected=expected, got=error) from error


class Tokenizer:
    """The tokenizer of a checkpoint folder."""

    def __init__(self, folder: str | os.PathLike[str], revision: str | None = None) -> None:
        """Read it.

        Raises:
            BlockscaleError: transformers is not installed, or the folder has no tokenizer.
        """
        self._tokenizer = load_tokenizer(folder, revision)

    @property
    def end(self) -> int | None:
        """The token that ends a text, if there is one."""
        token: int | None = self._tokenizer.eos_token_id
        return token

    def is_known_as(self, other: Tokenizer) -> bool:
        """Whether the two are the same by what they are made of; if not, their tokens may still agree."""
        mine, theirs = (getattr(each._tokenizer, "backend_tokenizer", None) for each in (self, other))
        return mine is not None and theirs is not None and bool(mine.to_str() == theirs.to_str())

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with what the tokenizer puts before it."""
        # Quiet: that a text is longer than the context is the caller's to judge.
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of pieces of a text, without what the tokenizer puts before a whole one."""
        ids = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [list(each) for each in ids]

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the assistant is to continue; of plain text without a template."""
        if not self._tokenizer.chat_template:
            return self.encode("\n".join(message["content"] for message in messages))
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without the special ones."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class Growing:
    """Text of a sequence whose tokens come one by one.

    A character may take several tokens; it is held back until it is whole. So is what could be the start of a
    stop string, until it is known not to be.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._shown = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; the text that is certain from here on and was not given before."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        ends = [at for word in self._stop if (at := text.find(word)) >= 0]
        if ends:
            self.stopped = True
            return self._give(text[: min(ends)])
        # What is incomplete is shown as U+FFFD by every tokenizer of bytes.
        certain = len(text.rstrip("\ufffd"))
        for word in self._stop:
            for length in range(min(len(word) - 1, certain), 0, -1):
                if text.endswith(word[:length], 0, certain):
                    certain = min(certain, certain - length)
                    break
        return self._give(text[:certain])

    def rest(self) -> str:
        """What was held back, once no token follows."""
        return "" if self.stopped else self._give(self._tokenizer.decode(self._tokens))

    def _give(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new
