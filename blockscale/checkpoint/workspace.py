"""The destination of a conversion: one writer at a time, a journal to resume from, an all-or-nothing commit.

While a run is under way everything lies in `DST/.blockscale/`: a lock, `journal.jsonl`, and `staging/` with
the shards. A shard is journaled after it is complete and synced. The commit is journaled before the first
file moves to its final name, config.json moves last, and the folder `.blockscale/` goes away at the end:
killed at any moment, the same command goes on from what the journal says. A remote destination has its
workspace in the local cache, and each finished shard is uploaded instead of kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from blockscale.checkpoint.plan import CONFIG_NAME, MANIFEST_NAME
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.writer import sync_folder, write_synced
from blockscale.errors import BlockscaleError, BusyError

WORK_FOLDER = ".blockscale"
_OURS = (".safetensors", ".safetensors.index.json")


@dataclass
class Workspace:
    """An open, locked destination.

    Attributes:
        target: where the result goes, as a Source (a folder on some filesystem).
        folder: the local working folder.
        done: shard file -> its journal record, for shards that are finished.
        committing: the final file names, once the commit has begun.
        complete: the destination already holds the result of this very plan.
    """

    target: Source
    folder: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    committing: list[str] | None = None
    complete: bool = False

    @property
    def staging(self) -> Path:
        return self.folder / "staging"

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"


def resolve_target(dst: str | os.PathLike[str]) -> Source:
    """The destination as a folder on a filesystem; it need not exist."""
    text = os.fspath(dst)
    if "://" not in text:
        return Source(text, fsspec.filesystem("file"), os.path.abspath(text))
    try:
        fs, root = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError, OSError) as error:
        raise BlockscaleError(f"cannot be opened: {error}", where=text) from error
    if isinstance(fs, LocalFileSystem):
        return Source(text, fs, os.path.abspath(root))
    return Source(text, fs, root.rstrip("/"))


@contextmanager
def open_workspace(dst: str | os.PathLike[str], digest: str, *, overwrite: bool) -> Iterator[Workspace]:
    """Lock the destination for the plan with this digest, and find what is done already.

    Raises:
        BusyError: another run holds the lock.
        BlockscaleError: the destination has other content, or an unfinished run of another plan.
    """
    target = resolve_target(dst)
    folder = _work_folder(target)
    existed = folder.parent.exists()
    lock = _lock(folder, target)
    workspace = Workspace(target, folder)
    ours = False
    try:
        _load_journal(workspace, digest, overwrite)
        ours = True
        if not workspace.done and workspace.committing is None:
            _check_vacant(workspace, digest, overwrite)
        if workspace.complete:
            shutil.rmtree(folder)
        elif not workspace.journal.exists():
            workspace.staging.mkdir(parents=True, exist_ok=True)
            _append(workspace, {"plan": digest})
        yield workspace
    except BaseException:
        # Leave nothing behind that the next run could not use; what an earlier run finished stays.
        if ours and not workspace.done and workspace.committing is None:
            shutil.rmtree(folder, ignore_errors=True)
            if not existed and target.is_local:
                shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def finish_shard(workspace: Workspace, file: str, record: dict[str, Any]) -> None:
    """Record a shard whose bytes are complete and synced in staging; uploads it if the target is remote."""
    sync_folder(workspace.staging)
    if not workspace.target.is_local:
        _upload(workspace, file)
    _append(workspace, {"shard": file, "record": record})
    workspace.done[file] = record


def commit(workspace: Workspace, files: list[str]) -> None:
    """Give every file its final name: what made the old model loadable goes first, config.json comes last."""
    if workspace.committing is None:
        _append(workspace, {"commit": files})
        workspace.committing = files
    target, fs = workspace.target, workspace.target.fs
    ordered = [name for name in workspace.committing if name != CONFIG_NAME] + [CONFIG_NAME]
    if (workspace.staging / CONFIG_NAME).exists():
        stale = [name for name in target.files() if name.endswith(_OURS) and name not in ordered]
        for name in (CONFIG_NAME, MANIFEST_NAME, *stale):
            if fs.exists(target.path(name)) and (name in stale or (workspace.staging / name).exists()):
                fs.rm_file(target.path(name))
    for name in ordered:
        staged = workspace.staging / name
        if not staged.exists():
            continue
        if target.is_local:
            final = Path(target.path(name))
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, final)
            sync_folder(final.parent)
        else:
            _upload(workspace, name)
    shutil.rmtree(workspace.folder)


def stage_file(workspace: Workspace, name: str, data: bytes) -> None:
    """Put a small file into staging, synced."""
    write_synced(workspace.staging / name, data)


def _work_folder(target: Source) -> Path:
    if target.is_local:
        return Path(target.root) / WORK_FOLDER
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "blockscale" / hashlib.sha256(target.spec.encode()).hexdigest()[:16] / WORK_FOLDER


def _lock(folder: Path, target: Source) -> int:
    where = target.spec
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
            "another run is writing here", where=where, remedy="wait for it, or use another folder"
        ) from error
    return lock


def _load_journal(workspace: Workspace, digest: str, overwrite: bool) -> None:
    records = _read_journal(workspace.journal)
    if records and records[0].get("plan") != digest:
        if not overwrite:
            raise BlockscaleError(
                "holds an unfinished run of another plan: the source, the options or the version changed",
                where=workspace.target.spec,
                remedy="repeat the earlier command to finish it, or discard it with --overwrite",
            )
        records = []
    if not records:
        workspace.journal.unlink(missing_ok=True)
        shutil.rmtree(workspace.staging, ignore_errors=True)
    for record in records:
        if "commit" in record:
            workspace.committing = record["commit"]
        elif "shard" in record and (workspace.committing is not None or _is_staged(workspace, record)):
            workspace.done[record["shard"]] = record["record"]


def _is_staged(workspace: Workspace, record: dict[str, Any]) -> bool:
    """Whether a journaled shard really is there with its size (it is, unless somebody moved it)."""
    if not workspace.target.is_local:
        path = workspace.target.path(record["shard"])
        return workspace.target.fs.exists(path) and workspace.target.fs.size(path) == record["record"]["size"]
    staged = workspace.staging / record["shard"]
    committed = Path(workspace.target.path(record["shard"]))
    return any(
        path.exists() and path.stat().st_size == record["record"]["size"] for path in (staged, committed)
    )


def _read_journal(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            # Torn by a kill in the middle of the write: nothing after it was recorded.
            path.write_bytes(b"".join(json.dumps(r).encode() + b"\n" for r in records))
            break
        records.append(record)
    return records


def _append(workspace: Workspace, record: dict[str, Any]) -> None:
    with open(workspace.journal, "ab") as file:
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(workspace.folder)


def _check_vacant(workspace: Workspace, digest: str, overwrite: bool) -> None:
    target = workspace.target
    if not target.fs.exists(target.root):
        return
    present = [
        name for name in target.files() if name.endswith(_OURS) or name in (CONFIG_NAME, MANIFEST_NAME)
    ]
    if MANIFEST_NAME in present and CONFIG_NAME in present:
        try:
            workspace.complete = (
                json.loads(target.read(MANIFEST_NAME)).get("plan") == digest and not overwrite
            )
        except (json.JSONDecodeError, AttributeError):
            workspace.complete = False
    if present and not workspace.complete and not overwrite:
        raise BlockscaleError(
            "already holds a checkpoint",
            where=target.spec,
            got=present[0],
            remedy="choose another folder, or replace it with --overwrite",
        )


def _upload(workspace: Workspace, name: str) -> None:
    target, staged = workspace.target, workspace.staging / name
    try:
        target.fs.makedirs(os.path.dirname(target.path(name)), exist_ok=True)
        target.fs.put_file(str(staged), target.path(name))
    except OSError as error:
        raise BlockscaleError(f"cannot be uploaded: {error}", where=target.path(name)) from error
    staged.unlink()
