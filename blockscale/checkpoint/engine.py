"""Convert shards on this machine: tensors in parallel threads, two shards open, syncing overlapped with work.

Threads are enough: reading, quantizing, hashing and writing all release the GIL, and they share one process's
memory. A finished shard is synced and journaled by a thread of its own while the next ones are computed.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockscale.checkpoint.lanes import open_lanes
from blockscale.checkpoint.plan import ShardPlan, Task
from blockscale.checkpoint.progress import Progress
from blockscale.checkpoint.strips import Reader, open_reader
from blockscale.checkpoint.tasks import Job, run_task
from blockscale.checkpoint.writer import ShardFile, close_shard, flush, open_shard

# Early write-back keeps the disk busy while the CPU works, instead of all at once in the final sync.
_FLUSH_BYTES = 128 << 20
_OPEN_SHARDS = 2

Record = dict[str, Any]


class Cancelled(Exception):
    """Raised inside tasks when another one has failed or the user has interrupted the run."""


@dataclass(frozen=True)
class ActiveShard:
    """A shard whose tasks are under way; `inputs` closes the source files and removes staged copies."""

    plan: ShardPlan
    readers: dict[str, Reader]
    output: ShardFile
    futures: list[Future[dict[str, str]]]
    inputs: ExitStack


def default_workers() -> int:
    """One thread for each core this process may use, and two more: some always wait for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 2


def convert_shards(
    shards: Iterable[ShardPlan],
    staging: Path,
    job: Job,
    workers: int,
    finish: Callable[[str, Record], None],
    progress: Progress,
) -> None:
    """Convert shards into `staging`, calling `finish(file, record)` for each one that is complete and synced.

    Args:
        shards: what to convert, in order.
        staging: local folder for the outputs (and for remote source files while they are read).
        job: what all tasks share.
        workers: threads.
        finish: called from one thread, shard by shard in order.
        progress: told of bytes read and tensors finished.
    """
    cancelled = threading.Event()
    active: deque[ActiveShard] = deque()
    syncing: deque[Future[None]] = deque()
    flushes: deque[Future[None]] = deque()
    order = threading.Lock()
    lanes = open_lanes(job.device)
    with (
        ThreadPoolExecutor(workers, "blockscale-work") as pool,
        ThreadPoolExecutor(1, "blockscale-sync") as syncer,
    ):

        def flush_oldest() -> None:
            with order:  # or the shard could be closed before it is flushed
                if active:
                    flushes.append(syncer.submit(flush, active[0].output))

        tick = _make_tick(cancelled, progress, flush_oldest)
        running = replace(job, tick=tick, lanes=lanes)

        def complete() -> None:
            record = _await_shard(active[0])
            with order:
                syncing.append(syncer.submit(_sync, active.popleft(), record, finish, flushes))
            while len(syncing) > 1:
                syncing.popleft().result()

        try:
            for plan in shards:
                active.append(_open_pair(plan, staging, job))
                _submit_tasks(active[-1], running, pool, lambda: progress.advance(0, 1))
                if len(active) == _OPEN_SHARDS:
                    complete()
            while active:
                complete()
            for future in syncing:
                future.result()
        except BaseException:
            cancelled.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for shard in active:
                shard.inputs.close()
                os.close(shard.output.fd)
                shard.output.path.unlink(missing_ok=True)
            raise


def _make_tick(
    cancelled: threading.Event, progress: Progress, flush_oldest: Callable[[], None]
) -> Callable[[int], None]:
    unflushed = 0
    lock = threading.Lock()

    def tick(count: int) -> None:
        nonlocal unflushed
        if cancelled.is_set():
            raise Cancelled
        progress.advance(count, 0)
        with lock:
            unflushed += count
            due = unflushed > _FLUSH_BYTES
            if due:
                unflushed = 0
        if due:
            flush_oldest()

    return tick


def _open_pair(plan: ShardPlan, staging: Path, job: Job) -> ActiveShard:
    with ExitStack() as stack:
        readers = {}
        for file in plan.source_files:
            path = stack.enter_context(job.source.local_file(file, staging / "source"))
            readers[file] = stack.enter_context(open_reader(path))
        output = open_shard(staging / plan.file, plan.outputs, plan.metadata)
        return ActiveShard(plan, readers, output, [], stack.pop_all())


def _submit_tasks(shard: ActiveShard, job: Job, pool: ThreadPoolExecutor, done: Callable[[], None]) -> None:
    def work(task: Task) -> dict[str, str]:
        hashes = run_task(task, shard.readers[task.source.file], shard.output, job)
        done()
        return hashes

    shard.futures.extend(pool.submit(work, task) for task in shard.plan.tasks)


def _await_shard(shard: ActiveShard) -> Record:
    hashes: dict[str, str] = {}
    for future in shard.futures:
        hashes |= future.result()
    shard.inputs.close()
    return {"size": shard.output.size, "sha256": dict(sorted(hashes.items()))}


def _sync(
    shard: ActiveShard,
    record: Record,
    finish: Callable[[str, Record], None],
    flushes: deque[Future[None]],
) -> None:
    try:
        # The kernel reports a failed write-back once: after an early one the final sync succeeds.
        while flushes and flushes[0].done():
            flushes.popleft().result()
    finally:
        close_shard(shard.output)
    finish(shard.plan.file, record)
