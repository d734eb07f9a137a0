"""The pictures of the benchmark of training: the latest run of each model, curves, a file with a picture."""

import json
import math
from pathlib import Path

import pytest

from blockscale.testing.bench import load_module

pytest.importorskip("matplotlib")
plot = load_module(Path(__file__).parent.parent / "benchmarks" / "plot_training.py")


def _record(case, date, perplexities=None, ratio=None, **settings):
    training = perplexities and {
        "checks": [{"step": step, "nll": math.log(each)} for step, each in perplexities.items()],
        "reference": {"nll": math.log(40.0)},
    }
    against = ratio and {"ratio": {"value": ratio, "low": ratio - 0.01, "high": ratio + 0.01}}
    return {
        "benchmark": "training", "model": "Small", "case": case, "date": date, "machine": {"gpu": "H200"},
        "recipe": "w4a8", "steps": 10, "batch": 2, "context": 16, "lr": 1e-4, "data": "train.txt",
        "training": training or False, "figures": against and {"texts": {"val": {"against": against}}},
    } | settings  # fmt: skip


RUN = [
    _record("bf16", "2026-12-02T10", {0: 40.0, 10: 20.0}),
    _record("plain", "2026-12-02T11", ratio=1.2),
    _record("learned:lr=2e-4,initial=calibrated", "2026-12-02T12", {0: 44.0, 10: 21.0}, ratio=1.04),
    _record("bf16:lr=2e-4", "2026-12-02T10", {0: 40.0, 10: 22.0}),
    _record("calibrated", "2026-12-02T13", ratio=1.1),
]


def _write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_latest_run_of_each_model_and_recipe_is_drawn(tmp_path):
    records = [
        _record("dynamic", "2026-12-01", {0: 1.0}, steps=5),
        _record("bf16", "2026-12-01", {0: 9.0}),
        *RUN,
        _record("bf16", "2026-12-01", {0: 2.0}, model="Other"),
        _record("bf16", "2026-12-04", {0: 3.0}, recipe="int4"),
        {"benchmark": "another", "date": "2026-12-03"},
    ]
    runs = plot.latest(_write(tmp_path / "training.jsonl", records))
    assert runs.keys() == {("Small", "w4a8"), ("Other", "w4a8"), ("Small", "int4")}
    assert runs["Small", "w4a8"] == {each["case"]: each for each in RUN}


def test_no_record_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no record of a training"):
        plot.latest(_write(tmp_path / "training.jsonl", []))


def test_curves_are_compared_at_equal_steps():
    base = plot.perplexities(RUN[0])
    assert base == {0: pytest.approx(40.0), 10: pytest.approx(20.0)}
    assert plot.above({0: 44.0, 5: 1.0, 10: 21.0}, base) == {0: pytest.approx(10.0), 10: pytest.approx(5.0)}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("bf16", "no rounding"),
        ("dynamic", "dynamic scales"),
        ("learned:lr=2e-4,initial=calibrated", "learned scales, lr 2e-4, from calibrated codes"),
        ("dynamic:distill=source", "dynamic scales, distilled from source"),
    ],
)
def test_cases_are_spelled_out(case, words):
    assert plot.spelled(case) == words


def test_a_picture_is_drawn(tmp_path):
    path = tmp_path / "images" / "training.png"
    plot.draw(path, "Small", {each["case"]: each for each in RUN})
    assert path.read_bytes().startswith(b"\x89PNG")
