"""Timing on a GPU as decoding meets it: a CUDA graph of products with different weights, in fair turns."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

from blockscale.ops.capture import capture

Name = TypeVar("Name", bound=Hashable)

_REPLAYS, _WARM_UP = 12, 2
_CACHES = 4  # what one replay reads, in sizes of the L2 cache


def copies_past_cache(nbytes: int, device: torch.device | int = 0) -> int:
    """How many copies of a weight to take turns with, so that none is still in the L2 cache at its turn."""
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-_CACHES * cache // nbytes))


def captured(runs: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """A timer of `runs` one after the other in a CUDA graph: median microseconds of one of them.

    Each has been called before, or compiles during the capture, which not every compiler can.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with capture(graph):
        for run in runs:
            run()

    def microseconds() -> float:
        times = []
        for _ in range(_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * start.elapsed_time(end) / len(runs))
        return statistics.median(times[_WARM_UP:])

    return microseconds


def interleave(timers: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, list[float]]:
    """Call every timer once a round, in an order drawn anew (seeded); what each returned, by round.

    A machine that slows down for a while slows all of them, and none always runs in the cache that the same
    other one left.
    """
    found: dict[Name, list[float]] = {name: [] for name in timers}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(timers), len(timers)):
            found[name].append(timers[name]())
    return found
