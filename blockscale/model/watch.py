"""Tells every process of a run when another one is gone, whatever it is doing at the time.

A process that is killed leaves the others in a collective call: on a GPU inside a kernel or a CUDA graph that
waits forever, and that no exception ends. So every rank holds a connection to rank 0 on which nothing is said
until it leaves, and a thread waits for the end of it. The operating system sees to that end when a process
dies, and by keep-alive probes when a machine does.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from blockscale.errors import BlockscaleError
from blockscale.model.ranks import Ranks

_LEFT, _FAILED = -1, -2  # what a rank says at its end; other numbers are ranks that are gone
_CONNECT = 60.0  # seconds until all are connected
# Ranks that fail together do so at the same place; one that fails alone leaves the others waiting.
_GRACE = 5.0
# A machine that does not answer counts as gone after 10 + 3 x 10 seconds.
_PROBES = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
_TOKEN_BYTES = 16
_MESSAGE = struct.Struct("!i")
_EXIT_CODE = 2


class Watch:
    """One rank's connections, and the thread that waits on them."""

    def __init__(self, ranks: Ranks, links: dict[int, socket.socket]) -> None:
        """links: to each other rank on rank 0, to rank 0 on the others."""
        self._rank, self._links = ranks.rank, links
        self._leaving = threading.Event()
        self._asleep, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._wait, name="blockscale-watch", daemon=True)
        self._thread.start()

    def leave(self, *, failed: bool) -> None:
        """Say that this rank ends, so that the others do not miss it."""
        self._leaving.set()
        self._say(_FAILED if failed else _LEFT)
        self._wake.send(b"!")
        self._thread.join()
        for each in (*self._links.values(), self._asleep, self._wake):
            each.close()

    def tell(self) -> None:
        """Give the thread, which knows who is gone, the time to say so: it ends the process."""
        self._thread.join(_GRACE)

    def _wait(self) -> None:
        gone = self._first_gone()
        if gone is not None and not self._leaving.is_set():
            self._end(gone)

    def _first_gone(self) -> int | None:
        """The rank that is missed first; None once this one leaves."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._asleep, selectors.EVENT_READ)
            for rank, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._asleep:
                        return None
                    said = _heard(self._links[key.data])
                    if said is None:
                        return int(key.data)
                    if said >= 0:
                        return said
                    if said == _FAILED and not self._leaving.wait(_GRACE):
                        return int(key.data)
                    selector.unregister(key.fileobj)

    def _end(self, gone: int) -> None:
        self._say(gone)
        line = BlockscaleError(
            f"rank {gone} is gone: its process ended, or its machine cannot be reached",
            remedy="see what it has said",
        )
        print(line if self._rank == 0 else f"rank {self._rank}: {line}", file=sys.stderr, flush=True)
        os._exit(_EXIT_CODE)  # the main thread may wait for a GPU that never answers

    def _say(self, message: int) -> None:
        for link in self._links.values():
            with suppress(OSError):
                link.sendall(_MESSAGE.pack(message))


@contextmanager
def watched(ranks: Ranks, host: str) -> Iterator[Watch]:
    """Watch over all ranks while the block runs; host: name or address of rank 0's machine.

    Where a process is gone, the others end within a minute, with a line on standard error and exit code 2.

    Raises:
        BlockscaleError: ranks cannot be connected.
    """
    server = None
    with ranks.together():
        server = _listening() if ranks.rank == 0 else None
    token = ranks.broadcast(secrets.token_bytes(_TOKEN_BYTES))
    port = ranks.broadcast(server.getsockname()[1] if server is not None else 0)
    with ranks.together():
        try:
            if server is not None:
                links = _accepted(server, ranks.world, token)
            else:
                links = {0: _connected(host, port, token, ranks)}
        except OSError as error:
            raise BlockscaleError(
                "cannot be connected to the other ranks", where=f"{host} port {port}", got=error
            ) from error
    watch, failed = Watch(ranks, links), True
    try:
        yield watch
        failed = False
    finally:
        watch.leave(failed=failed)


def _listening() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accepted(server: socket.socket, world: int, token: bytes) -> dict[int, socket.socket]:
    """The connections of all other ranks; strangers, who do not know the token, are turned away."""
    links: dict[int, socket.socket] = {}
    server.settimeout(_CONNECT)
    with server:
        while len(links) < world - 1:
            link, _ = server.accept()
            link.settimeout(_CONNECT)
            known = link.recv(_TOKEN_BYTES, socket.MSG_WAITALL) == token
            rank = _heard(link) if known else None
            if rank is None:
                link.close()
            else:
                links[rank] = _kept_alive(link)
    return links


def _connected(host: str, port: int, token: bytes, ranks: Ranks) -> socket.socket:
    link = socket.create_connection((host, port), _CONNECT)
    link.sendall(token + _MESSAGE.pack(ranks.rank))
    return _kept_alive(link)


def _kept_alive(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES:
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link


def _heard(link: socket.socket) -> int | None:
    """A message, None if the connection has ended."""
    with suppress(OSError):
        data = link.recv(_MESSAGE.size, socket.MSG_WAITALL)
        if len(data) == _MESSAGE.size:
            number: int = _MESSAGE.unpack(data)[0]
            return number
    return None
