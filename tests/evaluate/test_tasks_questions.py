"""Tasks from local files are lm-eval's own: the same prompts, choices and targets as with the Hub's data."""

import pytest

pytest.importorskip("lm_eval")
import datasets
import lm_eval.tasks

from blockscale.errors import BlockscaleError
from blockscale.evaluate.tasks import questions
from blockscale.evaluate.tasks.questions import Tasks, open_questions
from tests.evaluate import task_files

NAMES = ("mmlu", "hellaswag", "arc_challenge", "gsm8k")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return task_files.write(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def hub(monkeypatch):
    """The Hub, with the same questions, and an index of four tasks only: that of all takes seconds."""
    from pathlib import Path

    class Manager(lm_eval.tasks.TaskManager):
        def __init__(self, **unused):
            root = Path(lm_eval.tasks.__file__).parent
            folders = [root / each for each in ("mmlu/default", "hellaswag", "arc", "gsm8k")]
            super().__init__(include_defaults=False, include_path=folders)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    monkeypatch.setattr(datasets, "load_dataset", task_files.hub)


def asked(found):
    """(context without shots, choices, right answer) of every question."""
    return [
        (
            each.task.fewshot_context(doc, num_fewshot=0),
            each.task.doc_to_choice(doc) if each.task.config.doc_to_choice else None,
            each.task.doc_to_target(doc),
        )
        for each in found
        for doc in map(each.task.task_docs.__getitem__, each.numbers)
    ]


@pytest.mark.parametrize("name", ["mmlu_anatomy", "hellaswag", "arc_challenge", "gsm8k"])
def test_a_question_from_a_file_is_the_same_as_from_the_hub(name, folder, hub):
    named = "mmlu" if name.startswith("mmlu") else name
    ours = [each for each in open_questions(Tasks((named,), str(folder), shots=0)) if each.name == name]
    (theirs,) = open_questions(Tasks((name,), shots=0))
    assert len(theirs.numbers) > 1
    assert asked(ours) == asked([theirs])
    for key in (
        "metric_list",
        "filter_list",
        "generation_kwargs",
        "output_type",
        "target_delimiter",
        "repeats",
    ):
        assert ours[0].task.config[key] == theirs.task.config[key], key
    assert ours[0].task.aggregation() == theirs.task.aggregation()


def test_prompts_are_spelled_as_lm_eval_does(folder):
    found = {each.name: asked([each]) for each in open_questions(Tasks(NAMES, str(folder), shots=0))}
    prompt, choices, right = found["mmlu_anatomy"][0]
    assert prompt == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        'A "dished" face, often\nA. one\nB. two, or\nC. three\nD. four\nAnswer:'
    )
    assert (choices, right) == (["A", "B", "C", "D"], 1)
    assert found["hellaswag"][0][0] == "Roof removal: A man is sitting on a roof. He"
    assert found["hellaswag"][2][0] == "Health: How to rest. Lie down. It helps."
    assert found["arc_challenge"][1] == (
        "Question: Which is built?\nAnswer:",
        ["fast", "safe", "nice", "cheap"],
        1,
    )
    assert found["gsm8k"][2][0] == "Question: How much?\nAnswer:"


def test_shots_are_examples_and_never_the_question_itself(folder):
    for each in open_questions(Tasks(NAMES, str(folder), shots=1)):
        task = each.task
        task.set_fewshot_seed(0)
        assert each.shots == 1
        assert each.shots_from_questions == (each.name in ("hellaswag", "gsm8k"))
        for doc in task.task_docs:
            context = task.fewshot_context(doc, num_fewshot=1)
            assert context.endswith(task.doc_to_text(doc))
            if each.shots_from_questions:
                assert context.count(task.doc_to_text(doc)) == 1
            if each.name == "mmlu_anatomy":
                assert "An example?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n" in context


