"""One more token of every sequence: eagerly, or as CUDA graphs.

A graph replays the kernels of one step without the host; there is one for each number of sequences (rounded
up) and each reach of attention (a power of two), captured when it is first needed. Sequences that only fill
up a batch are copies of the first one: they read and write what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from blockscale.model.attention import Batch, KVCache
from blockscale.model.transformer import Transformer

_LOOK_STEP = 256  # without graphs attention looks at a multiple of this many tokens
_LEAST_REACH = 512  # of a graph
# (rows of the cache, tokens int64 (B,), lengths with them) -> logits float32 (B, vocab_size)
Decode = Callable[[Sequence[int], torch.Tensor, Sequence[int]], torch.Tensor]


def decoder(model: Transformer, cache: KVCache) -> Decode:
    """What decodes fastest: graphs where the device has them and no layer makes the host wait."""
    if model.device.type == "cuda" and not model.waits:
        return DecodeGraphs(model, cache)
    return lambda rows, tokens, lengths: decode(model, cache, rows, tokens, lengths)


@torch.inference_mode()
def decode(
    model: Transformer, cache: KVCache, rows: Sequence[int], tokens: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """One more token of sequences, without graphs.

    Args:
        model: what computes it.
        cache: of the sequences.
        rows: of the cache, one for each sequence.
        tokens: int64 (B,), their last tokens, which are not cached yet.
        lengths: of the sequences with these tokens.

    Returns:
        Logits of the next tokens, float32 (B, vocab_size).
    """
    longest = min(-(-max(lengths) // _LOOK_STEP) * _LOOK_STEP, cache.positions)
    positions, places = torch.tensor([[length - 1 for length in lengths], list(rows)], device=model.device)
    return model.logits(model(Batch(tokens, positions, places, None, longest), cache))


@dataclass(frozen=True)
class _Captured:
    """A graph and its memory: int64 (3, B) of positions, rows and tokens, and logits (B, vocab_size)."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    logits: torch.Tensor


class DecodeGraphs:
    """`decode` of one model and cache, as graphs."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._captured: dict[tuple[int, int], _Captured] = {}

    @torch.inference_mode()
    def __call__(self, rows: Sequence[int], tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """As `decode`; the result is overwritten by the next call."""
        count = batch_size(len(rows))
        reach = min(max(_LEAST_REACH, 1 << (max(lengths) - 1).bit_length()), self._cache.positions)
        fill = count - len(rows)
        positions = [length - 1 for length in lengths] + [lengths[0] - 1] * fill
        places = torch.tensor([positions, [*rows, *[rows[0]] * fill]])
        known = self._captured.get((count, reach))
        inputs = known.inputs if known else tokens.new_empty(3, count)
        inputs[:2].copy_(places, non_blocking=True)
        inputs[2, : len(rows)].copy_(tokens)
        if fill:
            inputs[2, len(rows) :].copy_(tokens[:1].expand(fill))
        if known is None:
            known = self._captured[count, reach] = self._capture(inputs, reach)
        known.graph.replay()
        return known.logits[: len(rows)]

    def _capture(self, inputs: torch.Tensor, reach: int) -> _Captured:
        positions, rows, tokens = inputs
        batch = Batch(tokens, positions, rows, None, reach)

        def run() -> torch.Tensor:
            return self._model.logits(self._model(batch, self._cache))

        # Kernels are compiled and loaded on their first call, which no capture can hold. It computes what
        # the graph computes again.
        side = torch.cuda.Stream(inputs.device)
        side.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream(inputs.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        others = next(iter(self._captured.values()), None)
        with torch.cuda.graph(graph, pool=others.graph.pool() if others else None):
            logits = run()
        return _Captured(graph, inputs, logits)


def batch_size(sequences: int) -> int:
    """Sequences that a graph has: the next power of two to 8, multiple of 8 to 64, and multiple of 32."""
    if sequences <= 8:
        return 1 << (sequences - 1).bit_length()
    step = 8 if sequences <= 64 else 32
    return -(-sequences // step) * step
