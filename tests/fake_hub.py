"""The few routes of the Hugging Face Hub that reading and committing a model take, on loopback, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """What is served, and what was asked for.

    Attributes:
        refs: (repository, revision) -> commit.
        commits: commit -> its files.
        blobs: SHA-256 -> content of the large files that were uploaded, committed or not.
        refused: (route or file name) -> (status, X-Error-Code) to answer instead.
        asked: (route, file name, bytes sent) of every answer; the route of a byte range is "range".
        after: called with (route, file name) before an answer is sent, but after it was made.
    """

    url: str = ""
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    blobs: Files = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    after: Callable[[str, str], None] = lambda route, name: None

    def push(self, repo: str, files: Files, revision: str = "main") -> str:
        """Make a commit and point a branch at it; returns the commit."""
        listing = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        commit = hashlib.sha1(json.dumps([repo, listing]).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[repo, revision] = self.refs[repo, commit] = commit
        return commit

    def sent(self, route: str) -> dict[str, int]:
        """File name -> bytes sent by a route."""
        total: dict[str, int] = {}
        for asked, name, nbytes in self.asked:
            if asked == route:
                total[name] = total.get(name, 0) + nbytes
        return total


@contextmanager
def serving() -> Iterator[Hub]:
    """A running Hub; it is gone after the block."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parsed = _parse(urlsplit(self.path).path)
        if parsed is None:
            self._refuse(404, "", (self.path, ""))
            return
        route, repo, revision, name = parsed
        for key in (name, route):
            if key in self.served.refused:
                self._refuse(*self.served.refused[key], (route, name))
                return
        if not any(known == repo for known, _ in self.served.refs):
            self._refuse(404, "RepoNotFound", (route, name))
            return
        commit = self.served.refs.get((repo, revision))
        if commit is None:
            self._refuse(404, "RevisionNotFound", (route, name))
            return
        files = self.served.commits[commit]
        if route == "resolve":
            if name not in files:
                self._refuse(404, "EntryNotFound", (route, name))
                return
            self._send_file(files[name], name)
            return
        found = {"info": lambda: _info(repo, commit), "tree": lambda: _tree(files, name)}[route]()
        self._send(200, json.dumps(found).encode(), {}, (route, name))

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"]))
        route = next(name for name in (*_ANSWERS, "objects/batch", "commit") if name in path)
        if route in self.served.refused:
            self._refuse(*self.served.refused[route], (route, ""))
            return
        if route == "commit":
            self._commit("/".join(path.split("/")[3:5]), unquote(path.split("/")[6]), body)
            return
        answer = _ANSWERS.get(route, self._batch)(json.loads(body))
        self._send(200, json.dumps(answer).encode(), {}, (route, ""))

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if "put" in self.served.refused:
            self._refuse(*self.served.refused["put"], ("put", oid))
            return
        assert hashlib.sha256(content).hexdigest() == oid
        self.served.blobs[oid] = content
        self._send(200, b"", {}, ("put", oid))

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [dict(entry) for entry in asked["objects"]]
        for entry in objects:
            if entry["oid"] not in self.served.blobs:
                entry["actions"] = {"upload": {"href": f"{self.served.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        header, *operations = (json.loads(line) for line in body.splitlines())
        head = self.served.refs[repo, revision]
        if header["value"]["parentCommit"] != head:
            self._refuse(412, "", ("commit", revision))
            return
        files = dict(self.served.commits[head])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.served.blobs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        commit = self.served.push(repo, files, revision)
        url = f"{self.served.url}/{repo}/commit/{commit}"
        made = {"success": True, "commitOid": commit, "commitUrl": url}
        self._send(200, json.dumps(made).encode(), {}, ("commit", revision))

    def _send_file(self, content: bytes, name: str) -> None:
        headers: dict[str, str] = {}
        status, asked = 200, self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            status, content = 206, content[start : end + 1]
        self._send(status, content, headers, ("range" if asked else "resolve", name))

    def _refuse(self, status: int, code: str, what: tuple[str, str]) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"}, what)

    def _send(self, status: int, content: bytes, headers: dict[str, str], what: tuple[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        # Recorded first: the client may look as soon as it has the last byte.
        self.served.asked.append((*what, len(content)))
        self.served.after(*what)
        self.end_headers()
        self.wfile.write(content)


def _parse(path: str) -> tuple[str, str, str, str] | None:
    """(route, repository, revision, file or folder) of a request, or None for another route."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "models"]:
        repo, rest = "/".join(parts[2:4]), parts[4:]
        if not rest:
            return "info", repo, "main", ""
        route = {"revision": "info", "tree": "tree"}.get(rest[0])
        return (route, repo, unquote(rest[1]), unquote("/".join(rest[2:]))) if route else None
    if parts[2:3] == ["resolve"]:
        return "resolve", "/".join(parts[:2]), unquote(parts[3]), unquote("/".join(parts[4:]))
    return None


def _valid(asked: dict[str, Any]) -> dict[str, Any]:
    return {"errors": [], "warnings": []}


def _preupload(asked: dict[str, Any]) -> dict[str, Any]:
    paths = [entry["path"] for entry in asked["files"]]
    return {
        "files": [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for path in paths
        ]
    }


_ANSWERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "validate-yaml": _valid,
    "preupload": _preupload,
}


def _info(repo: str, commit: str) -> dict[str, object]:
    return {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": []}


def _tree(files: Files, folder: str) -> list[dict[str, object]]:
    """The files below a folder and the folders on the way, as the recursive listing has them."""
    prefix = f"{folder}/" if folder else ""
    below = {name: content for name, content in files.items() if name.startswith(prefix)}
    folders = {name[:at] for name in below for at in range(len(prefix), len(name)) if name[at] == "/"}
    entries: list[dict[str, object]] = [
        {"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)
    ]
    for name, content in sorted(below.items()):
        oid = hashlib.sha1(content).hexdigest()
        entries.append({"type": "file", "path": name, "oid": oid, "size": len(content)})
    return entries
