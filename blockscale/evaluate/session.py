"""One evaluation that can be interrupted: what is asked, scores as they come, the result as one JSON object.

Scores of windows are appended to `FILE.part`, a line each, behind a line that says what was asked. The same
request finds them and goes on where it was; another one is refused. When all windows are scored the result
is written to FILE and the lines are removed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blockscale.errors import BlockscaleError
from blockscale.evaluate.compare import WindowScore


def to_json(result: Any) -> str:
    """A dataclass as one JSON object; numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(_finite(asdict(result)), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Partial:
    """The scores of an unfinished evaluation on disk."""

    def __init__(self, result: Path, request: dict[str, Any]) -> None:
        """Read what is there; `request` says all that the scores depend on.

        Raises:
            BlockscaleError: scores of another request are there, or a result.
        """
        self._result = result
        self._path = result.with_name(f"{result.name}.part")
        self._request = request
        if result.exists():
            remedy = "name another file, or remove it"
            raise BlockscaleError("a result is there already", where=result, remedy=remedy)
        self.scores = tuple(self._read())

    def _read(self) -> Iterator[WindowScore]:
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        asked = json.loads(lines[0]) if lines and lines[0].endswith("\n") else self._request
        if asked != json.loads(json.dumps(self._request)):
            different = sorted(key for key in self._request if asked.get(key) != self._request[key])
            raise BlockscaleError(
                "an unfinished evaluation of something else",
                where=self._path,
                got=f"other {', '.join(different)}",
                remedy="repeat its options to go on with it, or remove it",
            )
        for line in lines[1:]:
            if line.endswith("\n"):  # the last one may have been cut off
                yield WindowScore(**json.loads(line))

    def extend(self, scores: Iterator[WindowScore]) -> Iterator[WindowScore]:
        """Pass scores on, each one written down before."""
        with self._path.open("w", encoding="utf-8") as file:
            for line in (self._request, *map(asdict, self.scores)):
                file.write(json.dumps(line) + "\n")
            for score in scores:
                file.write(json.dumps(asdict(score)) + "\n")
                file.flush()
                yield score

    def finish(self, result: str) -> None:
        """Write the result, JSON, all or nothing, and remove the scores."""
        whole = self._result.with_name(f"{self._result.name}.new")
        whole.write_text(f"{result}\n", encoding="utf-8")
        os.replace(whole, self._result)
        self._path.unlink(missing_ok=True)
