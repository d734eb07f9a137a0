"""Perplexity of a model in training, on windows of a text that it does not train on."""

from __future__ import annotations

import torch
from torch import nn

from blockscale.evaluate.text import read_text, token_ids
from blockscale.evaluate.windows import cut, mean_of, spread
from blockscale.model.ranks import Ranks
from blockscale.model.text import Tokenizer
from blockscale.qat.arithmetic import Arithmetic
from blockscale.qat.history import Check
from blockscale.qat.losses import next_token_loss
from blockscale.qat.request import Training


def check_windows(training: Training, tokenizer: Tokenizer) -> list[torch.Tensor]:
    """Token ids, int64 (T,), of every window of the text that perplexity is measured on."""
    if training.check_data is None:
        return []
    tokens = token_ids(read_text(training.check_data), tokenizer, None, None)
    windows = spread(cut(tokens, training.context, training.context), training.check_windows)
    return [tokens[each.begin : each.end] for each in windows]


@torch.no_grad()
def check(
    model: nn.Module, windows: list[torch.Tensor], arithmetic: Arithmetic, ranks: Ranks, step: int
) -> Check:
    """Mean cross entropy of the windows, which the processes share.

    Args:
        model: of transformers, sharded or not.
        windows: of `check_windows`.
        arithmetic: of forward passes.
        ranks: that share the model.
        step: after which this is.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(len(windows), dtype=torch.float64, device=ranks.device)
    # All processes call the model equally often; what one has too few of is the last window again, uncounted.
    for first in range(0, len(windows), ranks.world):
        place = first + ranks.rank
        ids = windows[min(place, len(windows) - 1)][None].to(ranks.device)
        with arithmetic():
            logits = model(input_ids=ids, use_cache=False).logits
        if place < len(windows):
            sums[place] = next_token_loss(logits, ids).double() * (ids.shape[1] - 1)
    model.train(training)
    found = mean_of(ranks.all_reduce(sums).tolist(), [len(each) - 1 for each in windows])
    return Check(step, found.value, found.standard_error)
