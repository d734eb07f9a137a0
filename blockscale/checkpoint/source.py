"""Where a checkpoint comes from: a local folder, a Hub repository pinned to a commit, or any fsspec URL.

All three are an fsspec filesystem and a root, so that headers are read by byte range everywhere and a remote
shard is staged on local disk only while it is being worked on. Nothing here parses what it reads.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from blockscale.errors import BlockscaleError

_HUB_ID = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """A folder of files on some filesystem.

    Attributes:
        spec: what the user wrote, for messages.
        fs: the fsspec filesystem.
        root: path of the folder on `fs`; for a Hub repository it carries the pinned commit.
    """

    spec: str
    fs: Any
    root: str

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
        found = self.fs.find(self.root, detail=True)
        names = {path.removeprefix(self.root).lstrip("/"): int(info["size"]) for path, info in found.items()}
        return {name: names[name] for name in sorted(names) if not _hidden(name)}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file from `start`; all of the rest when `length` is None."""
        try:
            with self.fs.open(self.path(name), "rb", cache_type="none") as file:
                file.seek(start)
                return file.read(-1 if length is None else length)
        except OSError as error:
            raise BlockscaleError(f"cannot be read: {_reason(error)}", where=self.path(name)) from error

    def fingerprint(self, name: str) -> list[Any]:
        """What tells a changed file from the one planned with: size and, where there is one, time or etag."""
        info = self.fs.info(self.path(name))
        if self.is_local:
            return [info["size"], os.stat(self.path(name)).st_mtime_ns]
        stamp = next(
            (
                str(info[key])
                for key in ("etag", "ETag", "blob_id", "mtime", "last_modified")
                if info.get(key)
            ),
            "",
        )
        return [info["size"], stamp]

    @contextmanager
    def local_file(self, name: str, staging: Path) -> Iterator[Path]:
        """A local path with the file's bytes; a remote one is fetched into `staging`, removed afterwards."""
        if self.is_local:
            yield Path(self.path(name))
            return
        staging.mkdir(parents=True, exist_ok=True)
        target = staging / name.replace("/", "--")
        try:
            self.fs.get_file(self.path(name), str(target))
            yield target
        except OSError as error:
            raise BlockscaleError(
                f"cannot be fetched: {_reason(error)}", where=f"{self.spec}/{name}"
            ) from error
        finally:
            target.unlink(missing_ok=True)


def open_source(spec: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Open a local folder, an fsspec URL or a Hub repository id (`org/name`, `org/name@revision`, `hf://…`).

    A Hub revision is resolved to its commit once, so that a branch that moves cannot mix two models.

    Raises:
        BlockscaleError: there is no such folder, repository or revision.
    """
    text = os.fspath(spec)
    if os.path.isdir(text):
        return Source(text, fsspec.filesystem("file"), os.path.abspath(text))
    if os.path.exists(text):
        raise BlockscaleError("is a file", where=text, expected="a checkpoint folder")
    hub = _HUB_ID.fullmatch(text)
    if hub and ("://" not in text or text.startswith("hf://")) and not text.startswith((".", "/")):
        return _open_hub(text, hub.group(1), revision or hub.group(2))
    if "://" not in text:
        raise BlockscaleError(
            "no such folder", where=text, expected="a folder, a Hub repo id or an fsspec URL"
        )
    try:
        fs, root = fsspec.core.url_to_fs(text)
        if not fs.isdir(root):
            raise BlockscaleError("no such folder", where=text)
    except (ImportError, ValueError, OSError) as error:
        if isinstance(error, BlockscaleError):
            raise
        raise BlockscaleError(f"cannot be opened: {_reason(error)}", where=text) from error
    return Source(text, fs, root.rstrip("/"))


def _open_hub(text: str, repo_id: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        commit = HfApi().model_info(repo_id, revision=revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise BlockscaleError(
            f"neither a local folder nor a Hub repository that can be reached: {_reason(error)}",
            where=text,
            remedy="check the spelling, the revision, and the access token for a gated repository",
        ) from error
    return Source(text, HfFileSystem(), f"{repo_id}@{commit}")


def _walk_local(root: str) -> Iterator[tuple[str, int]]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            if not _hidden(relative) and os.path.isfile(path):
                yield relative, os.path.getsize(path)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


def copy_file(source: Source, name: str, target: Path) -> str:
    """Copy one file byte for byte, synced; returns its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with (
        source.local_file(name, target.parent) as path,
        open(path, "rb") as reader,
        open(target, "wb") as writer,
    ):
        while block := reader.read(1 << 20):
            digest.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()
