"""Up to two tokens a step: a layer drafts the token after the next, and the model checks it as it reads on.

A step reads two tokens of every sequence, its last one and a draft of the next. What the model chooses after
the last one is the next token, whatever the draft was. If it is the draft, what the model chooses after the
draft is one token more. Then the multi-token prediction layer reads the hidden states of both with the tokens
chosen after them, and drafts again. So every token is the model's own choice: the likeliest ones are those of
one token a step (but for the rounding of products with another number of rows), drawn ones are distributed
as they are there. What a wrong draft left in the cache is written over by the next step.

Sources: DeepSeek-V3, arXiv:2412.19437, section 5.4.3; Leviathan et al. 2023, arXiv:2211.17192, section 2.3,
whose rule comes to this where the draft is certain of its one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blockscale.model.attention import Batch, KVCache
from blockscale.model.decode import Choose, eager, fastest
from blockscale.model.mtp import MTP
from blockscale.model.prefill import ends, piece, pieces
from blockscale.model.transformer import Transformer

_NO_DRAFT = -1


class Drafting:
    """Sequences of one model with a multi-token prediction layer, and their cache.

    Their state is int64 (B, 5): position of the last token, the last token, a draft of the next; then what
    the step before has found: the first new token, and whether the draft of it was right (1, 0, or -1 where
    there was none), in which case the last token is a second new one.
    """

    def __init__(
        self,
        model: Transformer,
        mtp: MTP,
        cache: KVCache,
        choose: Choose,
        draws: bool,
    ) -> None:
        """Prepare, with an empty cache.

        Args:
            model: what chooses tokens.
            mtp: what drafts them.
            cache: with room for the layer.
            choose: of logits the next tokens.
            draws: whether `choose` draws, which no CUDA graph can hold.
        """
        self._model, self._mtp, self._cache, self._choose = model, mtp, cache, choose
        self._step = eager(cache, self._two_tokens) if draws else fastest(model, cache, self._two_tokens)

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read prompts into rows 0, 1, ... of the cache; the state of the sequences."""
        model, device = self._model, self._model.device
        chosen, drafted = [], []
        for spans in pieces(prompts):
            batch = piece(prompts, spans, device)
            hidden = model.normed(model(batch, self._cache))
            # The layer reads every token with the next one, which after a prompt is still to be chosen.
            shifted = [[*prompts[row][before + 1 :], 0][:new] for row, before, new in spans]
            following = torch.tensor([token for each in shifted for token in each], device=device)
            last = torch.tensor([*ends(prompts, spans).values()], dtype=torch.int64, device=device)
            if len(last):
                following[last] = self._choose(model.head(hidden[last]))
            chosen.append(following[last])
            drafted.append(self._mtp(model.embed(following), hidden, batch, self._cache)[last])
        first, draft = torch.cat(chosen), model.head(torch.cat(drafted)).argmax(-1)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        return torch.stack([lengths, first, draft, first, torch.full_like(first, _NO_DRAFT)], 1)

    def advance(self, rows: Sequence[int], state: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """The state one step later; it may be overwritten by the next call.

        Args:
            rows: of the cache, one for each sequence.
            state: of the sequences.
            lengths: without the new tokens in their state.
        """
        places = torch.tensor([list(rows)]).to(state.device, non_blocking=True)
        return self._step(torch.cat([places, state[:, :3].T]), max(lengths) + 3)

    @staticmethod
    def read(line: list[int]) -> tuple[list[int], bool | None]:
        """New tokens in a sequence's state; whether the draft was right, or None where there was none."""
        _, last, _, first, right = line
        return ([first, last] if right == 1 else [first]), None if right == _NO_DRAFT else bool(right)

    @torch.inference_mode()
    def _two_tokens(self, inputs: torch.Tensor, longest: int) -> torch.Tensor:
        """Rows of the cache, positions, last tokens and drafts, int64 (4, B), to the next state."""
        model, (rows, position, last, draft) = self._model, inputs
        tokens, positions = _pairs(last, draft), _pairs(position, position + 1)
        batch = Batch(tokens, positions, _pairs(rows, rows), None, longest)
        hidden = model.normed(model(batch, self._cache))
        following = self._choose(model.head(hidden))
        drafted = self._mtp(model.embed(following), hidden, batch, self._cache)
        first, second = following[0::2], following[1::2]
        right = first == draft
        last = torch.where(right, second, first)
        draft = model.head(torch.where(right[:, None], drafted[1::2], drafted[0::2])).argmax(-1)
        # A sequence that has ended may take a step more, which is thrown away: it stays inside the cache.
        position = (position + 1 + right).clamp(max=self._cache.positions - 2)
        return torch.stack([position, last, draft, first, right.long()], 1)


def _pairs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(B,) and (B,) to (2B,), taking turns."""
    return torch.stack([first, second], 1).flatten()
