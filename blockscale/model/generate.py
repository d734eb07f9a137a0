"""Text from a model: prompts of different lengths at once, a step for all sequences that go on.

A step has one new token of each, or up to two with a multi-token prediction layer. On a GPU the host is a
step behind: it looks at the tokens of a step while the device computes the next one from them, which is
thrown away where a sequence has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from blockscale.errors import BlockscaleError
from blockscale.model.attention import KVCache
from blockscale.model.decode import Choose, decoder
from blockscale.model.prefill import prefill
from blockscale.model.speculative import Drafting
from blockscale.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: draw from the fewest tokens that together have this probability.
        seed: of the draws; the same seed, prompts and machine give the same text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise BlockscaleError("bad temperature", expected="0 or more", got=self.temperature)
        if not 0 < self.top_p <= 1:
            raise BlockscaleError("bad top_p", expected="above 0, up to 1", got=self.top_p)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    on_draft: Callable[[int, bool], None] | None = None,
    fp8_cache: bool = False,
) -> list[list[int]]:
    """Continue every prompt; by drafts, if the model has a multi-token prediction layer.

    Args:
        model: what continues them.
        prompts: token ids; lengths may differ.
        max_new_tokens: of each sequence.
        sampling: default the likeliest token.
        stop: tokens that end a sequence, and are not part of the result; default those of the config.
        on_token: is told (number of the prompt, token) as soon as a token is known; True ends that sequence.
        on_draft: is told (number of the prompt, whether it was right) of every draft.
        fp8_cache: keep what is cached of a token in E4M3 with a scale: a little more than half the memory.

    Returns:
        New tokens of each prompt.

    Raises:
        BlockscaleError: an empty prompt, or one that does not fit the context with what is to be generated.
    """
    longest = _check(model, prompts, max_new_tokens)
    stops = frozenset(model.config.eos_token_id if stop is None else stop)
    written = _Written([[] for _ in prompts], max_new_tokens, stops, on_token)
    if not prompts or max_new_tokens < 1:
        return written.tokens
    cache = model.cache(len(prompts), longest, fp8=fp8_cache)
    steps = _steps(model, cache, sampling or Sampling())
    state, running = steps.start(prompts), list(range(len(prompts)))
    while True:
        of, host = running, _OnHost(state)
        lengths = [len(prompts[number]) + len(written.tokens[number]) for number in of]
        ahead = host.is_late and any(len(written.tokens[number]) + 1 < max_new_tokens for number in of)
        following = steps.advance(of, state, lengths) if ahead else None
        going_on = []
        for place, (number, line) in enumerate(zip(of, host.values(), strict=True)):
            tokens, right = steps.read(line)
            if right is not None and on_draft is not None:
                on_draft(number, right)
            if written.goes_on(number, tokens):
                going_on.append(place)
        if not going_on:
            return written.tokens
        running = [of[place] for place in going_on]
        if following is None:
            state = steps.advance(running, state[going_on], [lengths[place] for place in going_on])
        else:
            state = following if len(going_on) == len(of) else following[going_on]


@dataclass(frozen=True)
class _Written:
    """New tokens of every prompt, and what ends them."""

    tokens: list[list[int]]
    limit: int
    stops: frozenset[int]
    listener: Callable[[int, int], bool | None] | None

    def goes_on(self, number: int, new: list[int]) -> bool:
        """Add tokens of a prompt; whether it goes on after them."""
        for token in new:
            if token in self.stops:
                return False
            self.tokens[number].append(token)
            ended = self.listener is not None and self.listener(number, token)
            if ended or len(self.tokens[number]) == self.limit:
                return False
        return True


def _steps(model: Transformer, cache: KVCache, sampling: Sampling) -> _OneToken | Drafting:
    choose = _chooser(sampling, model.device)
    if model.mtp is None:
        return _OneToken(model, cache, choose)
    return Drafting(model, model.mtp, cache, choose, draws=sampling.temperature > 0)


class _OneToken:
    """Sequences of one model and their cache; their state is the last token, int64 (B, 1). As `Drafting`."""

    def __init__(self, model: Transformer, cache: KVCache, choose: Choose) -> None:
        self._model, self._cache, self._choose = model, cache, choose
        self._decode = decoder(model, cache)

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        return self._choose(prefill(self._model, self._cache, prompts))[:, None]

    def advance(self, rows: Sequence[int], state: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        return self._choose(self._decode(rows, state[:, 0], [length + 1 for length in lengths]))[:, None]

    @staticmethod
    def read(line: list[int]) -> tuple[list[int], bool | None]:
        return line, None


class _OnHost:
    """A state on its way to the host, which waits for it and for nothing that was started later."""

    def __init__(self, state: torch.Tensor) -> None:
        self.is_late = state.is_cuda
        self._state = state
        if self.is_late:
            self._state = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
            self._state.copy_(state, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[list[int]]:
        if self.is_late:
            self._arrived.synchronize()
        return self._state.tolist()


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Tokens of the longest sequence there can be."""
    config = model.config
    for number, prompt in enumerate(prompts):
        where = f"prompt {number}"
        if not prompt:
            raise BlockscaleError("empty prompt", where=where, expected="at least one token")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise BlockscaleError(
                "prompt and new tokens do not fit the context",
                where=where,
                expected=f"up to {config.max_position_embeddings} tokens",
                got=f"{len(prompt)} + {max_new_tokens}",
            )
        wrong = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            expected = f"token ids below {config.vocab_size}"
            raise BlockscaleError("no such token", where=where, expected=expected, got=wrong)
    return max(map(len, prompts), default=0) + max_new_tokens


def _chooser(sampling: Sampling, device: torch.device) -> Choose:
    """Logits (B, vocab_size) to tokens (B,).

    Every rank chooses for itself, and they choose the same: of the logits, which `Ranks.all_gather` makes the
    same bits everywhere, with the same seed.
    """
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(-1)
    generator = torch.Generator(device).manual_seed(sampling.seed)

    def draw(logits: torch.Tensor) -> torch.Tensor:
        probabilities, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
        # A token counts as long as those before it have not reached top_p.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
        choice = torch.multinomial(probabilities, 1, generator=generator)
        return order.gather(-1, choice)[:, 0]

    return draw
