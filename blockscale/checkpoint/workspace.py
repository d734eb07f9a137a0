"""The destination of a conversion: one writer at a time, a journal to resume from, an all-or-nothing commit.

While a run is under way everything lies in `DST/.blockscale/`: a lock, `journal.jsonl`, and `staging/` with
the shards. A shard is journaled after it is complete and synced. The commit is journaled before the first
file moves to its final name, config.json moves last, and the folder `.blockscale/` goes away at the end:
killed at any moment, the same command goes on from what the journal says.

A remote destination has its lock and journal in the local cache (`journal`); each finished shard is uploaded
to `DST/.blockscale/` (`remote`) and removed here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockscale.checkpoint import remote
from blockscale.checkpoint.hub import hub_path
from blockscale.checkpoint.index import parse_object
from blockscale.checkpoint.journal import append_record, lock_folder, read_records, work_folder
from blockscale.checkpoint.plan import CONFIG_NAME, MANIFEST_NAME
from blockscale.checkpoint.source import Source, resolve, told
from blockscale.checkpoint.writer import io_errors, sync_folder, write_synced
from blockscale.errors import BlockscaleError, CorruptCheckpointError

_OURS = (".safetensors", ".safetensors.index.json")


@dataclass
class Workspace:
    """An open, locked destination.

    Attributes:
        target: where the result goes, as a Source (a folder on some filesystem).
        folder: the local working folder.
        run: what tells this run, and those that resume it, from any other.
        claimed: a remote destination is marked as taken by this run.
        done: shard file -> its journal record, for shards that are finished.
        committing: the final file names, once the commit has begun.
        complete: the destination already holds the result of this very plan.
    """

    target: Source
    folder: Path
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    claimed: bool = False
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    committing: list[str] | None = None
    complete: bool = False

    @property
    def staging(self) -> Path:
        return self.folder / "staging"

    @property
    def attempts(self) -> Path:
        """Where the tasks of a cluster run write, each into a folder of its own."""
        return self.folder / "attempts"

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"


def resolve_target(dst: str | os.PathLike[str]) -> Source:
    """The destination as a folder on a filesystem; it need not exist."""
    text = os.fspath(dst)
    if text.startswith("hf://") and (repo := hub_path(text)) is not None:
        raise BlockscaleError(
            "a Hub repository cannot be written shard by shard",
            where=text,
            remedy=f"write to a folder, then: hf upload {repo.repo} FOLDER",
        )
    return Source(text, *resolve(text))


@contextmanager
def open_workspace(dst: str | os.PathLike[str], digest: str, *, overwrite: bool) -> Iterator[Workspace]:
    """Lock the destination for the plan with this digest, and find what is done already.

    Raises:
        BusyError: another run holds the lock.
        BlockscaleError: the destination has other content, or an unfinished run of another plan.
    """
    target = resolve_target(dst)
    folder = work_folder(target)
    existed = folder.parent.exists()
    lock = lock_folder(folder, target)
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
            append_record(workspace.journal, {"plan": digest, "run": workspace.run})
            _claim(workspace, overwrite)
        yield workspace
    except BaseException:
        # Leave nothing behind that the next run could not use; what an earlier run finished stays.
        if ours and not workspace.done and workspace.committing is None:
            if workspace.claimed:
                with suppress(BlockscaleError):
                    remote.clear(target)
            shutil.rmtree(folder, ignore_errors=True)
            if not existed and target.is_local:
                with suppress(OSError):  # somebody has put a file there meanwhile
                    folder.parent.rmdir()
        raise
    finally:
        os.close(lock)


def finish_shard(workspace: Workspace, file: str, record: dict[str, Any]) -> None:
    """Record a shard whose bytes are complete and synced in staging; uploads it if the target is remote."""
    if workspace.target.is_local:
        sync_folder(workspace.staging)
    else:
        staged = workspace.staging / file
        record = {**record, "staged": remote.upload(workspace.target, staged)}
        staged.unlink()
    record_shard(workspace, file, record)


def record_shard(workspace: Workspace, file: str, record: dict[str, Any]) -> None:
    """Record a finished shard; `record["staged"]` says where it waits if not in staging under its name.

    That is a path in the working folder, or a one-time name at a remote destination.
    """
    append_record(workspace.journal, {"shard": file, "record": record})
    workspace.done[file] = record


def commit(workspace: Workspace, files: list[str]) -> None:
    """Give every file its final name: what made the old model loadable goes first, config.json comes last."""
    if workspace.committing is None:
        append_record(workspace.journal, {"commit": files})
        workspace.committing = files
    target = workspace.target
    target.refresh()
    ordered = [name for name in workspace.committing if name != CONFIG_NAME] + [CONFIG_NAME]
    if (workspace.staging / CONFIG_NAME).exists():
        # The old manifest goes last: it tells what is stale, also to a run that resumes a killed one.
        old = [MANIFEST_NAME] if (workspace.staging / MANIFEST_NAME).exists() else []
        for name in (CONFIG_NAME, *_stale(target, ordered), *old):
            if target.exists(name):
                with told("cannot be removed", target.path(name)):
                    target.fs.rm_file(target.path(name))
    for name in ordered:
        _publish(workspace, name)
    if not target.is_local:
        remote.clear(target)
    shutil.rmtree(workspace.folder)


def _stale(target: Source, ordered: list[str]) -> list[str]:
    """Files of a replaced model without a successor: its shards, and unchanged files that it carried along.

    A tokenizer or chat template that stayed behind would pass for the new model's.
    """
    present = [name for name in target.files() if name not in ordered]
    carried = _manifest(target).get("files") if target.exists(MANIFEST_NAME) else None
    carried = carried if isinstance(carried, dict) else {}
    return [
        name
        for name in present
        if _is_ours(name)
        or (name in carried and hashlib.sha256(target.read(name)).hexdigest() == carried[name])
    ]


def _is_ours(name: str) -> bool:
    """Whether a name is a shard or index of this checkpoint; subfolders may hold other checkpoints."""
    return "/" not in name and name.endswith(_OURS)


def _manifest(target: Source) -> dict[str, Any]:
    try:
        return parse_object(target.read(MANIFEST_NAME), MANIFEST_NAME)
    except CorruptCheckpointError:
        return {}


def _publish(workspace: Workspace, name: str) -> None:
    """Move one file from where it waits to its final name, unless an earlier run has done that."""
    target, record = workspace.target, workspace.done.get(name)
    staged = workspace.folder / (record or {}).get("staged", f"staging/{name}")
    if target.is_local:
        if staged.exists():
            final = Path(target.path(name))
            with io_errors(final):
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged, final)
            sync_folder(final.parent)
    elif record is not None:
        if not remote.publish(target, record["staged"], name, record["size"]):
            raise CorruptCheckpointError(
                "an uploaded shard is gone",
                where=target.path(name),
                remedy=f"remove {workspace.folder} and run again with --overwrite",
            )
    elif staged.exists():
        remote.publish(target, remote.upload(target, staged), name, staged.stat().st_size)
        staged.unlink()


def stage_file(workspace: Workspace, name: str, data: bytes) -> None:
    """Put a small file into staging, synced."""
    write_synced(workspace.staging / name, data)


def _load_journal(workspace: Workspace, digest: str, overwrite: bool) -> None:
    records = read_records(workspace.journal)
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
        shutil.rmtree(workspace.attempts, ignore_errors=True)
        return
    workspace.run = records[0].get("run", "")
    _claim(workspace, overwrite)
    workspace.committing = next((record["commit"] for record in records if "commit" in record), None)
    for record in records:
        if "shard" in record and (workspace.committing is not None or _is_staged(workspace, record)):
            workspace.done[record["shard"]] = record["record"]
    if workspace.committing is None:
        _sweep(workspace)


def _claim(workspace: Workspace, overwrite: bool) -> None:
    if not workspace.target.is_local:
        remote.claim(workspace.target, workspace.run, overwrite=overwrite)
        workspace.claimed = True


def _is_staged(workspace: Workspace, entry: dict[str, Any]) -> bool:
    """Whether a journaled shard really is there with its size (it is, unless somebody moved it)."""
    file, record = entry["shard"], entry["record"]
    if not workspace.target.is_local:
        return remote.holds(workspace.target, record["staged"], record["size"])
    staged = workspace.folder / record.get("staged", f"staging/{file}")
    return staged.exists() and staged.stat().st_size == record["size"]


def _sweep(workspace: Workspace) -> None:
    """Remove attempts of a killed run that nobody will ask for; what lies in staging is written over."""
    kept = {record["staged"] for record in workspace.done.values() if "staged" in record}
    if not workspace.target.is_local:
        remote.sweep(workspace.target, kept)
    elif workspace.attempts.is_dir():
        for folder in workspace.attempts.iterdir():
            if not any((workspace.folder / name).parent == folder for name in kept):
                shutil.rmtree(folder, ignore_errors=True)


def _check_vacant(workspace: Workspace, digest: str, overwrite: bool) -> None:
    target = workspace.target
    if not target.is_local:
        target.refresh()
    if not target.fs.exists(target.root):
        return
    present = [name for name in target.files() if _is_ours(name) or name in (CONFIG_NAME, MANIFEST_NAME)]
    if MANIFEST_NAME in present and CONFIG_NAME in present:
        workspace.complete = _manifest(target).get("plan") == digest and not overwrite
    if present and not workspace.complete and not overwrite:
        raise BlockscaleError(
            "already holds a checkpoint",
            where=target.spec,
            got=present[0],
            remedy="choose another folder, or replace it with --overwrite",
        )
