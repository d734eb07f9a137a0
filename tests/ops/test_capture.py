"""What is collected while a graph is captured would end the capture: nothing is."""

import gc
from contextlib import contextmanager

import pytest
import torch

from blockscale.ops.capture import capture


@contextmanager
def graph(_, pool):
    yield


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_not_collected_during_a_capture_and_as_before_after_it(monkeypatch, collects):
    monkeypatch.setattr(torch.cuda, "graph", graph)
    seen = []

    def fail():
        with capture(None):
            seen.append(gc.isenabled())
            raise RuntimeError("in between")

    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(RuntimeError, match="in between"):
            fail()
        assert seen == [False]
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()
