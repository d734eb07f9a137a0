"""The benchmark of training, in small: what it compares, and what it counts as won back."""

import importlib
import json
from pathlib import Path

import pytest

jobs = pytest.importorskip("tests.qat.jobs")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("bench_training")


def perplexity(own, reference):
    return {"perplexity": {"value": own}, "against": {"perplexity": {"value": reference}}}


def test_what_is_won_back_is_told_after_training_and_before_any(bench):
    figures = {
        "plain": {"texts": {"val": perplexity(44.0, 40.0)}},
        "source plain": {"texts": {"val": perplexity(43.0, 42.0)}},
        "case": {"texts": {"val": perplexity(41.0, 40.0)}},
    }
    assert bench.share(figures, "case") == {"val": {"bf16": 0.75, "source": 2.0}}


@pytest.mark.slow
def test_all_that_is_compared_has_a_line(bench, tmp_path):
    jobs.make_source(tmp_path / "source")
    text, results = jobs.make_text(tmp_path / "text.txt", 6000), tmp_path / "results.jsonl"
    recipe = tmp_path / "int3.json"
    recipe.write_text(json.dumps({"layout": "blockscale", "precision": {"default": "int3:g64"}}))
    cases = [
        "dynamic",
        "learned:lr=2e-3,initial=calibrated,distill=source",
        "dynamic:distill=bf16",
        "bf16:lr=2e-3",
    ]
    small = "--steps 3 --batch 2 --context 16 --checks 2 --windows 2 --calibration-tokens 1024 --device cpu"
    named = ["--model", f"small={tmp_path / 'source'}", "--recipe", str(recipe), "--results", str(results)]
    texts = ["--data", str(text), "--val", str(text), "--calibrate", str(text)]
    bench.main([*named, *texts, "--cases", *cases, *small.split()])
    lines = {each["case"]: each for each in map(json.loads, results.read_text().splitlines())}
    assert lines.keys() == {"bf16", *cases, "plain", "calibrated", "source plain"}
    begun = lines[cases[1]]["training"]
    assert begun["options"]["initial"] == "initial"
    assert begun["options"]["distill"] == "source"
    assert len(begun["checks"]) == 4
    assert lines[cases[2]]["training"]["options"]["distill"] == "bf16"
    assert lines["dynamic"]["recovered"]["val"].keys() == {"bf16", "source"}
    assert not lines["bf16"]["recovered"]
    assert lines["bf16:lr=2e-3"]["training"]["options"]["lr"] == 2e-3
    assert not lines["bf16:lr=2e-3"]["figures"]
    assert not lines["source plain"]["recovered"]
