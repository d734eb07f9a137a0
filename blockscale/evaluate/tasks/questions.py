"""Which questions are asked: tasks of lm-eval, with their data from the Hub or from local files.

A task from local files is lm-eval's own of that name: its prompts, choices, filters and metrics, with nothing
replaced but the data set and the splits it is read from.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blockscale.errors import BlockscaleError
from blockscale.evaluate.tasks.local import LocalTask, read_local

_FOLDERS = {"mmlu": "mmlu/default", "hellaswag": "hellaswag", "arc_challenge": "arc", "gsm8k": "gsm8k"}


@dataclass(frozen=True)
class Tasks:
    """What a model is asked.

    Attributes:
        names: of lm-eval: tasks, groups or tags. Local files are read for those that `local` knows.
        data: folder of local files; None for the Hub.
        limit: most questions of each name, spread evenly over all of it; None for all.
        shots: examples in a prompt; None for as many as lm-eval's task has by itself.
    """

    names: tuple[str, ...]
    data: str | None = None
    limit: int | None = None
    shots: int | None = None


@dataclass(frozen=True)
class Questions:
    """Questions of one task of lm-eval.

    Attributes:
        named: what the user named, of which this task is a part or the whole.
        task: lm-eval's object.
        numbers: which of its questions, ascending.
    """

    named: str
    task: Any
    numbers: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of lm-eval's task."""
        return str(self.task.config.task)

    @property
    def shots(self) -> int:
        """Examples in a prompt."""
        return int(self.task.config.num_fewshot or 0)

    @property
    def shots_from_questions(self) -> bool:
        """Whether its prompts have shots, and lm-eval takes them from the other questions."""
        return self.shots > 0 and _from_questions(self.task)

    def digest(self) -> str:
        """Changes when the questions do."""
        digest = hashlib.sha256()
        for number in self.numbers:
            row = self.task.task_docs[number]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def check_installed() -> None:
    """Refuse before anything is loaded.

    Raises:
        BlockscaleError: lm-eval is not installed.
    """
    missing = [name for name in ("lm_eval", "datasets") if find_spec(name) is None]
    if missing:
        remedy = "pip install 'blockscale[eval]'"
        raise BlockscaleError(f"tasks need the package {missing[0]}", remedy=remedy)


def open_questions(tasks: Tasks) -> list[Questions]:
    """All questions, task by task in the order they were named.

    Raises:
        BlockscaleError: lm-eval is not installed; an unknown task; data that is missing or malformed; a limit
            below 1, or more shots than there are examples.
    """
    check_installed()
    if tasks.limit is not None and tasks.limit < 1:
        raise BlockscaleError("bad limit", where="limit", expected="at least 1", got=tasks.limit)
    if tasks.shots is not None and tasks.shots < 0:
        raise BlockscaleError("bad shots", where="shots", expected="0 or more", got=tasks.shots)
    if not tasks.names or len(set(tasks.names)) < len(tasks.names):
        raise BlockscaleError("bad tasks", where="tasks", expected="each once", got=",".join(tasks.names))
    local = {name: read_local(name, Path(tasks.data)) for name in tasks.names} if tasks.data else None
    with quiet():
        found = {name: _hub(name) for name in tasks.names} if local is None else _local(local)
    questions = []
    for name, members in found.items():
        for task in members:
            _set_shots(task, tasks.shots)
        questions += _spread(name, members, tasks.limit)
    return questions


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of lm-eval, which cannot be switched off."""
    with redirect_stderr(io.StringIO()):
        yield


def _local(data: dict[str, dict[str, LocalTask]]) -> dict[str, list[Any]]:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / _FOLDERS[name] for name in data]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    found = {}
    for name, members in data.items():
        unknown = sorted(set(members) - set(manager.all_subtasks))
        if unknown:
            raise BlockscaleError("no such task in lm-eval", where=f"task data of {name}", got=unknown[0])
        changed = [{"task": task, **_replaced(each)} for task, each in members.items()]
        # Members of a group take over all of the task of that name but what is given here.
        loaded = manager.load([{"group": f"{name} from local files", "task": changed}])
        found[name] = list(loaded["tasks"].values())
    return found


def _replaced(local: LocalTask) -> dict[str, Any]:
    """What a task from local files has of its own."""
    from datasets import Dataset, DatasetDict

    splits = {"questions": local.questions, "examples": local.examples}
    data = DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items() if rows})
    return {
        "custom_dataset": lambda **_: data,
        "dataset_path": None,
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "questions",
        # Where they are one, lm-eval leaves the question itself out of its shots.
        "fewshot_split": "examples" if local.examples else "questions",
    }


def _hub(name: str) -> list[Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.all_tasks:
        raise BlockscaleError(
            "no such task",
            where=f"tasks {name}",
            expected=f"{', '.join(_FOLDERS)}, or another of lm-eval",
            remedy="`lm_eval ls tasks` lists them",
        )
    try:
        return list(manager.load([name])["tasks"].values())
    except (OSError, ValueError, RuntimeError) as error:
        remedy = "name a folder of local files: --task-data DIR" if name in _FOLDERS else None
        raise BlockscaleError(
            "its data cannot be loaded", where=f"tasks {name}", got=error, remedy=remedy
        ) from error


def _set_shots(task: Any, shots: int | None) -> None:
    if shots is not None and task.config.num_fewshot != 0:  # 0 stands for prompts with examples of their own
        task.set_config("num_fewshot", shots)
    wanted = int(task.config.num_fewshot or 0)
    if not wanted:
        return
    there = len(task.sampler.df) - int(_from_questions(task))
    if wanted > there:
        raise BlockscaleError(
            "not as many examples for prompts",
            where=f"task {task.config.task}",
            expected=f"at most {there} shots",
            got=wanted,
            remedy="set --shots",
        )


def _from_questions(task: Any) -> bool:
    config = task.config
    return bool(config.fewshot_split == (config.test_split or config.validation_split))


def _spread(named: str, members: list[Any], limit: int | None) -> list[Questions]:
    """Up to `limit` questions of all members together."""
    counts = [len(task.task_docs) for task in members]
    total = sum(counts)
    limit = total if limit is None else min(limit, total)
    chosen = [number * total // limit for number in range(limit)]
    questions, start = [], 0
    for task, count in zip(members, counts, strict=True):
        own = tuple(number - start for number in chosen if start <= number < start + count)
        start += count
        if own:
            questions.append(Questions(named, task, own))
    return questions
