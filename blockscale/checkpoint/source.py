"""Where a checkpoint comes from: a local folder, a Hub repository pinned to a commit, or any fsspec URL.

All three are an fsspec filesystem and a root, so that headers are read by byte range everywhere and a remote
shard is staged on local disk only while it is being worked on. Nothing here parses what it reads. Every
filesystem has exceptions of its own; they leave this module as one line.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import TqdmCallback
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from blockscale.checkpoint.hub import hub_path, pin_to_commit
from blockscale.errors import BlockscaleError, CorruptCheckpointError

# Names that filesystems have for what changes when a file does, the surest first.
_STAMPS = ("etag", "ETag", "blob_id", "md5Hash", "mtime", "last_modified", "LastModified", "created")


@dataclass(frozen=True)
class Source:
    """A folder of files on some filesystem. It can be pickled, and read from another machine.

    Attributes:
        spec: what the user wrote, for messages.
        fs: the fsspec filesystem.
        root: path of the folder on `fs`; for a Hub repository it carries the pinned commit.
        pinned: the root names a commit, so what it holds never changes.
    """

    spec: str
    fs: Any
    root: str
    pinned: bool = False

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Path of a file on `fs`."""
        return f"{self.root}/{name}"

    def files(self) -> dict[str, int]:
        """Relative name -> bytes of every file, hidden files and folders left out."""
        if self.is_local:
            return dict(sorted(_walk_local(self.root)))
        with told("cannot be listed", self.spec):
            found = self.fs.find(self.root, detail=True)
        names = {path.removeprefix(self.root).lstrip("/"): info.get("size") for path, info in found.items()}
        wanted = sorted(name for name in names if name and not _hidden(name))
        return {name: self.size(name) if names[name] is None else int(names[name]) for name in wanted}

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        with told("cannot be reached", self._where(name)):
            return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with told("cannot be read", self._where(name)):
            size = self.fs.size(self.path(name))
        if size is None:
            raise BlockscaleError("has no known size, so no byte range can be read", where=self._where(name))
        return int(size)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file from `start`: all of the rest when `length` is None, fewer where the file ends."""
        path, end = self.path(name), None if length is None else start + length
        with told("cannot be read", self._where(name)):
            # Asynchronous filesystems (S3, HTTP) answer with one ranged request; of a file in memory there is
            # one position for all threads that have it open.
            if self.fs.async_impl or isinstance(self.fs, MemoryFileSystem):
                data = bytes(self.fs.cat_file(path, start=start, end=end))
            else:
                with self.fs.open(path, "rb", cache_type="none") as file:
                    file.seek(start)
                    data = bytes(file.read(-1 if length is None else length))
        if length is not None and len(data) > length:
            raise BlockscaleError("the server does not do byte ranges", where=self._where(name))
        return data

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to local disk, whole."""
        with told("cannot be fetched", self._where(name)):
            # The Hub's filesystem draws a progress bar of its own unless it is given one.
            self.fs.get_file(self.path(name), str(target), callback=TqdmCallback({"disable": True}))
        expected, got = self.size(name), target.stat().st_size
        if got != expected:
            raise CorruptCheckpointError(
                "was fetched incompletely",
                where=self._where(name),
                expected=f"{expected} bytes",
                got=got,
                remedy="run the same command again",
            )

    def fingerprint(self, name: str) -> list[Any]:
        """What tells a changed file from the one planned with: size and, where there is one, time or etag."""
        with told("cannot be read", self._where(name)):
            info = self.fs.info(self.path(name))
            if self.is_local:
                return [info["size"], os.stat(self.path(name)).st_mtime_ns]
        return [info["size"], next((str(info[key]) for key in _STAMPS if info.get(key)), "")]

    def refresh(self) -> None:
        """Forget cached listings: what is asked next is what there is now."""
        if not self.pinned:
            self.fs.invalidate_cache()

    @contextmanager
    def local_file(self, name: str, staging: Path) -> Iterator[Path]:
        """A local path with the file's bytes; a remote one is fetched into `staging`, removed afterwards."""
        if self.is_local:
            yield Path(self.path(name))
            return
        staging.mkdir(parents=True, exist_ok=True)
        target = staging / name.replace("/", "--")
        try:
            self.fetch(name, target)
            yield target
        finally:
            target.unlink(missing_ok=True)

    def _where(self, name: str) -> str:
        return self.path(name) if self.is_local else f"{self.spec.rstrip('/')}/{name}"