def test_a_limit_is_spread_over_all_of_a_task(folder):
    found = open_questions(Tasks(("mmlu", "arc_challenge"), str(folder), limit=2))
    numbers = [(each.named, each.name, each.numbers) for each in found]
    assert numbers == [
        ("mmlu", "mmlu_anatomy", (0, 2)),
        ("arc_challenge", "arc_challenge", (0, 1)),
    ]
    whole = open_questions(Tasks(("mmlu",), str(folder), limit=100))
    assert [each.numbers for each in whole] == [(0, 1, 2), (0, 1)]
    assert len({each.digest() for each in (*found, *whole)}) == 4


@pytest.mark.parametrize(
    ("file", "line", "content", "message"),
    [
        ("mmlu/test/anatomy_test.csv", 2, "q,a,b,c,d,A\nq,a,b,c,A\n", "expected a question, four choices"),
        ("mmlu/test/anatomy_test.csv", 1, "q,a,b,c,d,E\n", "letter A to D"),
        ("hellaswag/hellaswag_val_full.txt", 1, "no activity\n0\na\nb\nc\nd\n", "ACTIVITY: CONTEXT"),
        ("hellaswag/hellaswag_val_full.txt", 2, "A: b\nthree\na\nb\nc\nd\n", "0 to 3"),
        ("hellaswag/hellaswag_val_full.txt", 9, "A: b\n0\na\nb\nc\nd\nA: b\n0\na\nb\n", "4 endings"),
        ("arc/ARC-Challenge-Test.jsonl", 1, '{"question": {"choices": []}}\n', "no 'answerKey'|no 'stem'"),
        ("arc/ARC-Challenge-Test.jsonl", 1, "not JSON\n", "as JSON"),
        (
            "gsm8k/test.jsonl",
            2,
            '{"question": "q", "answer": "#### 1"}\n{"question": "q", "answer": "1"}\n',
            "####",
        ),
    ],
)
def test_malformed_data_is_named_with_file_and_line(tmp_path, file, line, content, message):
    task_files.write(tmp_path)
    (tmp_path / file).write_text(content)
    name = "arc_challenge" if file.startswith("arc") else file.partition("/")[0]
    where = rf"{file}, line {line}: malformed task data"
    with pytest.raises(BlockscaleError, match=where) as error:
        open_questions(Tasks((name,), str(tmp_path)))
    assert error.match(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("mmul",)}, r"tasks mmul: no such task.*expected mmlu \| hellaswag"),
        ({"names": ("mmlu", "mmlu")}, "bad tasks"),
        ({"names": ("gsm8k",), "limit": 0}, "bad limit.*at least 1, got 0"),
        ({"names": ("gsm8k",), "shots": -1}, "bad shots"),
        ({"names": ("gsm8k",), "shots": 3}, "gsm8k: not as many examples.*at most 2 shots, got 3"),
        ({"names": ("gsm8k",)}, "at most 2 shots, got 5"),
        ({"names": ("mmlu",), "shots": 2}, "at most 1 shots, got 2"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder, options, message):
    with pytest.raises(BlockscaleError, match=message):
        open_questions(Tasks(**{"data": str(folder)} | options))


def test_missing_data_is_named(tmp_path):
    with pytest.raises(BlockscaleError, match=r"hellaswag_val_full\.txt: no such task data"):
        open_questions(Tasks(("hellaswag",), str(tmp_path)))


def test_an_unknown_task_and_a_hub_out_of_reach_are_told_apart(hub, monkeypatch):
    with pytest.raises(BlockscaleError, match=r"tasks helaswag: no such task.*or another of lm-eval"):
        open_questions(Tasks(("helaswag",)))

    def unreachable(**unused):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(BlockscaleError, match=r"data cannot be loaded \(got no route\); .*--task-data DIR"):
        open_questions(Tasks(("hellaswag",)))


def test_lm_eval_is_asked_for_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(questions, "find_spec", lambda name: None)
    with pytest.raises(
        BlockscaleError, match=r"tasks need the package lm_eval; pip install 'blockscale\[eval\]'"
    ):
        open_questions(Tasks(("hellaswag",), "/nowhere"))
