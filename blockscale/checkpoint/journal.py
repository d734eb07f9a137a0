"""The working folder of a run: where it is, the lock on it, and the journal in it.

The working folder of a local destination is `DST/.blockscale/`. That of a remote one is in the local cache,
`~/.cache/blockscale/` (or `$XDG_CACHE_HOME/blockscale/`), under a name that depends on the URL alone, so that
a later run finds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from blockscale.checkpoint.remote import WORK_FOLDER
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.writer import io_errors, sync_folder
from blockscale.errors import BlockscaleError, BusyError
from blockscale.paths import cache_folder


def work_folder(target: Source) -> Path:
    """Where a run into this destination works."""
    if target.is_local:
        return Path(target.root) / WORK_FOLDER
    return cache_folder() / hashlib.sha256(target.spec.rstrip("/").encode()).hexdigest()[:16]


def lock_folder(folder: Path, target: Source) -> int:
    """Lock the working folder, made if need be; returns the descriptor to close in the end.

    Raises:
        BusyError: another run holds the lock.
        BlockscaleError: the folder cannot be written to.
    """
    where = target.spec if target.is_local else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise BlockscaleError(f"cannot be written to: {error.strerror}", where=where) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that has just finished removes the folder: a lock on a removed file guards nothing.
        if not (folder / "lock").exists() or os.fstat(lock).st_ino != os.stat(folder / "lock").st_ino:
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(lock)
        raise BusyError(
            "another run is writing here", where=target.spec, remedy="wait for it, or use another folder"
        ) from error
    except OSError as error:
        os.close(lock)
        remedy = "use a filesystem that has file locks (NFS: mount it with them)"
        raise BlockscaleError(f"cannot be locked: {error.strerror}", where=folder, remedy=remedy) from error
    return lock


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a journal; what a kill tore off at its end is cut off."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    good = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            # Torn by a kill in the middle of the write: nothing after it was recorded.
            os.truncate(path, good)
            break
        records.append(record)
        good += len(line)
    return records


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a record to a journal, synced."""
    with io_errors(path), open(path, "ab") as file:
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
