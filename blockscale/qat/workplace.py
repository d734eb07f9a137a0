"""Where a training works until it is done: a folder beside its destination, for one run at a time."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blockscale.checkpoint.journal import lock_folder
from blockscale.checkpoint.source import Source, resolve
from blockscale.errors import BlockscaleError
from blockscale.model.ranks import Ranks
from blockscale.qat.request import RunLimits, Training
from blockscale.qat.saved import Saved, newest


@contextmanager
def workplace(work: Path, out: Path, limits: RunLimits, ranks: Ranks) -> Iterator[Saved | None]:
    """Hold the working folder; the save to go on from, if there is one. A training that is done removes it.

    Raises:
        BlockscaleError: another run works there; an interrupted one is there and not to be resumed, or to be
            resumed and not there; a destination that holds files.
    """
    lock = None
    with ranks.together():
        if ranks.rank == 0:
            lock = lock_folder(work, Source(str(out), *resolve(str(out))))
    try:
        with ranks.together():
            if ranks.rank == 0:
                _check_place(work, out, limits)
        saved = newest(work) if limits.resume else None
        ranks.wait()
        yield saved
        ranks.wait()
        if ranks.rank == 0:
            shutil.rmtree(work)
    finally:
        if lock is not None:
            os.close(lock)


def _check_place(work: Path, out: Path, limits: RunLimits) -> None:
    """Refuse what would overwrite something, or resume nothing."""
    there = newest(work)
    if limits.overwrite and not limits.resume:
        for each in work.iterdir():
            if each.name != "lock":
                shutil.rmtree(each) if each.is_dir() else each.unlink()
    elif limits.resume and there is None:
        raise BlockscaleError("there is nothing to resume", where=work, remedy="leave out --resume")
    elif not limits.resume and there is not None:
        raise BlockscaleError(
            f"an interrupted training is there, saved after step {there.step}",
            where=work,
            remedy="go on with --resume, or throw it away with --overwrite",
        )
    # An export that was interrupted has left a hidden folder, and perhaps master weights.
    places = [(out, ".*")] if limits.masters is None or limits.resume else [(out, ".*"), (limits.masters, "")]
    for folder, ours in places:
        if not limits.overwrite and _holds_files(folder, ours):
            raise BlockscaleError(
                "holds files already",
                where=folder,
                expected="a new folder",
                remedy="name another, or --overwrite",
            )


def _holds_files(folder: Path, but: str) -> bool:
    return folder.exists() and any(not fnmatch.fnmatch(each.name, but) for each in folder.iterdir())


def check_same(saved: Saved, training: Training) -> None:
    """Refuse to resume with other options than those of the beginning."""
    asked = training.spelled()
    for name, value in saved.facts["training"].items():
        if asked.get(name) != value:
            raise BlockscaleError(
                f"{name} differs from that of the interrupted training",
                where=saved.folder,
                expected=value,
                got=asked.get(name),
                remedy="give the options of the beginning, or start anew with --overwrite",
            )
