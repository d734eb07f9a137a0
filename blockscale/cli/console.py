"""What every subcommand shares: tables or one JSON object, progress, errors in one line."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from blockscale.checkpoint.progress import Progress, Silent
from blockscale.wording import size

# Names of files, tensors and models are printed as they are: no markup or emoji is looked for in them.
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

if TYPE_CHECKING:
    from blockscale.checkpoint.problems import Problem

_PLAIN_INTERVAL = 10.0


def seconds(value: float) -> str:
    """`0.8 s`, `75 s`, `12 min`, `3.4 h`."""
    if value < 90:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def print_json(result: Any) -> None:
    """Print a dataclass or dict as one JSON object on standard output."""
    print(json.dumps(result, default=_plain, indent=2))


def printable(text: str) -> str:
    """Text from files one need not trust, with control characters and the like spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(messages: tuple[str, ...]) -> None:
    """Print warnings on standard error, a line each."""
    for message in messages:
        err.print(Text(printable(f"warning: {message}"), style="yellow"))


def print_problems(problems: tuple[Problem, ...]) -> None:
    """Print what is wrong with a checkpoint, a line each."""
    for problem in problems:
        style = "red" if problem.severity == "error" else "yellow"
        out.print(Text(printable(str(problem)), style=style), soft_wrap=True)
    if not problems:
        out.print("problems: none")


def print_block_sizes(counts: Mapping[str, int]) -> None:
    """Print how many weights have blocks of which size, unless all have the usual one."""
    if counts.keys() - {"128x128"}:
        out.print("blocks: " + ", ".join(f"{count:,} weights {size}" for size, count in counts.items()))


def print_group_formats(counts: Mapping[str, int]) -> None:
    """Print how many weights have which format of fewer than 8 bits, if any."""
    if counts:
        out.print("in groups: " + ", ".join(f"{count:,} weights {fmt}" for fmt, count in counts.items()))


def fail(message: str, code: int) -> NoReturn:
    """Print one red line on standard error and exit; of torchrun's processes all but the first sign it."""
    rank = os.environ.get("RANK", "0")
    err.print(Text(printable(message if rank == "0" else f"rank {rank}: {message}"), style="bold red"))
    raise SystemExit(code)


@contextmanager
def log(rank: int) -> Iterator[None]:
    """Show on standard error what the package logs: all of it from rank 0, warnings of the others, signed."""
    logger = logging.getLogger("blockscale")
    handler, level = logging.StreamHandler(), logger.level
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """Show progress on standard error: a bar on a terminal, else a line every ten seconds."""
    if quiet or not err.is_terminal:
        yield Silent() if quiet else _Lines()
        return
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), _Counts(), TimeRemainingColumn())
    with RichProgress(*columns, console=err) as bar:
        yield _Bar(bar)


@contextmanager
def bar(total: int) -> Iterator[Callable[[int, str], None] | None]:
    """A function that takes how many of `total` are done and a text beside; None without a terminal."""
    if not err.is_terminal:
        yield None
        return
    text = TextColumn("{task.completed}/{task.total} {task.fields[told]}")
    with RichProgress(BarColumn(), text, TimeRemainingColumn(), console=err) as shown:
        task = shown.add_task("", total=total, told="")
        yield lambda done, told: shown.update(task, completed=done, told=told)


@contextmanager
def counting(what: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A function to call with their number whenever one more is done; shows it on standard error."""
    if quiet:
        yield lambda total: None
        return
    if err.is_terminal:
        columns = (BarColumn(), TextColumn("{task.completed}/{task.total} " + what), TimeRemainingColumn())
        with RichProgress(*columns, console=err) as bar:
            task = bar.add_task("", total=None)
            yield lambda total: bar.update(task, total=total, advance=1)
        return
    done, printed = 0, time.monotonic()

    def count(total: int) -> None:
        nonlocal done, printed
        done += 1
        if time.monotonic() - printed >= _PLAIN_INTERVAL:
            printed = time.monotonic()
            err.print(f"{done}/{total} {what}")

    yield count


class _Bar:
    def __init__(self, bar: RichProgress) -> None:
        self._bar, self._lock = bar, threading.Lock()
        self._task = bar.add_task("", total=None, tensors=0, total_tensors=0)
        self._tensors = self._total_bytes = self._total_tensors = 0

    def start(self, total_bytes: int, total_tensors: int) -> None:
        self._total_bytes += total_bytes
        self._total_tensors += total_tensors
        self._bar.update(self._task, total=self._total_bytes, total_tensors=self._total_tensors)

    def advance(self, nbytes: int, tensors: int) -> None:
        with self._lock:
            self._tensors += tensors
            self._bar.update(self._task, advance=nbytes, tensors=self._tensors)


class _Counts(ProgressColumn):
    """`12/325 tensors  1.2 GB of 4.9 GB  3.1 GB/s`."""

    def render(self, task: Task) -> Text:
        text = f"{task.fields['tensors']}/{task.fields['total_tensors']} tensors  "
        text += f"{size(task.completed)} of {size(task.total or 0)}"
        return Text(text + (f"  {size(task.speed)}/s" if task.speed else ""))


class _Lines:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = self._tensors = self._total_bytes = self._total_tensors = 0
        self._started = self._printed = time.monotonic()

    def start(self, total_bytes: int, total_tensors: int) -> None:
        self._total_bytes += total_bytes
        self._total_tensors += total_tensors

    def advance(self, nbytes: int, tensors: int) -> None:
        with self._lock:
            self._bytes += nbytes
            self._tensors += tensors
            now = time.monotonic()
            if now - self._printed < _PLAIN_INTERVAL or not self._bytes:
                return
            self._printed = now
            rate = self._bytes / (now - self._started)
            left = seconds((self._total_bytes - self._bytes) / rate)
            line = f"{self._tensors}/{self._total_tensors} tensors, {size(self._bytes)} of "
            err.print(f"{line}{size(self._total_bytes)}, {size(rate)}/s, {left} left")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def interrupted() -> NoReturn:
    """What Ctrl-C ends in."""
    fail("interrupted; what is finished is kept: run the same command again to go on", 130)