def open_source(spec: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Open a local folder, an fsspec URL or a Hub repository.

    A repository is `org/name`, `org/name@revision` or `hf://org/name[@revision][/folder]`. Its revision
    (branch, tag, commit, `refs/pr/1`) is resolved to a commit once, so that a branch that moves cannot mix
    two models.

    Raises:
        BlockscaleError: there is no such folder, repository or revision, or it cannot be reached.
    """
    text = os.fspath(spec)
    local = os.path.isdir(text)
    if not local and os.path.exists(text):
        raise BlockscaleError("is a file", where=text, expected="a checkpoint folder")
    hub = None if local else hub_path(text, revision)
    if hub is not None:
        fs, root = pin_to_commit(hub)
        return _opened(text, fs, root, pinned=True) if hub.folder else Source(text, fs, root, pinned=True)
    if revision is not None:
        raise BlockscaleError("only a Hub repository has revisions", where=text, got=f"revision {revision}")
    if not local and "://" not in text:
        raise BlockscaleError(
            "no such folder", where=text, expected="a folder, a Hub repo id or an fsspec URL"
        )
    return _opened(text, *resolve(text))


def resolve(text: str) -> tuple[Any, str]:
    """Filesystem and root of a folder or URL, whether it is there or not.

    Raises:
        BlockscaleError: unknown protocol, or its package is not installed.
    """
    if "://" not in text:
        return fsspec.filesystem("file"), os.path.abspath(text)
    with told("cannot be opened", text):
        fs, root = fsspec.core.url_to_fs(text)
    return fs, os.path.abspath(root) if isinstance(fs, LocalFileSystem) else root.rstrip("/")


def copy_file(source: Source, name: str, target: Path) -> str:
    """Copy one file byte for byte, synced; returns its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source.fetch(name, target)
    digest = hashlib.sha256()
    with open(target, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        os.fsync(file.fileno())
    return digest.hexdigest()


@contextmanager
def told(what: str, where: str) -> Iterator[None]:
    """Tells whatever a filesystem raises in one line."""
    try:
        yield
    except BlockscaleError:
        raise
    except Exception as error:
        raise BlockscaleError(f"{what}: {reason(error)}", where=where) from error


def reason(error: BaseException) -> str:
    """Why, in a few words; many filesystems raise FileNotFoundError with the path for a message."""
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    text = getattr(error, "strerror", None) or str(error).strip()
    if not text:
        return type(error).__name__
    line = str(text).splitlines()[0]
    return (
        line if isinstance(error, (OSError, ImportError, ValueError)) else f"{type(error).__name__}: {line}"
    )


def _opened(text: str, fs: Any, root: str, pinned: bool = False) -> Source:
    with told("cannot be opened", text):
        if not fs.isdir(root):
            # `isdir` takes every failure for a no; `info` says what is wrong.
            fs.info(root)
            raise BlockscaleError("is a file", where=text, expected="a checkpoint folder")
    return Source(text, fs, root, pinned)


def _walk_local(root: str) -> Iterator[tuple[str, int]]:
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        # A link to a folder is part of the checkpoint, once: it may lead back to where it is.
        paths = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [
            name for name in sorted(folders) if not name.startswith(".") and paths[name] not in seen
        ]
        seen.update(paths[name] for name in folders)
        for name in names:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            if not _hidden(relative) and os.path.isfile(path):
                yield relative, os.path.getsize(path)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
