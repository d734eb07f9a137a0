"""An evaluation from names to figures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from blockscale import ops
from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError
from blockscale.evaluate.compare import Scores, WindowScore, score_windows, summarize
from blockscale.evaluate.loading import Loading, is_quantized
from blockscale.evaluate.session import Partial, to_json
from blockscale.evaluate.subjects import Subject, open_subject
from blockscale.evaluate.tasks.answers import TaskScore, Who, answer, task_scores
from blockscale.evaluate.tasks.questions import Questions, Tasks, open_questions
from blockscale.evaluate.text import read_text, token_ids
from blockscale.evaluate.windows import Window, cut, spread
from blockscale.model.text import Tokenizer, load_tokenizer
from blockscale.ops import GemmRecord
from blockscale.version import __version__


@dataclass(frozen=True)
class Text:
    """What models read.

    Attributes:
        data: a file, or "wikitext2".
        tokens: only the first so many; None for all.
        context: tokens of a window.
        stride: between the starts of two windows; None for the context, so that windows do not overlap.
        limit: most windows, spread evenly over the text; None for all.
    """

    data: str
    tokens: int | None = None
    context: int = 1024
    stride: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and of what.

    Attributes:
        model, reference: as they were named.
        text: what they read; None if nothing.
        loading: how the model was loaded; the reference with the same dtype and device.
        scores: the figures of the text, or None.
        gemms: what an audit of the model's FP8 GEMMs saw, if there was to be one; without what an interrupted
            evaluation had measured before.
        tasks: the figures of tasks.
        version: of blockscale.
    """

    model: str
    reference: str | None
    text: Text | None
    loading: dict[str, Any]
    scores: Scores | None
    gemms: tuple[GemmRecord, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    version: str = __version__


@dataclass(frozen=True)
class _Reading:
    """A text as both models see it: int64 (T,) tokens, and windows of them."""

    text: Text
    tokens: torch.Tensor
    windows: Sequence[Window] = ()


def evaluate(
    model: str,
    *what: Text | Tasks,
    reference: str | None = None,
    loading: Loading | None = None,
    quantized_reference: bool = False,
    debug_gemm: bool = False,
    out: Path | None = None,
    on_window: Callable[[WindowScore, int], None] = lambda score, windows: None,
    on_question: Callable[[int], None] = lambda questions: None,
) -> Evaluation:
    """Perplexity of a model on a text and its answers to tasks, and how far both are from a reference's.

    Args:
        model: checkpoint folder, Hub repository or fsspec URL.
        what: a text that it reads, tasks that it answers, or one of each.
        reference: another one, usually the checkpoint that the model was made from.
        loading: how the model is loaded.
        quantized_reference: the reference may be quantized itself.
        debug_gemm: audit the model's FP8 GEMMs (`ops.audit_gemms`); several times slower.
        out: where the result goes as JSON; an interrupted evaluation goes on from what is beside it.
        on_window: is told every score, and how many windows there are.
        on_question: is told, after each, how many questions there are, twice as many with a reference.

    Raises:
        BlockscaleError: a model, text, task or option that cannot be used; models or tokenizers that do not
            fit together; logits with NaN or Inf.
    """
    loading = (loading or Loading()).resolved()
    if reference is not None and not quantized_reference and is_quantized(open_source(reference)):
        raise BlockscaleError(
            "the reference is quantized itself",
            where=reference,
            remedy="name the checkpoint it was made from, or allow it with --quantized-reference",
        )
    texts = [each for each in what if isinstance(each, Text)]
    tasks = [each for each in what if isinstance(each, Tasks)]
    if not what or len(texts) > 1 or len(tasks) > 1:
        got = f"{len(texts)} and {len(tasks)}"
        raise BlockscaleError("a model reads one text, or answers to one `Tasks`, or both", got=got)
    questions = open_questions(tasks[0]) if tasks else []
    reading = _read(model, reference, texts[0], loading) if texts else None
    models = _Models(model, reference, loading)
    partial = Partial(out, _request(models, reading, questions))
    unscored = reading is not None and len(partial.scores) < len(reading.windows)
    unanswered = any(("model", each.name) not in partial.answered for each in questions)
    names = models.subject("model").gemm_names() if unscored or unanswered else {}
    with ops.audit_gemms(names=names) if debug_gemm else nullcontext() as audit:
        if reading is not None:
            _read_windows(models, reading, partial, on_window)
        _ask(models, questions, partial, on_question)
    result = Evaluation(
        model,
        reference,
        None if reading is None else reading.text,
        loading.spelled(),
        None if reading is None else summarize(partial.scores),
        () if audit is None else audit.records,
        task_scores(questions, partial.answers),
    )
    partial.finish(to_json(result))
    return result


class _Models:
    """The model and its reference, each loaded when it is first needed."""

    def __init__(self, model: str, reference: str | None, loading: Loading) -> None:
        self.batch_size = loading.batch_size
        self.named: dict[Who, tuple[str, Loading]] = {"model": (model, loading)}
        if reference is not None:
            self.named["reference"] = reference, loading.plain()
        self._loaded: dict[Who, Subject] = {}

    def subject(self, who: Who) -> Subject:
        if who not in self._loaded:
            self._loaded[who] = open_subject(*self.named[who])
        return self._loaded[who]


def _read(model: str, reference: str | None, text: Text, loading: Loading) -> _Reading:
    tokenizer = Tokenizer(model, loading.revision)
    other = None if reference is None else Tokenizer(reference)
    tokens = token_ids(read_text(text.data), tokenizer, other, text.tokens)
    stride = text.context if text.stride is None else text.stride
    windows = spread(cut(tokens, text.context, stride), text.limit)
    return _Reading(replace(text, stride=stride), tokens, windows)


def _read_windows(
    models: _Models, reading: _Reading, partial: Partial, on_window: Callable[[WindowScore, int], None]
) -> None:
    known, left = list(partial.scores), reading.windows[len(partial.scores) :]
    new: Iterable[WindowScore] = ()
    if left:
        other = models.subject("reference") if "reference" in models.named else None
        scored = score_windows(models.subject("model"), other, reading.tokens, left, models.batch_size)
        new = map(partial.keep, scored)
    for score in chain(known, new):
        on_window(score, len(reading.windows))


def _ask(
    models: _Models, questions: Sequence[Questions], partial: Partial, on_question: Callable[[int], None]
) -> None:
    if not questions:
        return
    from blockscale.evaluate.tasks.adapter import SubjectLM

    tokenizers = {
        who: load_tokenizer(spec, loading.revision) for who, (spec, loading) in models.named.items()
    }
    total = len(tokenizers) * sum(len(each.numbers) for each in questions)
    for who, tokenizer in tokenizers.items():
        lm = None
        for each in questions:
            if (who, each.name) in partial.answered:
                for _ in each.numbers:
                    on_question(total)
                continue
            lm = lm or SubjectLM(models.subject(who), tokenizer, models.batch_size)
            partial.keep(answer(each, lm, who, lambda: on_question(total)))


def _request(models: _Models, reading: _Reading | None, questions: Sequence[Questions]) -> dict[str, Any]:
    """All that scores depend on."""
    text = reading and reading.text
    files = {who: _fingerprint(spec, loading.revision) for who, (spec, loading) in models.named.items()}
    return {
        "model": files["model"],
        "reference": files.get("reference"),
        "tokens": reading and hashlib.sha256(reading.tokens.numpy().tobytes()).hexdigest(),
        "context": text and text.context,
        "stride": text and text.stride,
        "limit": text and text.limit,
        "tasks": {each.name: [each.shots, len(each.numbers), each.digest()] for each in questions},
        "loading": models.named["model"][1].spelled(),
        "version": __version__,
    }


def _fingerprint(spec: str, revision: str | None) -> dict[str, Any]:
    """What changes when a checkpoint does."""
    source = open_source(spec, revision)
    names = [name for name in source.files() if name.endswith((".safetensors", ".json"))]
    return {"root": source.root, "files": {name: source.fingerprint(name) for name in names}}
