"""A remote filesystem for tests: local folders behind the generic fsspec interface, watched, made to fail."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

Hook = Callable[[str, str], None]


class Store(AbstractFileSystem):
    """`store:///folder`: listings are cached, a move is a copy and a removal, like S3 and its kin.

    Attributes:
        before: called with (operation, path) before a file is read, got, put, copied or removed.
        asked: the (operation, path) so far in this process.
        nbytes: path -> bytes read by range.
    """

    protocol = "store"
    before: Hook | None = None
    asked: ClassVar[list[tuple[str, str]]] = []
    nbytes: ClassVar[dict[str, int]] = {}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.local = LocalFileSystem()
        self.listings: dict[str, dict[str, dict[str, Any]]] = {}

    @classmethod
    def watch(cls, before: Hook | None = None) -> None:
        """Begin a new record, with another hook."""
        cls.before, cls.asked, cls.nbytes = before and staticmethod(before), [], {}
        fsspec.register_implementation("store", cls, clobber=True)

    @classmethod
    def names(cls, operation: str) -> list[str]:
        """Names of the files that an operation was done on."""
        return [os.path.basename(path) for done, path in cls.asked if done == operation]

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if path not in self.listings:
            self.listings[path] = {info["name"]: info for info in self.local.ls(path, detail=True)}
        return list(self.listings[path].values() if detail else self.listings[path])

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        for info in self.ls(self._parent(path)):
            if info["name"] == path:
                return info
        raise FileNotFoundError(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.listings.clear()

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.FileIO:
        assert mode == "rb"
        self._note("read", path)
        return _Counted(path, self.nbytes)

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        self._note("get", rpath)
        self.local.get_file(rpath, lpath)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self._note("put", rpath)
        self.local.put_file(lpath, rpath)
        self.listings.clear()

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self.local.pipe_file(path, value)
        self.listings.clear()

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self._note("copy", path2)
        self.local.cp_file(path1, path2)
        self.listings.clear()

    def rm_file(self, path: str) -> None:
        if os.path.isdir(path):
            self.local.rmdir(path)
        else:
            self._note("remove", path)
            self.local.rm_file(path)
        self.listings.clear()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.local.makedirs(self._strip_protocol(path), exist_ok=exist_ok)
        self.listings.clear()

    def _note(self, operation: str, path: str) -> None:
        type(self).asked.append((operation, path))
        if type(self).before is not None:
            type(self).before(operation, path)


class _Counted(io.FileIO):
    def __init__(self, path: str, nbytes: dict[str, int]) -> None:
        super().__init__(path)
        self.counter, self.path = nbytes, path

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(-1 if size is None else size)
        self.counter[self.path] = self.counter.get(self.path, 0) + len(data)
        return data
