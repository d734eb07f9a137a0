"""The benchmark of training steps: every competitor is checked, timed and recorded; wrong steps end it."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
QAT = ["fp8", "int4", "int4 learned"]


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("bench_qat")


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors this small the others are only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_step_is_checked_timed_and_recorded(bench, tmp_path, capsys):
    bench.main(["--small", "--rounds", "1", "--out", str(tmp_path / "qat.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "qat.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == ["llama", "deepseek"]
    products = ["fp8 products"] if torch.cuda.is_available() else []
    for line, named in zip(lines, (QAT, ["fp8", "w4a8", *QAT[1:]]), strict=True):
        kinds = ["launched", "replayed"] if torch.cuda.is_available() else ["launched"]
        assert [kind for kind in ("launched", "replayed") if kind in line] == kinds
        for kind in kinds:
            assert list(line[kind]["milliseconds"]) == ["autocast", "bf16", *named, *products]
            assert line[kind]["ratio"]["autocast"] == 1.0
        assert list(line["errors"]) == [*named, *products]
        assert all(0 < each["gradients"] < 0.2 for each in line["errors"].values())
        assert line["commit"]
    assert "autocast" in capsys.readouterr().out


def test_a_step_that_is_not_the_one_in_float32_is_not_timed(bench, monkeypatch):
    shape, device = bench.shapes(True)["llama"], torch.device("cpu")
    ways = bench.competitors("llama", device)
    assert bench.check(shape, "int4", ways["int4"], device)["gradients"] < 0.1
    prepared = bench.prepared
    monkeypatch.setattr(bench, "prepared", lambda base, _: prepared(base, ways["fp8"]))
    with pytest.raises(SystemExit, match="int4 is not the step in float32"):
        bench.check(shape, "int4", ways["int4"], device)
