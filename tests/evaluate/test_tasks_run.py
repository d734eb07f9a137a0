"""Tasks as part of an evaluation: both models on the same questions, and what an interruption leaves."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("lm_eval")

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.errors import BlockscaleError
from blockscale.evaluate import run
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.run import Text, evaluate
from blockscale.evaluate.tasks.questions import Tasks
from tests.evaluate import task_files
from tests.evaluate.models import save_byte_tokenizer, tiny_llama
from tests.model import models

NAMES = ("arc_challenge", "mmlu", "hellaswag")
LOADING = Loading(device="cpu", dtype=torch.float32, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task data, and two small models with what was made of them in FP8: a Llama, and one of our runtime."""
    folder = task_files.write(tmp_path_factory.mktemp("tasks"))
    models.make(folder / "ours", vocab_size=258, max_position_embeddings=1024, initializer_range=0.15)
    llama = tiny_llama(0, vocab_size=258, hidden_size=64, max_position_embeddings=1024)
    llama.save_pretrained(folder / "llama")
    for name in ("ours", "llama"):
        save_byte_tokenizer(folder / name)
        quantize_checkpoint(folder / name, folder / f"{name}-fp8")
    (folder / "text.txt").write_text("A text that both models read. " * 20)
    return folder


def test_both_models_answer_the_same_questions(folder):
    tasks, plain = Tasks(NAMES, str(folder)), str(folder / "llama")
    told = []
    both = evaluate(f"{plain}-fp8", tasks, reference=plain, loading=LOADING, on_question=told.append)
    assert told == [20] * 20
    assert both.scores is both.text is None
    assert [(each.task, each.metric, each.questions) for each in both.tasks] == [
        ("arc_challenge", "acc", 2),
        ("arc_challenge", "acc_norm", 2),
        ("mmlu", "acc", 5),
        ("hellaswag", "acc", 3),
        ("hellaswag", "acc_norm", 3),
    ]
    for each in both.tasks:
        assert each.difference.value == pytest.approx(each.score.value - each.reference.value)
    alone = evaluate(plain, tasks, loading=LOADING)
    assert [each.score for each in alone.tasks] == [each.reference for each in both.tasks]
    assert all(each.reference is each.difference is None for each in alone.tasks)


def test_our_runtime_answers_as_transformers_does(folder):
    tasks = Tasks(("arc_challenge",), str(folder), limit=1)
    loadings = [replace(LOADING, runtime=runtime) for runtime in ("auto", "transformers")]
    ours, theirs = (evaluate(str(folder / "ours"), tasks, loading=loading) for loading in loadings)
    assert ours.tasks == theirs.tasks
    assert evaluate(str(folder / "ours-fp8"), tasks, loading=LOADING).tasks[0].questions == 1


def test_texts_are_written_and_their_filters_told_apart(folder):
    result = evaluate(str(folder / "llama"), Tasks(("gsm8k",), str(folder), shots=2), loading=LOADING)
    found = [(each.metric, each.shots, each.shots_from_questions) for each in result.tasks]
    assert found == [("exact_match,strict-match", 2, True), ("exact_match,flexible-extract", 2, True)]


def test_shots_are_the_same_for_both_models(folder):
    plain, tasks = str(folder / "llama"), Tasks(("hellaswag",), str(folder), shots=1)
    result = evaluate(plain, tasks, reference=plain, loading=LOADING)
    assert all(each.difference.value == each.difference.standard_error == 0 for each in result.tasks)


def test_a_task_is_not_asked_twice(folder, tmp_path, monkeypatch):
    what = Text(str(folder / "text.txt"), context=64, limit=2), Tasks(NAMES, str(folder))
    setting = {"reference": str(folder / "llama"), "loading": LOADING}
    model, out = str(folder / "llama-fp8"), tmp_path / "result.json"
    whole = evaluate(model, *what, **setting)
    asked, real = [], run.answer

    def answer(questions, lm, who, on_question):
        asked.append((who, questions.name))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return real(questions, lm, who, on_question)

    monkeypatch.setattr(run, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, *what, **setting, out=out)
    part = tmp_path / "result.json.part"
    assert len(part.read_text().splitlines()) == 1 + 2 + 5
    part.write_text(part.read_text() + '{"who": "refer')  # cut off in the middle of a line
    with pytest.raises(BlockscaleError, match=r"something else.*got other tasks"):
        evaluate(model, what[0], Tasks(NAMES, str(folder), limit=1), **setting, out=out)
    first = asked.copy()
    told = []
    result = evaluate(model, *what, **setting, out=out, on_question=told.append)
    names = ["arc_challenge", "mmlu_anatomy", "mmlu_astronomy", "hellaswag"]
    assert first == [*(("model", name) for name in names), *(("reference", name) for name in names[:2])]
    assert asked[6:] == [("reference", name) for name in names[1:]]
    assert told == [20] * 20
    assert (result.tasks, result.scores) == (whole.tasks, whole.scores)
    assert [each["task"] for each in json.loads(out.read_text())["tasks"]] == [
        each.task for each in whole.tasks
    ]
    assert not part.exists()


def test_one_text_and_one_set_of_tasks_at_most(folder):
    text = Text(str(folder / "text.txt"))
    for what in ((), (text, text)):
        with pytest.raises(BlockscaleError, match="a model reads one text"):
            evaluate(str(folder / "llama"), *what, loading=LOADING)


def test_a_model_without_a_tokenizer_is_refused(folder, tmp_path):
    tiny_llama(0, vocab_size=258).save_pretrained(tmp_path)
    with pytest.raises(BlockscaleError, match="no tokenizer"):
        evaluate(str(tmp_path), Tasks(("hellaswag",), str(folder)), loading=LOADING)
