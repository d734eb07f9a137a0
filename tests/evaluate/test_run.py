"""An evaluation from names: what is read, what is refused, and how it goes on after an interruption."""

import bz2
import json
import lzma
import sys
from types import SimpleNamespace

import pytest
import torch

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.errors import BlockscaleError
from blockscale.evaluate import run
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.run import Text
from blockscale.evaluate.subjects import open_subject
from blockscale.evaluate.text import read_text
from blockscale.model.text import Tokenizer
from tests.evaluate.models import WORDS, save_tokenizer
from tests.model import models


def evaluate(model, text, **options):
    return run.evaluate(model, text, **options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(a model, the same in FP8, a text)"""
    folder = tmp_path_factory.mktemp("evaluate")
    plain, fp8, text = folder / "plain", folder / "fp8", folder / "text.txt"
    models.make(plain, initializer_range=0.05)
    save_tokenizer(plain)
    quantize_checkpoint(plain, fp8)
    text.write_text(WORDS)
    return plain, fp8, text


@pytest.fixture
def setting(checkpoints):
    plain, fp8, text = checkpoints
    loading = Loading(device="cpu", dtype=torch.float32)
    return {
        "model": str(fp8),
        "text": Text(str(text), context=64, stride=64),
        "reference": str(plain),
        "loading": loading,
    }


def test_fp8_is_near_its_source_and_not_at_it(setting):
    result = evaluate(**setting)
    assert result.scores.tokens == 400 - 7
    against = result.scores.against
    assert 0 < against.kl.value < 0.1
    assert 0.9 < against.ratio.value < 1.1
    alone = evaluate(**setting | {"reference": None})
    assert alone.scores.perplexity == result.scores.perplexity
    assert alone.scores.against is None


def test_activations_as_they_are_lose_less(setting):
    high = Loading(device="cpu", dtype=torch.float32, compute="high")
    low = evaluate(**setting).scores.against.kl.value
    assert 0 < evaluate(**setting | {"loading": high}).scores.against.kl.value < low


def test_an_interrupted_evaluation_goes_on(setting, tmp_path, monkeypatch):
    whole, out = evaluate(**setting), tmp_path / "result.json"
    seen = []

    def interrupt(score, windows):
        seen.append(score.begin)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(**setting, out=out, on_window=interrupt)
    assert not out.exists()
    part = tmp_path / "result.json.part"
    part.write_text(part.read_text() + '{"begin": 19')  # cut off in the middle of a line
    scored = []
    real = run.score_windows
    monkeypatch.setattr(
        run, "score_windows", lambda *rest: (scored.append(score.begin) or score for score in real(*rest))
    )
    result = evaluate(**setting, out=out)
    assert scored == [192, 256, 320, 384]
    assert result.scores == whole.scores
    assert json.loads(out.read_text())["scores"]["tokens"] == 400 - 7
    assert not part.exists()
    with pytest.raises(BlockscaleError, match="a result is there already"):
        evaluate(**setting, out=out)


def test_scores_of_something_else_are_not_gone_on_with(setting, tmp_path):
    def interrupt(score, windows):
        raise KeyboardInterrupt

    out = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(**setting, out=out, on_window=interrupt)
    other = setting | {"text": Text(setting["text"].data, context=32, stride=32)}
    with pytest.raises(BlockscaleError, match=r"something else.*got other context, stride"):
        evaluate(**other, out=out)


def test_a_quantized_reference_is_refused_unless_allowed(setting):
    fp8 = setting | {"reference": setting["model"]}
    with pytest.raises(BlockscaleError, match="the reference is quantized itself"):
        evaluate(**fp8)
    assert evaluate(**fp8, quantized_reference=True).scores.against.ratio.value == pytest.approx(1, abs=0.05)


def test_other_tokens_of_a_text_are_refused(setting, checkpoints, tmp_path):
    other = tmp_path / "other"
    models.make(other)
    save_tokenizer(other, shift=1)
    with pytest.raises(BlockscaleError, match="tokenizers differ"):
        evaluate(**setting | {"reference": str(other)})


def test_a_text_is_read_once_by_tokenizers_that_are_known_to_be_the_same(setting, tmp_path, monkeypatch):
    save_tokenizer(tmp_path / "other", shift=1)
    mine, same, other = (
        Tokenizer(each) for each in (setting["model"], setting["reference"], tmp_path / "other")
    )
    assert mine.is_known_as(same)
    assert not mine.is_known_as(other)
    calls, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: calls.append(text) or encode(self, text))
    evaluate(**setting)
    assert len(calls) == 1


def test_a_model_of_another_runtime_is_refused(setting, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_tokenizer(tmp_path)
    loading = Loading("blockscale", "cpu")
    with pytest.raises(BlockscaleError, match=r"not an architecture of this runtime.*got llama"):
        evaluate(**setting | {"model": str(tmp_path), "reference": None, "loading": loading})


def test_texts_are_unpacked(tmp_path):
    for name, opener in (("a.txt", open), ("a.txt.xz", lzma.open), ("a.txt.bz2", bz2.open)):
        with opener(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write("Grüße")
        assert read_text(str(tmp_path / name)) == "Grüße"


@pytest.mark.parametrize(("name", "content"), [("none.txt", None), ("b.txt", b"\xff"), ("c.xz", b"no")])
def test_what_is_no_text_is_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BlockscaleError, match="cannot be read as text"):
        read_text(str(tmp_path / name))


def test_wikitext_is_that_of_the_hub(monkeypatch):
    asked = []
    lines = {"text": ["= Title =", "", "A line."]}
    package = SimpleNamespace(load_dataset=lambda *names, split: asked.append((*names, split)) or lines)
    monkeypatch.setitem(sys.modules, "datasets", package)
    assert read_text("wikitext2") == "= Title =\n\n\n\nA line."
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BlockscaleError, match="needs the package datasets"):
        read_text("wikitext2")


def test_one_window_has_no_interval_and_the_result_is_json_all_the_same(setting, tmp_path):
    out = tmp_path / "result.json"
    evaluate(**setting | {"text": Text(setting["text"].data, context=64, limit=1)}, out=out)

    def refuse(constant):
        raise AssertionError(constant)

    result = json.loads(out.read_text(), parse_constant=refuse)
    assert result["scores"]["perplexity"]["low"] is None
    assert result["scores"]["perplexity"]["value"] > 0


def test_the_result_says_how_the_model_was_run(setting):
    loading = Loading(device="cpu", compute=None)
    result = evaluate(**setting | {"loading": loading, "reference": None})
    assert result.loading["dtype"] == "torch.float32"
    assert result.loading["compute"] == "high"  # no FP8 arithmetic here


def test_a_url_is_not_given_to_transformers(checkpoints):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/evaluate/config.json", b'{"model_type": "llama"}')
    with pytest.raises(BlockscaleError, match="transformers reads no URLs"):
        open_subject("memory://evaluate", Loading(device="cpu"))
