"""A headless Chromium, driven over the DevTools protocol through a pipe.

Chromium reads commands from its file descriptor 3 and writes answers and events to 4, JSON with a NUL behind
each. That takes no package, no driver of a matching version and no port; it says every console message and
uncaught error as an event, and emulates a phone's width, which a window of that size would not get.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
)
_PATIENCE = 60.0


@dataclass
class Tab:
    """One tab; `errors` and `requests` grow as a page runs."""

    to: int
    out: int
    session: str = ""
    errors: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    _events: list = field(default_factory=list)
    _read: bytes = b""
    _number: int = 0

    def call(self, method, **parameters):
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda message: message.get("id") == self._number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def load(self, path, width=1200, height=900, dark=False, scripts=True):
        """Show a file at this width; returns once it has loaded and been laid out."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.prefer(dark)
        self.errors.clear()
        self.requests.clear()
        self._events.clear()
        assert "errorText" not in self.call("Page.navigate", url=path.resolve().as_uri())
        if "Page.loadEventFired" not in self._events:
            self._until(lambda message: message.get("method") == "Page.loadEventFired")
        if scripts:
            self.settle()

    def prefer(self, dark):
        """Prefer dark colours from now on, or light ones."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def settle(self):
        """Wait for two frames: what was to be drawn is."""
        self.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )

    def evaluate(self, expression):
        """Value of a JavaScript expression, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, path, whole=False):
        """Save what is shown, or the whole page, as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _until(self, wanted):
        ends = time.monotonic() + _PATIENCE
        while True:
            head, found, rest = self._read.partition(b"\0")
            if found:
                self._read = rest
                message = json.loads(head)
                self._note(message)
                if wanted(message):
                    return message
                continue
            ready, _, _ = select.select([self.out], [], [], max(0.0, ends - time.monotonic()))
            data = os.read(self.out, 1 << 20) if ready else b""
            assert data, "Chromium does not answer" if not ready else "Chromium has ended"
            self._read += data

    def _note(self, message):
        method, said = message.get("method"), message.get("params", {})
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(each.get("value", each)) for each in said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])


@contextmanager
def open_tab(folder):
    """A tab of a Chromium of its own, whose profile lies in this empty folder."""
    ends = [_moved(end) for end in (*os.pipe(), *os.pipe())]
    its_in, to, out, its_out = ends

    def connect():
        os.dup2(its_in, 3)
        os.dup2(its_out, 4)

    command = [PROGRAM, *_OPTIONS, f"--user-data-dir={folder}", "about:blank"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, close_fds=False, preexec_fn=connect, **quiet)
    os.close(its_in)
    os.close(its_out)
    try:
        tab = Tab(to, out)
        target = next(each for each in tab.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        session = tab.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        tab.session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        yield tab
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(out)


def _moved(end):
    """The descriptor under a number that is neither 3 nor 4."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved
