"""An evaluation from names to figures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from blockscale import ops
from blockscale.checkpoint.precision import AS_STORED
from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError
from blockscale.evaluate.compare import Scores, WindowScore, score_windows, summarize
from blockscale.evaluate.session import Partial, to_json
from blockscale.evaluate.subjects import Loading, is_quantized, open_subject
from blockscale.evaluate.text import read_text, token_ids
from blockscale.evaluate.windows import cut, spread
from blockscale.model.text import Tokenizer
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
        text: what they read.
        loading: how the model was loaded; the reference with the same dtype and device.
        scores: the figures.
        gemms: what an audit of the model's FP8 GEMMs saw, if there was to be one; without windows that an
            interrupted evaluation had scored before.
        version: of blockscale.
    """

    model: str
    reference: str | None
    text: Text
    loading: dict[str, Any]
    scores: Scores
    gemms: tuple[GemmRecord, ...] = ()
    version: str = __version__


def evaluate(
    model: str,
    text: Text,
    *,
    reference: str | None = None,
    loading: Loading | None = None,
    quantized_reference: bool = False,
    debug_gemm: bool = False,
    out: Path | None = None,
    on_window: Callable[[WindowScore, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a model on a text, and how far it is from a reference on the same tokens.

    Args:
        model: checkpoint folder, Hub repository or fsspec URL.
        text: what it reads.
        reference: another one, usually the checkpoint that the model was made from.
        loading: how the model is loaded.
        quantized_reference: the reference may be quantized itself.
        debug_gemm: audit the model's FP8 GEMMs (`ops.audit_gemms`); several times slower.
        out: where the result goes as JSON; an interrupted evaluation goes on from what is beside it.
        on_window: is told every score, and how many windows there are.

    Raises:
        BlockscaleError: a model, text or option that cannot be used; models or tokenizers that do not fit
            together; logits with NaN or Inf.
    """
    loading = (loading or Loading()).resolved()
    if reference is not None and not quantized_reference and is_quantized(open_source(reference)):
        raise BlockscaleError(
            "the reference is quantized itself",
            where=reference,
            remedy="name the checkpoint it was made from, or allow it with --quantized-reference",
        )
    tokenizer = Tokenizer(model, loading.revision)
    other = None if reference is None else Tokenizer(reference)
    tokens = token_ids(read_text(text.data), tokenizer, other, text.tokens)
    stride = text.context if text.stride is None else text.stride
    windows = spread(cut(tokens, text.context, stride), text.limit)
    settings = {**asdict(loading), "dtype": str(loading.dtype), "precision": list(loading.precision.entries)}
    request = {
        "model": _fingerprint(model, loading.revision),
        "reference": None if reference is None else _fingerprint(reference, None),
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "context": text.context,
        "stride": stride,
        "limit": text.limit,
        "loading": settings,
        "version": __version__,
    }
    partial = None if out is None else Partial(out, request)
    known = () if partial is None else partial.scores
    scores: Iterator[WindowScore] = iter(known)
    names: dict[torch.Tensor, str] = {}
    if len(known) < len(windows):
        subject = open_subject(model, loading)
        names = subject.gemm_names()
        plain = replace(loading, precision=AS_STORED, revision=None)
        against = None if reference is None else open_subject(reference, plain)
        new = score_windows(subject, against, tokens, windows[len(known) :], loading.batch_size)
        scores = chain(known, new if partial is None else partial.extend(new))
    done = []
    with ops.audit_gemms(names=names) if debug_gemm else nullcontext() as audit:
        for score in scores:
            done.append(score)
            if on_window is not None:
                on_window(score, len(windows))
    gemms = () if audit is None else audit.records
    result = Evaluation(model, reference, replace(text, stride=stride), settings, summarize(done), gemms)
    if partial is not None:
        partial.finish(to_json(result))
    return result


def _fingerprint(spec: str, revision: str | None) -> dict[str, Any]:
    """What changes when a checkpoint does."""
    source = open_source(spec, revision)
    names = [name for name in source.files() if name.endswith((".safetensors", ".json"))]
    return {"root": source.root, "files": {name: source.fingerprint(name) for name in names}}
