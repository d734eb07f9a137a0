"""Timing and record keeping of the benchmarks.

Competitors are timed in one process in interleaved rounds, in a new random order every round: a machine that
slows down for a while slows all of them, and none always runs in the cache the same other one left. Ratios
are therefore taken within a round and then summarized.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from blockscale.ops.timing import interleave
from blockscale.version import __version__


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarize at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Timings:
    """Seconds of every competitor in every round: `seconds[name][round]`."""

    seconds: Mapping[str, list[float]]

    def of(self, name: str) -> Spread:
        """Seconds a call of `name` takes."""
        return Spread.of(self.seconds[name])

    def rate(self, name: str, amount: float) -> Spread:
        """`amount` per second of `name`, for example bytes."""
        return Spread.of([amount / value for value in self.seconds[name]])

    def speedup(self, name: str, base: str) -> Spread:
        """How many times faster `name` is than `base`, paired by round."""
        pairs = zip(self.seconds[base], self.seconds[name], strict=True)
        return Spread.of([reference / value for reference, value in pairs])


def time_interleaved(
    competitors: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Call every competitor once to warm up, then once a round, in an order drawn anew (seeded)."""

    def timer(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    for call in competitors.values():
        call()
    return Timings(interleave({name: partial(timer, call) for name, call in competitors.items()}, rounds))


def flushed_microseconds(call: Callable[[], object]) -> float:
    """Microseconds a call takes on the GPU with the L2 cache flushed: a median of Triton's `do_bench`."""
    from triton.testing import do_bench

    return 1e3 * do_bench(call, warmup=10, rep=40, return_mode="median")


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given; elsewhere that is so already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory of what is gone back to a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a GPU; elsewhere enough."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize


def peak_bytes(device: torch.device) -> int:
    """Most memory that tensors have taken on a GPU until now; elsewhere 0."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def load_module(file: Path) -> ModuleType:
    """A peer's Python file as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, Any]:
    """What a figure depends on: machine, versions, commit ("+dirty" with local changes) and date."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_model(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": _memory_gb(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {
            "python": platform.python_version(),
            "blockscale": __version__,
            **{name: _version(name) for name in ("torch", "triton", "numba", "numpy", "safetensors")},
        },
    }


def append_result(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one JSON line, making the folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _commit() -> str | None:
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+dirty" if git("status", "--porcelain") else "")
