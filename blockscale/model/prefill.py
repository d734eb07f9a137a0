"""Prompts into the cache: in pieces of bounded size, several prompts in one call where they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from blockscale.model.attention import Batch, KVCache
from blockscale.model.transformer import Transformer
from blockscale.reference.attention import Spans

_PREFILL_TOKENS = 8192  # of one call: bounds the memory of activations
Piece = list[tuple[int, int, int]]  # row of the cache, tokens before, new tokens; as in Spans


def prefill(model: Transformer, cache: KVCache, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Put prompts into rows 0, 1, ... of an empty cache; float32 logits (B, vocab_size) after each."""
    last = []
    for spans in pieces(prompts):
        hidden = model(piece(prompts, spans, model.device), cache)
        last += [hidden[place] for place in ends(prompts, spans).values()]
    return model.logits(torch.stack(last))


def all_logits(model: Transformer, cache: KVCache, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Put sequences into rows 0, 1, ... of an empty cache; float32 logits (T, vocab_size) of every token."""
    hidden = [model(piece(sequences, spans, model.device), cache) for spans in pieces(sequences)]
    return [model.logits(each) for each in torch.cat(hidden).split([len(each) for each in sequences])]


def pieces(prompts: Sequence[Sequence[int]]) -> Iterator[Piece]:
    """All tokens of prompts in order, cut into pieces for one call each."""
    spans: Piece = []
    room = _PREFILL_TOKENS
    for row, prompt in enumerate(prompts):
        before = 0
        while before < len(prompt):
            new = min(len(prompt) - before, room)
            spans.append((row, before, new))
            before, room = before + new, room - new
            if room == 0:
                yield spans
                spans, room = [], _PREFILL_TOKENS
    if spans:
        yield spans


def piece(prompts: Sequence[Sequence[int]], spans: Piece, device: torch.device) -> Batch:
    """The tokens of a piece."""
    tokens = [token for row, before, new in spans for token in prompts[row][before : before + new]]
    positions = [before + i for _, before, new in spans for i in range(new)]
    rows = [row for row, _, new in spans for _ in range(new)]
    ids, places, into = torch.tensor([tokens, positions, rows], device=device)
    return Batch(ids, places, into, Spans(tuple(spans), device), max(positions) + 1)


def ends(prompts: Sequence[Sequence[int]], spans: Piece) -> dict[int, int]:
    """Row of every prompt that ends in a piece, in order -> place of its last token in the piece."""
    found, place = {}, 0
    for row, before, new in spans:
        place += new
        if before + new == len(prompts[row]):
            found[row] = place - 1
    return found
