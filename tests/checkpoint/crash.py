"""A process that converts checkpoints in forked children, and kills them at any change to the disk.

A request is one line of JSON on standard input, the answer one line on standard output. Forking from a
process that has loaded everything makes a run cheap enough to try every place where it can die.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounders import StepUp  # beside this script

from blockscale import Recipe, RunOptions, dequantize_checkpoint, ops, quantize_checkpoint
from blockscale.checkpoint import commit, engine, workspace
from blockscale.checkpoint.shard import shard_checkpoint
from blockscale.errors import BlockscaleError

CHANGES = ("pwrite", "fsync", "replace", "remove", "unlink", "rmdir", "mkdir", "truncate")


class Steps:
    """Counts changes to the disk, and dies at one: before it happens, or in the middle if it is a write."""

    def __init__(self, last: int | None) -> None:
        self.last, self.count, self.lock = last, 0, threading.Lock()
        for name in CHANGES:
            setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            with self.lock:
                self.count += 1
                if self.count == self.last:
                    if change.__name__ == "pwrite":
                        descriptor, data, offset = arguments
                        change(descriptor, memoryview(data)[: len(data) // 2], offset)
                    os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return counting


def die_after_records(last: int) -> None:
    """Die as soon as the journal has so many records."""
    append, appended = workspace.append_record, []

    def counting(*arguments: Any) -> None:
        append(*arguments)
        appended.append(arguments)
        if len(appended) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    workspace.append_record = commit.append_record = counting


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """One conversion; counts the tasks it runs and the changes it makes."""
    tasks = []
    run_task = engine.run_task
    engine.run_task = lambda task, *rest: (tasks.append(task.source.name), run_task(task, *rest))[1]
    steps = Steps(request["kill_at"])
    if request["kill_after_records"]:
        die_after_records(request["kill_after_records"])
    run = RunOptions(workers=request["workers"], overwrite=request["overwrite"])
    try:
        if request["command"] == "quantize":
            rounder = StepUp(Path(request["src"])) if request["rounder"] else None
            recipe = Recipe(**request["recipe"])
            report = quantize_checkpoint(request["src"], request["dst"], recipe, run=run, rounder=rounder)
        elif request["command"] == "convert":
            report = shard_checkpoint(request["src"], request["dst"], 2, run=run)
        else:
            report = dequantize_checkpoint(request["src"], request["dst"], run=run)
    except BlockscaleError as error:
        return {"error": str(error)}
    return {
        "steps": steps.count,
        "tasks": tasks,
        "resumed": report.resumed_shards,
        "already_complete": report.already_complete,
    }


def in_a_child(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request in a fork; the answer of a child that was killed is {"killed": true}."""
    with tempfile.NamedTemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                Path(answer.name).write_text(json.dumps(convert(request)))
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return {"killed": True}
        return json.load(answer)


def main() -> None:
    for dtype in (
        torch.bfloat16,
        torch.float32,
    ):  # compile or load the kernels once, without starting threads
        codes, scale = ops.quantize_weight(torch.ones(256, 256, dtype=dtype), threads=1)
        ops.find_nonfinite(ops.dequantize_weight(codes, scale, dtype=dtype, threads=1), threads=1)
    ops.find_nonfinite(codes, threads=1)
    for line in sys.stdin:
        print(json.dumps(in_a_child(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
