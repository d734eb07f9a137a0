"""Local files whose readers on a cluster report themselves and wait until a test lets them go."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from blockscale.checkpoint.convert import ConversionReport, RunOptions, run_plan
from blockscale.checkpoint.plan import plan_dequantize
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.tasks import Job

SECONDS = 60


class Gate(LocalFileSystem):
    """A reader in a process other than `driver` leaves a file `NAME@NODE@PID` in the folder `gate` and waits.

    It may pass once there is a file `open` or `pass NAME`, but never on the node named in the file `doomed`;
    a file `crash` makes it end its process.
    """

    cachable = False

    def __init__(self, gate: str, driver: int, **options: Any) -> None:
        super().__init__(gate=gate, driver=driver, **options)
        self.gate, self.driver = Path(gate), driver

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if os.getpid() != self.driver:
            self._stop(Path(path).name)
        return super()._open(path, mode, **options)

    def _stop(self, name: str) -> None:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (self.gate / f"{name}@{node}@{os.getpid()}").touch()
        if (self.gate / "crash").exists():
            os._exit(1)
        doomed = self.gate / "doomed"
        if doomed.exists() and doomed.read_text() == node:
            wait_for(lambda: False)
        wait_for(lambda: (self.gate / "open").exists() or (self.gate / f"pass {name}").exists())


def wait_for(condition: Callable[[], Any]) -> Any:
    """Look until it is true."""
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.02)
    return found


def dequantize(source: Path, target: Path, address: str | None, gate: Path) -> ConversionReport:
    """Dequantize a local checkpoint through the gate."""
    folder = Source(str(source), Gate(str(gate), os.getpid()), str(source))
    return run_plan(plan_dequantize(folder), folder, target, RunOptions(cluster=address), Job(folder))
