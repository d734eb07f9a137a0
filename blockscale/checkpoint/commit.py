"""Make a finished conversion visible: all of it or, until the last moment, none of it.

A folder has no transactions. What made the old model loadable goes first and config.json comes last, so that
nothing loads a mixture; killed in between, the next run of the same command finishes the commit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from blockscale.checkpoint import remote
from blockscale.checkpoint.existing import stale_files
from blockscale.checkpoint.hub import commit_folder
from blockscale.checkpoint.journal import append_record
from blockscale.checkpoint.model_config import CONFIG_NAME
from blockscale.checkpoint.source import told
from blockscale.checkpoint.workspace import Workspace
from blockscale.checkpoint.writer import io_errors, sync_folder
from blockscale.errors import CorruptCheckpointError


def commit(workspace: Workspace, files: Sequence[str]) -> None:
    """Give every staged file its final name and remove what is left of a replaced checkpoint."""
    target = workspace.target
    target.refresh()
    if workspace.stale is None:
        workspace.stale = stale_files(target, files)
        append_record(workspace.journal, {"commit": workspace.stale})
    if workspace.repository is not None:
        stale = [name for name in workspace.stale if target.exists(name)]
        commit_folder(workspace.repository, workspace.staging, files, stale)
    else:
        _replace(workspace, files, workspace.stale)
    shutil.rmtree(workspace.folder)


def _replace(workspace: Workspace, files: Sequence[str], stale: Sequence[str]) -> None:
    target = workspace.target
    if (workspace.staging / CONFIG_NAME).exists():
        for name in (CONFIG_NAME, *stale):
            if target.exists(name):
                with told("cannot be removed", target.path(name)):
                    target.fs.rm_file(target.path(name))
    for name in (*(name for name in files if name != CONFIG_NAME), CONFIG_NAME):
        _publish(workspace, name)
    if not target.is_local:
        remote.clear(target)


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
