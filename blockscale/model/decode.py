"""One step of every sequence: eagerly, or as CUDA graphs.

A graph replays the kernels of one step without the host; there is one for each number of sequences (rounded
up) and each reach of attention (a power of two), captured when it is first needed. Sequences that only fill
up a batch are copies of the first one: they read and write what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from blockscale import ops
from blockscale.model.attention import Batch, KVCache
from blockscale.model.transformer import Transformer
from blockscale.ops.capture import capture

_LOOK_STEP = 256  # without graphs attention looks at a multiple of this many tokens
_LEAST_REACH = 512  # of a graph
Choose = Callable[[torch.Tensor], torch.Tensor]  # logits (B, vocab_size) -> tokens (B,)
# (int64 (N, B) of what is known of the sequences, cached tokens to look at) -> (B, ...), without the host
Step = Callable[[torch.Tensor, int], torch.Tensor]
# (rows of the cache, tokens int64 (B,), lengths with them) -> logits float32 (B, vocab_size)
Decode = Callable[[Sequence[int], torch.Tensor, Sequence[int]], torch.Tensor]


def decoder(model: Transformer, cache: KVCache) -> Decode:
    """`decode` as fast as the device allows; the result may be overwritten by the next call."""
    step = fastest(model, cache, partial(_one_token, model, cache))
    return lambda rows, tokens, lengths: step(_inputs(rows, tokens, lengths), max(lengths))


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
    return eager(cache, partial(_one_token, model, cache))(_inputs(rows, tokens, lengths), max(lengths))


def _inputs(rows: Sequence[int], tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    places = torch.tensor([list(rows), [length - 1 for length in lengths]])
    return torch.cat([places.to(tokens.device, non_blocking=True), tokens[None]])


def _one_token(model: Transformer, cache: KVCache, inputs: torch.Tensor, longest: int) -> torch.Tensor:
    rows, positions, tokens = inputs
    return model.logits(model(Batch(tokens, positions, rows, None, longest), cache))


def fastest(model: Transformer, cache: KVCache, step: Step) -> Step:
    """A step as graphs where the device has them, no layer makes the host wait, and no audit watches."""
    if model.device.type == "cuda" and not model.waits and not ops.is_auditing():
        return Graphs(cache, step)
    return eager(cache, step)


def eager(cache: KVCache, step: Step) -> Step:
    """A step without graphs."""
    return lambda inputs, longest: step(inputs, min(-(-longest // _LOOK_STEP) * _LOOK_STEP, cache.positions))


@dataclass(frozen=True)
class _Captured:
    """A graph and its memory: int64 (N, B), and the result (B, ...)."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    result: torch.Tensor


class Graphs:
    """A step on one cache, as graphs."""

    def __init__(self, cache: KVCache, step: Step) -> None:
        self._positions, self._step = cache.positions, step
        self._captured: dict[tuple[int, int], _Captured] = {}

    @torch.inference_mode()
    def __call__(self, inputs: torch.Tensor, longest: int) -> torch.Tensor:
        """As the step; the result is overwritten by the next call."""
        sequences = inputs.shape[1]
        count = batch_size(sequences)
        reach = min(max(_LEAST_REACH, 1 << (longest - 1).bit_length()), self._positions)
        known = self._captured.get((count, reach))
        room = known.inputs if known else inputs.new_empty(len(inputs), count)
        room[:, :sequences].copy_(inputs)
        if sequences < count:
            room[:, sequences:].copy_(inputs[:, :1].expand(-1, count - sequences))
        if known is None:
            known = self._captured[count, reach] = self._capture(room, reach)
        known.graph.replay()
        return known.result[:sequences]

    def _capture(self, inputs: torch.Tensor, reach: int) -> _Captured:
        # Kernels are compiled and loaded on their first call, which no capture can hold. It computes what
        # the graph computes again.
        side = torch.cuda.Stream(inputs.device)
        side.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(side):
            self._step(inputs, reach)
        torch.cuda.current_stream(inputs.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        others = next(iter(self._captured.values()), None)
        with capture(graph, others.graph if others else None):
            result = self._step(inputs, reach)
        return _Captured(graph, inputs, result)


def batch_size(sequences: int) -> int:
    """Sequences that a graph has: the next power of two to 8, multiple of 8 to 64, and multiple of 32."""
    if sequences <= 8:
        return 1 << (sequences - 1).bit_length()
    step = 8 if sequences <= 64 else 32
    return -(-sequences // step) * step
