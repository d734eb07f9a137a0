"""The remote side of a destination: `DST/.blockscale/`, where files wait under one-time names for the commit.

An upload that is cut short, or comes late from a machine that was given up, can therefore never be taken for
a finished file. Final names are given by the store's own move: a rename where it has one, a copy on the store
and a removal otherwise (S3 and the like); nothing travels twice.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Collection
from pathlib import Path

from blockscale.checkpoint.source import Source, told
from blockscale.errors import BlockscaleError, BusyError

WORK_FOLDER = ".blockscale"
_CLAIM = "run.json"


def claim(target: Source, run: str, *, overwrite: bool) -> None:
    """Mark the destination as taken by this run; the lock file holds on one machine only.

    Raises:
        BusyError: it is taken by a run of another machine, finished or not.
    """
    name = f"{WORK_FOLDER}/{_CLAIM}"
    target.refresh()
    if target.exists(name):
        content = target.read(name)
        try:
            holder = json.loads(content)
        except ValueError:
            holder = None
        if isinstance(holder, dict) and holder.get("run") == run:
            return
        if not overwrite:
            raise BusyError(
                "holds an unfinished run of another machine or cache",
                where=target.spec,
                got=f"a run on {holder.get('host') if isinstance(holder, dict) else None}",
                remedy="finish it there, or discard it with --overwrite",
            )
        clear(target)
    content = json.dumps({"run": run, "host": socket.gethostname()}).encode()
    with told("cannot be written to", target.spec):
        target.fs.makedirs(target.path(WORK_FOLDER), exist_ok=True)
        target.fs.pipe_file(target.path(name), content)


def upload(target: Source, file: Path) -> str:
    """Copy a local file to the destination, under a one-time name that is returned."""
    name, nbytes = uuid.uuid4().hex, file.stat().st_size
    with told("cannot be uploaded to", f"{target.spec}: {file.name}"):
        target.fs.makedirs(target.path(WORK_FOLDER), exist_ok=True)
        target.fs.put_file(str(file), target.path(f"{WORK_FOLDER}/{name}"))
    arrived = target.size(f"{WORK_FOLDER}/{name}")
    if arrived != nbytes:
        raise BlockscaleError(
            "was uploaded incompletely", where=f"{target.spec}: {file.name}", expected=nbytes, got=arrived
        )
    return name


def holds(target: Source, staged: str, nbytes: int) -> bool:
    """Whether an uploaded file still waits under its one-time name, whole."""
    name = f"{WORK_FOLDER}/{staged}"
    return target.exists(name) and target.size(name) == nbytes


def publish(target: Source, staged: str, name: str, nbytes: int) -> bool:
    """Give an uploaded file its final name, unless an earlier run has done that; False if it is gone."""
    final = target.path(name)
    if not holds(target, staged, nbytes):
        return target.exists(name) and target.size(name) == nbytes
    with told("cannot be moved into place", f"{target.spec}: {name}"):
        target.fs.makedirs(os.path.dirname(final), exist_ok=True)
        target.fs.mv(target.path(f"{WORK_FOLDER}/{staged}"), final)
    return True


def sweep(target: Source, keep: Collection[str]) -> None:
    """Remove uploads that no journal knows: of a run that was killed, or of a lost machine."""
    with told("cannot be cleaned up", target.spec):
        folder = target.path(WORK_FOLDER)
        for path in target.fs.find(folder) if target.fs.exists(folder) else ():
            if os.path.basename(path) not in (_CLAIM, *keep):
                target.fs.rm_file(path)


def clear(target: Source) -> None:
    """Remove the folder `.blockscale` and all that waits in it."""
    with told("cannot be cleaned up", target.spec):
        folder = target.path(WORK_FOLDER)
        if target.fs.exists(folder):
            target.fs.rm(folder, recursive=True)
