"""Questions of well-known tasks from files on disk, in the shape that lm-eval's own tasks read.

    mmlu/{dev,test}/SUBJECT_{dev,test}.csv     question, A, B, C, D, letter; no header (Hendrycks)
    hellaswag/hellaswag_val_full.txt[.bz2]     six lines an item: context, number of the right ending, endings
    arc/ARC-Challenge-{Test,Dev,Train}.jsonl   as AI2 published it; Dev and Train are optional
    gsm8k/{test,train}.jsonl                   as OpenAI published it; train is optional

Every task gives the questions, and the examples that a prompt with shots is made of where the files have any:
MMLU's dev, ARC's Train (else Dev), GSM8K's train. A task without examples takes shots from its other
questions.
"""

from __future__ import annotations

import bz2
import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockscale.errors import BlockscaleError

Row = dict[str, Any]

_LETTERS = "ABCD"
_ENDINGS = 4
# ActivityNet's contexts end within a sentence, which lm-eval has by itself (ctx_b) and capitalizes.
_UNFINISHED = re.compile(r'(?P<ctx_a>.*[.?!]"?) (?P<ctx_b>[^.?!]*)', re.DOTALL)


@dataclass(frozen=True)
class LocalTask:
    """One task of lm-eval.

    Attributes:
        questions: what is asked, as the rows of the data set that lm-eval's task reads.
        examples: what shots are made of; empty where shots come from the questions.
    """

    questions: list[Row]
    examples: list[Row]


def read_local(name: str, folder: Path) -> dict[str, LocalTask]:
    """The tasks of lm-eval that `name` stands for, by their names.

    Raises:
        BlockscaleError: a task that has no files here, files that are missing, or a malformed item, with its
            file and line.
    """
    if name not in _READERS:
        raise BlockscaleError(
            "no such task among those that local files are read for",
            where=f"tasks {name}",
            expected=" | ".join(_READERS),
            remedy="without --task-data, every task of lm-eval is taken from the Hub",
        )
    return _READERS[name](folder)


def _mmlu(folder: Path) -> dict[str, LocalTask]:
    files = sorted((folder / "mmlu" / "test").glob("*_test.csv"))
    if not files:
        raise _missing(folder / "mmlu" / "test" / "SUBJECT_test.csv")
    found = {}
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        examples = folder / "mmlu" / "dev" / f"{subject}_dev.csv"
        found[f"mmlu_{subject}"] = LocalTask(list(_mmlu_rows(file)), list(_mmlu_rows(examples)))
    return found


def _mmlu_rows(file: Path) -> Iterator[Row]:
    with _opened(file) as lines:
        reader = csv.reader(lines)
        for cells in reader:
            if len(cells) != 6 or cells[5] not in _LETTERS or len(cells[5]) != 1:
                expected = "a question, four choices and a letter A to D"
                raise _malformed(file, reader.line_num, expected, f"{len(cells)} cells: {cells[-1:]}")
            yield {"question": cells[0], "choices": cells[1:5], "answer": _LETTERS.index(cells[5])}


def _hellaswag(folder: Path) -> dict[str, LocalTask]:
    file = folder / "hellaswag" / "hellaswag_val_full.txt.bz2"
    if not file.exists():
        file = file.with_suffix("")
    with _opened(file) as text:
        lines = text.read().splitlines()
    rows = []
    for start in range(0, len(lines), 2 + _ENDINGS):
        context, right, *endings = [*lines[start : start + 2 + _ENDINGS], ""][: 2 + _ENDINGS]
        activity, colon, ctx = context.partition(": ")
        if not colon:
            raise _malformed(file, start + 1, "ACTIVITY: CONTEXT", repr(context))
        if right not in ("0", "1", "2", "3"):
            raise _malformed(file, start + 2, "the number of the right ending, 0 to 3", repr(right))
        if len(endings) != _ENDINGS or not all(endings):
            raise _malformed(file, start + 3, f"{_ENDINGS} endings, a line each", f"{endings}")
        unfinished = _UNFINISHED.fullmatch(ctx)
        parts = unfinished.groupdict() if unfinished and unfinished["ctx_b"] else {"ctx_a": ctx, "ctx_b": ""}
        rows.append({"activity_label": activity, **parts, "endings": endings, "label": right})
    return {"hellaswag": LocalTask(rows, [])}


def _arc(folder: Path) -> dict[str, LocalTask]:
    place = folder / "arc"
    examples = [place / f"ARC-Challenge-{split}.jsonl" for split in ("Train", "Dev")]
    return {"arc_challenge": _with_examples(place / "ARC-Challenge-Test.jsonl", examples, _arc_row)}


def _arc_row(item: Any) -> Row:
    question, choices = item["question"], item["question"]["choices"]
    labels = [str(choice["label"]) for choice in choices]
    labels.index(item["answerKey"])
    return {
        "question": str(question["stem"]),
        "choices": {"text": [str(choice["text"]) for choice in choices], "label": labels},
        "answerKey": item["answerKey"],
    }


def _gsm8k(folder: Path) -> dict[str, LocalTask]:
    place = folder / "gsm8k"
    return {"gsm8k": _with_examples(place / "test.jsonl", [place / "train.jsonl"], _gsm8k_row)}


def _gsm8k_row(item: Any) -> Row:
    question, answer = item["question"], item["answer"]
    if "#### " not in answer:
        raise ValueError('no "#### " before the result')
    return {"question": str(question), "answer": str(answer)}


def _with_examples(file: Path, examples: list[Path], row: Callable[[Any], Row]) -> LocalTask:
    first = next((each for each in examples if each.exists()), None)
    return LocalTask(list(_json_rows(file, row)), [] if first is None else list(_json_rows(first, row)))


def _json_rows(file: Path, row: Callable[[Any], Row]) -> Iterator[Row]:
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield row(json.loads(line))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                got = f"no {error}" if isinstance(error, KeyError) else error
                raise _malformed(file, number, "an item of this task as JSON", got) from error


def _opened(file: Path) -> Any:
    if not file.exists():
        raise _missing(file)
    opener: Callable[..., Any] = bz2.open if file.suffix == ".bz2" else open
    return opener(file, "rt", encoding="utf-8", newline="" if file.suffix == ".csv" else None)


def _missing(file: Path) -> BlockscaleError:
    return BlockscaleError(
        "no such task data", where=file, remedy="docs/EVALUATION.md shows the files of a task"
    )


def _malformed(file: Path, line: int, expected: str, got: object) -> BlockscaleError:
    return BlockscaleError("malformed task data", where=f"{file}, line {line}", expected=expected, got=got)


_READERS: dict[str, Callable[[Path], dict[str, LocalTask]]] = {
    "mmlu": _mmlu,
    "hellaswag": _hellaswag,
    "arc_challenge": _arc,
    "gsm8k": _gsm8k,
}
