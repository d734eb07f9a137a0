"""Capture of CUDA graphs that what happens elsewhere in the process does not end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, beside: torch.cuda.CUDAGraph | None = None) -> Iterator[None]:
    """`torch.cuda.graph` without garbage collection.

    A graph of a model that is gone may lie in a cycle of references. To destroy it is no operation that a
    capture allows: collected in the middle of one, it makes that one fail.

    Args:
        graph: to be filled.
        beside: one whose memory it shares.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=None if beside is None else beside.pool()):
            yield
    finally:
        if collects:
            gc.enable()
