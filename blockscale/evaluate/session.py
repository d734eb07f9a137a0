"""One evaluation that can be interrupted: what is asked, scores as they come, the result as one JSON object.

Scores of windows, and all answers of a model to a task, are appended to `FILE.part`, a line each, behind a
line that says what was asked. The same request finds them and goes on where it was; another one is refused.
When all is measured the result is written to FILE and the lines are removed.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from blockscale.errors import BlockscaleError
from blockscale.evaluate.compare import WindowScore
from blockscale.evaluate.tasks.answers import Answers

_Record = TypeVar("_Record", WindowScore, Answers)


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
    """What an unfinished evaluation has measured, on disk if its result is to go there.

    Attributes:
        scores: of windows, from the first.
        answers: to tasks.
    """

    def __init__(self, result: Path | None, request: dict[str, Any]) -> None:
        """Read what is there; `request` says all that the scores depend on.

        Raises:
            BlockscaleError: scores of another request are there, or a result.
        """
        self.scores: list[WindowScore] = []
        self.answers: list[Answers] = []
        self._result = result
        if result is None:
            return
        if result.exists():
            remedy = "name another file, or remove it"
            raise BlockscaleError("a result is there already", where=result, remedy=remedy)
        if not result.parent.is_dir():
            raise BlockscaleError("no such folder", where=result.parent, remedy="make it, or name another")
        self._path = result.with_name(f"{result.name}.part")
        self._begin(json.loads(json.dumps(request)))

    def _begin(self, request: dict[str, Any]) -> None:
        """Read whole lines, and write them again: the last one may have been cut off."""
        lines = (
            self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        )
        lines = [line for line in lines if line.endswith("\n")]
        asked = json.loads(lines[0]) if lines else request
        if asked != request:
            different = sorted(key for key in request if asked.get(key) != request[key])
            raise BlockscaleError(
                "an unfinished evaluation of something else",
                where=self._path,
                got=f"other {', '.join(different)}",
                remedy="repeat its options to go on with it, or remove it",
            )
        for line in lines[1:]:
            record = json.loads(line)
            if "task" in record:
                self.answers.append(Answers(**record))
            else:
                self.scores.append(WindowScore(**record))
        self._path.write_text("".join(lines or [json.dumps(request) + "\n"]), encoding="utf-8")

    @property
    def answered(self) -> set[tuple[str, str]]:
        """Who answered to what."""
        return {(each.who, each.task) for each in self.answers}

    def keep(self, record: _Record) -> _Record:
        """Write a record down; the same record."""
        if isinstance(record, Answers):
            self.answers.append(record)
        else:
            self.scores.append(record)
        if self._result is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        return record

    def finish(self, result: str) -> None:
        """Write the result, JSON, all or nothing, and remove what was kept."""
        if self._result is None:
            return
        whole = self._result.with_name(f"{self._result.name}.new")
        whole.write_text(f"{result}\n", encoding="utf-8")
        os.replace(whole, self._result)
        self._path.unlink(missing_ok=True)
