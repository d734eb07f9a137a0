"""A model that is evaluated, as lm-eval asks it: log-likelihoods of continuations, and texts.

Of a context and a continuation c_1 ... c_n, with a float32 softmax over the logits:

    log-likelihood  sum_i log p(c_i | context, c_1 ... c_(i-1))
    greedy          whether every c_i is the likeliest token there

Where both do not fit the model's context, the context loses its beginning, as with lm-eval's own models.
Sequences of a batch are filled up at their ends, which no causal model sees from before.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from blockscale.errors import BlockscaleError
from blockscale.evaluate.subjects import Subject

_MAX_NEW_TOKENS = 256  # of a text, where the task says nothing; lm-eval's own models take as many
_Pair = tuple[Any, list[int], list[int]]  # (anything, tokens of the context, tokens of the continuation)


class SubjectLM(TemplateLM):
    """A `Subject` with its tokenizer.

    Args:
        subject: the model.
        tokenizer: of transformers.
        batch_size: sequences at a time.

    Attributes:
        on_request: is told, after every answer, how many there will be.
    """

    def __init__(self, subject: Subject, tokenizer: Any, batch_size: int = 1) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.on_request: Callable[[int], None] = lambda total: None
        self._subject, self._batch_size = subject, batch_size
        self._stderr = sys.stderr  # for what is told, while lm-eval's own output is dropped

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._special("eos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        return self._special("bos_token_id", "eos_token_id")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids, by default with what the tokenizer puts before a text."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **options)["input_ids"])

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of continuations, and whether they are greedy; see `lm_eval.api.model.LM`."""
        with redirect_stderr(self._stderr):
            return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows of the model's context; see `lm_eval.api.model.LM`."""
        return [self._whole_text(request.args[0], len(requests)) for request in requests]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """What follows contexts, by likeliest tokens; see `lm_eval.api.model.LM`."""
        with redirect_stderr(self._stderr):
            # Prompts that stop alike run together; the longest first, which shows at once if they fit.
            encoded = [self._prompt(*request.args) for request in requests]
            order = sorted(
                range(len(encoded)), key=lambda number: (encoded[number][1:], -len(encoded[number][0]))
            )
            texts = [""] * len(encoded)
            for numbers in _alike(order, lambda number: encoded[number][1:], self._batch_size):
                _, until, most = encoded[numbers[0]]
                found = self._continued([encoded[number][0] for number in numbers], until, most)
                for number, text in zip(numbers, found, strict=True):
                    texts[number] = text
                    self.on_request(len(encoded))
            return texts

    def _special(self, *names: str) -> int:
        found = next(
            (getattr(self.tokenizer, name) for name in names if getattr(self.tokenizer, name) is not None),
            None,
        )
        if found is None:
            raise BlockscaleError(
                "its tokenizer has no token that a text begins or ends with", where=self._subject.name
            )
        return int(found)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Pair], told: bool = True, **unused: Any
    ) -> list[tuple[float, bool]]:
        # Continuations of one token share their input: the letters of MMLU are four for one pass.
        same: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            same.setdefault(self._input(context, continuation), []).append(number)
        results = [(math.nan, False)] * len(requests)
        order = sorted(same, key=len, reverse=True)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for ids, logits in zip(batch, self._logits(batch), strict=True):
                for number in same[ids]:
                    continuation = requests[number][2]
                    rows = logits[len(ids) - len(continuation) : len(ids)]
                    results[number] = self._score(rows, continuation, ids)
                    if told:
                        self.on_request(len(requests))
        return results

    def _input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What the model reads, which ends before the last token of the continuation."""
        whole, most = [*context, *continuation], self._subject.context
        if most is not None:
            whole = whole[-(most + 1) :]
        if not 0 < len(continuation) < len(whole):
            raise BlockscaleError(
                "a continuation does not fit the model's context, or has no tokens",
                where=self._subject.name,
                expected=f"1 to {most} tokens",
                got=len(continuation),
            )
        return tuple(whole[:-1])

    def _logits(self, batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
        longest = max(map(len, batch))
        ids = torch.tensor([[*each, *[each[-1]] * (longest - len(each))] for each in batch])
        return self._subject.logits(ids)

    def _score(
        self, logits: torch.Tensor, continuation: list[int], ids: tuple[int, ...]
    ) -> tuple[float, bool]:
        """Of (n, V) logits before n tokens."""
        targets = torch.tensor(continuation, device=logits.device)
        value = logits.float().log_softmax(-1).gather(-1, targets[:, None]).double().sum().item()
        if not math.isfinite(value):
            where = self._subject.first_nonfinite(torch.tensor([ids])) or "lm_head"
            raise BlockscaleError(
                "NaN or Inf in the logits", where=self._subject.name, got=f"first in {where}"
            )
        return value, bool((logits.argmax(-1) == targets).all())

    def _whole_text(self, text: str, total: int) -> float:
        tokens = self.tok_encode(text)
        windows = get_rolling_token_windows(
            token_list=tokens,
            prefix_token=self.prefix_token_id,
            max_seq_len=self._subject.context or len(tokens),
            context_len=1,
        )
        pairs = [(None, *make_disjoint_window(window)) for window in windows]
        with redirect_stderr(self._stderr):
            values = self._loglikelihood_tokens(pairs, told=False)
            self.on_request(total)
        return math.fsum(value for value, _ in values)

    def _prompt(self, context: str, options: dict[str, Any]) -> tuple[list[int], tuple[str, ...], int]:
        """Tokens of a prompt, what its text ends before, and the most new tokens."""
        if options.get("do_sample") and options.get("temperature") != 0:
            raise BlockscaleError("a task that samples its texts", expected="greedy ones", got=options)
        until = options.get("until") or []
        most = int(options.get("max_gen_toks", _MAX_NEW_TOKENS))
        tokens, room = self.tok_encode(context), self._subject.context
        if room is not None:
            if room <= most:
                expected, got = f"more than {most} tokens, which the task may write", room
                raise BlockscaleError(
                    "its context is too short", where=self._subject.name, expected=expected, got=got
                )
            tokens = tokens[-(room - most) :]
        return tokens, (until,) if isinstance(until, str) else tuple(until), most

    def _continued(self, prompts: Sequence[list[int]], until: tuple[str, ...], most: int) -> list[str]:
        written: list[list[int]] = [[] for _ in prompts]

        def text_of(tokens: list[int]) -> str:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

        def on_token(number: int, token: int) -> bool:
            written[number].append(token)
            text = text_of(written[number])
            return any(stop in text for stop in until)

        self._subject.generate(prompts, most, self.tokenizer.eos_token_id, on_token)
        texts = map(text_of, written)
        return [
            text[: min((text.find(stop) for stop in until if stop in text), default=None)] for text in texts
        ]


def _alike(order: Sequence[int], key: Callable[[int], object], batch_size: int) -> Iterator[list[int]]:
    """Neighbours with the same key, so many at a time."""
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) == batch_size or key(batch[0]) != key(number)):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
