"""Text from a model: prompts of different lengths at once, one token a step for all.

Prompts are read in pieces of bounded size, several in one call where they fit; after that every call has one
token of each sequence that goes on. On a GPU the host is a step behind: it looks at the tokens of a step
while the device computes the next one from them, which is thrown away where a sequence has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from blockscale.errors import BlockscaleError
from blockscale.model.attention import Batch, KVCache
from blockscale.model.decode import decoder
from blockscale.model.transformer import Transformer

_PREFILL_TOKENS = 8192  # of one call: bounds the memory of activations


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
) -> list[list[int]]:
    """Continue every prompt.

    Args:
        model: what continues them.
        prompts: token ids; lengths may differ.
        max_new_tokens: of each sequence.
        sampling: default the likeliest token.
        stop: tokens that end a sequence, and are not part of the result; default those of the config.
        on_token: is told (number of the prompt, token) as soon as a token is known; True ends that sequence.

    Returns:
        New tokens of each prompt.

    Raises:
        BlockscaleError: an empty prompt, or one that does not fit the context with what is to be generated.
    """
    longest = _check(model, prompts, max_new_tokens)
    stops = frozenset(model.config.eos_token_id if stop is None else stop)
    choose = _chooser(sampling or Sampling(), model.device)
    cache = model.cache(len(prompts), longest)
    decode = decoder(model, cache)
    results: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    upcoming = choose(prefill(model, cache, prompts)) if running and max_new_tokens else None
    for step in range(max_new_tokens):
        if upcoming is None or not running:
            break
        tokens, of, host = upcoming, running, _OnHost(upcoming)
        lengths = [len(prompts[number]) + step + 1 for number in of]
        ahead = host.is_late and step + 1 < max_new_tokens
        upcoming = choose(decode(of, tokens, lengths)) if ahead else None
        going_on = []
        for place, (number, token) in enumerate(zip(of, host.values(), strict=True)):
            if token in stops:
                continue
            results[number].append(token)
            if on_token is None or not on_token(number, token):
                going_on.append(place)
        running = [of[place] for place in going_on]
        if step + 1 == max_new_tokens or not running:
            break
        if upcoming is None:
            upcoming = choose(decode(running, tokens[going_on], [lengths[place] for place in going_on]))
        elif len(going_on) < len(of):
            upcoming = upcoming[going_on]
    return results


class _OnHost:
    """Tokens on their way to the host, which waits for them and for nothing that was started later."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.is_late = tokens.is_cuda
        self._tokens = tokens
        if self.is_late:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[int]:
        if self.is_late:
            self._arrived.synchronize()
        return self._tokens.tolist()


def prefill(model: Transformer, cache: KVCache, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Put prompts into rows 0, 1, ... of an empty cache; float32 logits (B, vocab_size) after each."""
    last: dict[int, torch.Tensor] = {}
    piece: list[tuple[int, int, int]] = []
    room = _PREFILL_TOKENS

    def run() -> None:
        tokens = [token for row, before, new in piece for token in prompts[row][before : before + new]]
        hidden = model(_batch(tokens, piece, model.device), cache)
        end = 0
        for row, before, new in piece:
            end += new
            if before + new == len(prompts[row]):
                last[row] = hidden[end - 1]

    for row, prompt in enumerate(prompts):
        before = 0
        while before < len(prompt):
            new = min(len(prompt) - before, room)
            piece.append((row, before, new))
            before, room = before + new, room - new
            if room == 0:
                run()
                piece, room = [], _PREFILL_TOKENS
    if piece:
        run()
    return model.logits(torch.stack([last[row] for row in range(len(prompts))]))


def _batch(tokens: list[int], spans: list[tuple[int, int, int]], device: torch.device) -> Batch:
    positions = [before + i for _, before, new in spans for i in range(new)]
    rows = [row for row, _, new in spans for _ in range(new)]
    ids, places, into = torch.tensor([tokens, positions, rows], device=device)
    return Batch(ids, places, into, tuple(spans), max(positions) + 1)


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


def _chooser(sampling: Sampling, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits (B, vocab_size) to tokens (B,)."""
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
