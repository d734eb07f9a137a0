"""Look at the weights that a plan quantizes before anything is written: each is read once, in threads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from blockscale.checkpoint.engine import default_workers
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.plan import ConversionPlan
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.strips import Reader, open_reader

Found = TypeVar("Found")


def scan(
    plan: ConversionPlan, source: Source, workers: int | None, look: Callable[[TensorEntry, Reader], Found]
) -> Iterator[tuple[TensorEntry, Found]]:
    """What `look` finds in every weight that becomes FP8, in the order of the plan.

    Args:
        plan: says which.
        source: of the plan; files of a remote one are fetched one after the other.
        workers: threads; None means one a core and two more.
        look: reads a weight; called in several threads.
    """
    staging = Path(tempfile.mkdtemp(prefix="blockscale-"))
    try:
        for shard in plan.shards:
            (file,) = shard.source_files
            entries = [task.source for task in shard.tasks if task.action == "quantize"]
            with (
                source.local_file(file, staging) as path,
                open_reader(path) as reader,
                ThreadPoolExecutor(workers or default_workers(), "blockscale-scan") as pool,
            ):
                found = [pool.submit(look, entry, reader) for entry in entries]
                try:
                    for entry, future in zip(entries, found, strict=True):
                        yield entry, future.result()
                finally:
                    pool.shutdown(cancel_futures=True)
    finally:
        shutil.rmtree(staging)
