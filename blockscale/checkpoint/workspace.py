"""The destination of a conversion: one writer at a time, and a journal to resume from.

While a run is under way everything lies in `DST/.blockscale/`: a lock, `journal.jsonl`, and `staging/` with
the shards; with a rounder also `rounded/`, what it has rounded for them. A shard is journaled after it is
complete and synced. The commit (`commit`) is journaled before the first file moves to its final name,
config.json moves last, and the folder `.blockscale/` goes away at the end: killed at any moment, the same
command goes on from what the journal says.

A remote destination has its lock and journal in the local cache (`journal`); each finished shard is uploaded
to `DST/.blockscale/` (`remote`) and removed here. A Hub repository is remote too, but knows commits: all
files wait in the cache and become one commit (`hub`).
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockscale.checkpoint import remote
from blockscale.checkpoint.block_choice import BlockChoice
from blockscale.checkpoint.existing import refuse_occupied
from blockscale.checkpoint.hub import GIVEN_FILES, HubTarget, hub_path, open_branch
from blockscale.checkpoint.index import parse_object
from blockscale.checkpoint.journal import append_record, lock_folder, read_records, work_folder
from blockscale.checkpoint.plan import MANIFEST_NAME
from blockscale.checkpoint.source import Source, resolve
from blockscale.checkpoint.writer import sync_folder, write_synced
from blockscale.errors import BlockscaleError, CorruptCheckpointError

JOURNAL = "journal.jsonl"
# In the first record of a journal, and in the manifest of a result.
CHOICE_KEY = "block_choice"


@dataclass
class Workspace:
    """An open, locked destination.

    Attributes:
        target: where the result goes, as a Source (a folder on some filesystem).
        folder: the local working folder.
        repository: the branch to commit to, if the destination is on the Hub.
        run: what tells this run, and those that resume it, from any other.
        claimed: a remote destination is marked as taken by this run.
        done: shard file -> its journal record, for shards that are finished.
        stale: files of a replaced checkpoint that go, once the commit has begun; None before.
        complete: the destination already holds the result of this very plan.
    """

    target: Source
    folder: Path
    repository: HubTarget | None = None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    claimed: bool = False
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    stale: list[str] | None = None
    complete: bool = False

    @property
    def committing(self) -> bool:
        """Whether the commit has begun: all files are staged."""
        return self.stale is not None

    @property
    def waits_here(self) -> bool:
        """Whether finished shards wait in the local staging folder for the commit."""
        return self.target.is_local or self.repository is not None

    @property
    def has_work(self) -> bool:
        """Whether there is something for a later run to go on with."""
        rounded = self.rounded.is_dir() and any(self.rounded.iterdir())
        return rounded or bool(self.done) or self.committing

    @property
    def staging(self) -> Path:
        return self.folder / "staging"

    @property
    def attempts(self) -> Path:
        """Where the tasks of a cluster run write, each into a folder of its own."""
        return self.folder / "attempts"

    @property
    def rounded(self) -> Path:
        """Where a rounder writes, and finds in the next run what it has finished."""
        return self.folder / "rounded"

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL


def resolve_target(dst: str | os.PathLike[str]) -> tuple[Source, HubTarget | None]:
    """The destination as a folder on a filesystem, and the branch it is on the Hub; a folder need not exist.

    Only `hf://org/name[@branch][/folder]` is the Hub: `org/name` is a folder here.
    """
    text = os.fspath(dst)
    path = hub_path(text) if text.startswith("hf://") else None
    if path is None:
        return Source(text, *resolve(text)), None
    fs, root, repository = open_branch(path)
    return Source(text, fs, root), repository


@contextmanager
def open_workspace(
    dst: str | os.PathLike[str],
    digest: str,
    files: Collection[str],
    *,
    overwrite: bool,
    choice: dict[str, Any] | None = None,
) -> Iterator[Workspace]:
    """Lock the destination for the plan with this digest, and find what is done already.

    Args:
        dst: the destination.
        digest: of the plan.
        files: names of all files of the result, none of which may be there already.
        overwrite: they may, and so may another checkpoint or an unfinished run of another plan.
        choice: what `recorded_choice` is to give to later runs.

    Raises:
        BusyError: another run holds the lock.
        BlockscaleError: the destination has other content, or an unfinished run of another plan.
    """
    target, repository = resolve_target(dst)
    folder = work_folder(target)
    existed = folder.parent.exists()
    lock = lock_folder(folder, target)
    workspace = Workspace(target, folder, repository)
    ours = False
    try:
        _load_journal(workspace, digest, overwrite)
        ours = True
        if not workspace.done and not workspace.committing:
            given = GIVEN_FILES if repository is not None else ()
            workspace.complete = refuse_occupied(target, digest, files, given, overwrite=overwrite)
        if workspace.complete:
            shutil.rmtree(folder)
        elif not workspace.journal.exists():
            workspace.staging.mkdir(parents=True, exist_ok=True)
            told = {} if choice is None else {CHOICE_KEY: choice}
            append_record(workspace.journal, {"plan": digest, "run": workspace.run, **told})
            _claim(workspace, overwrite)
        yield workspace
    except BaseException:
        # Leave nothing behind that the next run could not use; what an earlier run finished stays.
        if ours and not workspace.has_work:
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


def recorded_choice(dst: str | os.PathLike[str], plan: str) -> BlockChoice | None:
    """The block sizes that an unfinished run, or the finished result, has recorded at a destination.

    Args:
        dst: the destination; it need not exist.
        plan: digest of the plan before the choice; None is the answer where those recorded are of another.
    """
    target, _ = resolve_target(dst)
    journal = work_folder(target) / JOURNAL
    if journal.exists():
        with journal.open("rb") as file:
            raw = file.readline()
    elif target.fs.exists(target.root) and target.exists(MANIFEST_NAME):
        raw = target.read(MANIFEST_NAME)
    else:
        return None
    with suppress(CorruptCheckpointError):  # a torn record, or no result of ours
        choice = parse_object(raw, JOURNAL).get(CHOICE_KEY)
        if isinstance(choice, dict) and choice.get("plan") == plan:
            return BlockChoice.from_record(choice)
    return None


def finish_shard(workspace: Workspace, file: str, record: dict[str, Any]) -> None:
    """Record a shard whose bytes are complete and synced in staging; uploads it if the target is remote."""
    if workspace.waits_here:
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
        shutil.rmtree(workspace.rounded, ignore_errors=True)
        return
    workspace.run = records[0].get("run", "")
    _claim(workspace, overwrite)
    workspace.stale = next((record["commit"] for record in records if "commit" in record), None)
    for record in records:
        if "shard" in record and (workspace.committing or _is_staged(workspace, record)):
            workspace.done[record["shard"]] = record["record"]
    if not workspace.committing:
        _sweep(workspace)


def _claim(workspace: Workspace, overwrite: bool) -> None:
    if not workspace.waits_here:
        remote.claim(workspace.target, workspace.run, overwrite=overwrite)
        workspace.claimed = True


def _is_staged(workspace: Workspace, entry: dict[str, Any]) -> bool:
    """Whether a journaled shard really is there with its size (it is, unless somebody moved it)."""
    file, record = entry["shard"], entry["record"]
    if not workspace.waits_here:
        return remote.holds(workspace.target, record["staged"], record["size"])
    staged = workspace.folder / record.get("staged", f"staging/{file}")
    return staged.exists() and staged.stat().st_size == record["size"]


def _sweep(workspace: Workspace) -> None:
    """Remove attempts of a killed run that nobody will ask for; what lies in staging is written over."""
    kept = {record["staged"] for record in workspace.done.values() if "staged" in record}
    if not workspace.waits_here:
        remote.sweep(workspace.target, kept)
    elif workspace.attempts.is_dir():
        for folder in workspace.attempts.iterdir():
            if not any((workspace.folder / name).parent == folder for name in kept):
                shutil.rmtree(folder, ignore_errors=True)
