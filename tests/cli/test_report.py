"""`--report` of the commands: a page is written, and what would keep it from that is said before the work."""

import sys

import pytest

from blockscale.checkpoint.convert import quantize_checkpoint
from tests import data
from tests.evaluate.models import WORDS, save_tokenizer
from tests.model import models

pytest.importorskip("plotly")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli_report")
    models.make(folder / "plain", initializer_range=0.05)
    save_tokenizer(folder / "plain")
    quantize_checkpoint(folder / "plain", folder / "fp8")
    (folder / "text.txt").write_text(WORDS)
    return folder


def title(path):
    return path.read_text(encoding="utf-8").partition("<title>")[2].partition("</title>")[0]


def test_quantize_writes_a_report(blockscale, tmp_path):
    data.write(tmp_path / "source", data.llama())
    page = tmp_path / "report.html"
    assert blockscale("quantize", tmp_path / "source", tmp_path / "fp8", "--report", page)[0] == 0
    assert title(page) == f"Quantized: {tmp_path / 'fp8'}"
    # A second run finds nothing to do, and its report says the same sizes.
    page.unlink()
    assert blockscale("quantize", tmp_path / "source", tmp_path / "fp8", "--report", page)[0] == 0
    assert "Sizes by role and format" in page.read_text(encoding="utf-8")


def test_evaluate_writes_a_report_with_every_window(blockscale, folder, tmp_path):
    page = tmp_path / "report.html"
    options = (
        "--data",
        folder / "text.txt",
        "--context",
        64,
        "--limit",
        3,
        "--device",
        "cpu",
    )
    command = ("evaluate", folder / "fp8", "--against", folder / "plain", *options, "--report", page)
    assert blockscale(*command)[0] == 0
    source = page.read_text(encoding="utf-8")
    assert title(page).startswith("Evaluated: ")
    assert "Windows, per token (3 rows)" in source


def test_diagnose_writes_a_report(blockscale, folder, tmp_path):
    page = tmp_path / "report.html"
    assert blockscale("diagnose", folder / "fp8", "--against", folder / "plain", "--report", page)[0] == 0
    source = page.read_text(encoding="utf-8")
    for heading in ("Faults", "Errors by layer", "Outliers", "Worst tensors", "Sizes", "Recipe", "Files"):
        assert f"<h2>{heading}</h2>" in source


def commands(folder):
    yield "quantize", folder / "plain", folder / "new"
    yield "evaluate", folder / "fp8", "--data", folder / "text.txt"
    yield "diagnose", folder / "fp8", "--against", folder / "plain"


@pytest.mark.parametrize("number", range(3))
def test_nothing_is_done_where_no_report_can_be_written(blockscale, folder, tmp_path, monkeypatch, number):
    command = list(commands(folder))[number]
    for page, said in ((tmp_path, "is a folder"), (tmp_path / "none" / "r.html", "no such folder")):
        code, out, err = blockscale(*command, "--report", page)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
    monkeypatch.setitem(sys.modules, "plotly", None)
    code, out, err = blockscale(*command, "--report", tmp_path / "report.html")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "blockscale[report]" in err
    assert not (folder / "new").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_has_no_report(blockscale, folder, tmp_path):
    command = (
        "quantize",
        folder / "plain",
        folder / "new",
        "--dry-run",
        "--report",
        tmp_path / "report.html",
    )
    code, out, err = blockscale(*command)
    assert (code, out) == (2, "")
    assert "dry run" in err
