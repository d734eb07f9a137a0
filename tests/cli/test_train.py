"""`blockscale train`: what it prints, writes and refuses."""

import json

import pytest

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.cli.train import _print as show
from blockscale.qat import Check, Step, TrainingResult
from blockscale.qat.history import MORE_THAN_ALL
from blockscale.report.training import summary
from tests import data

jobs = pytest.importorskip("tests.qat.jobs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli_train")
    jobs.make_source(folder / "source")
    jobs.make_text(folder / "text.txt")
    (folder / "int3.json").write_text(
        json.dumps({"layout": "blockscale", "precision": {"default": "int3:g64"}})
    )
    return folder


def command(folder, out, *more, recipe="int3.json"):
    small = ("--max-steps", 4, "--batch", 2, "--context", 16, "--lr", 1e-3, "--device", "cpu")
    recipe = folder / recipe if recipe.endswith(".json") else recipe
    return ("train", folder / "source", folder / "text.txt", "--recipe", recipe, "--out", out, *small, *more)


def test_it_prints_perplexities_and_writes_a_report(blockscale, folder, tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "report.html"
    checks = ("--eval-data", folder / "text.txt", "--eval-windows", 2, "--eval-every", 2)
    code, out, err = blockscale(*command(folder, tmp_path / "out", *checks, "--report", page))
    assert code == 0, err
    assert out.startswith("4 steps in ")
    assert all(word in out for word in ("rounded before training", "trained", f"{tmp_path / 'out'}: written"))
    assert [line.split(":")[0] for line in err.splitlines() if "perplexity" in line] == [
        f"step {step}" for step in (0, 2, 4)
    ]
    source = page.read_text(encoding="utf-8")
    assert f"<title>Trained: {tmp_path / 'out'}</title>" in source
    assert all(f">{title}<" in source for title in ("Loss", "Perplexity", "Gradient and rate"))
    assert blockscale("verify", tmp_path / "out")[0] == 0
    assert blockscale("inspect", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("nll", "printed", "reported"),
    [
        (3.25, "83% of the gap is closed", ("83 %", "between the source and plain rounding")),
        (2.5, MORE_THAN_ALL, ("100 %", MORE_THAN_ALL)),
    ],
)
def test_a_share_of_the_gap_is_told_only_up_to_all_of_it(nll, printed, reported, capsys):
    asked = {"model": "source", "recipe": {}, "distill": None}
    steps = (Step(1, 3.0, 1e-3, 1.0, 0.5),)
    checks = (Check(0, 4.0, 0.1), Check(1, nll, 0.1))
    result = TrainingResult(asked, "out", steps, checks, Check(0, 3.0, 0.1), 1.0)
    show(result)
    assert capsys.readouterr().out.splitlines()[-2].strip() == printed
    name, *rest = summary(result).entries[-1]
    assert (name, tuple(rest)) == ("of the gap closed", reported)


def test_it_prints_one_json_object(blockscale, folder, tmp_path):
    code, out, err = blockscale(*command(folder, tmp_path / "out", "--json", "--scales", "learned"))
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert [each["step"] for each in told["steps"]] == [1, 2, 3, 4]
    assert told["training"]["qat"]["scales"] == "learned"
    assert told["reference"] is None


def test_without_a_recipe_the_result_is_not_quantized(blockscale, folder, tmp_path):
    code, out, _ = blockscale(*command(folder, tmp_path / "out", recipe="none"))
    assert code == 0
    assert "quantization_config" not in data.read_config(tmp_path / "out")
    assert "gap" not in out


def test_the_destination_has_a_name_of_its_own_by_default(blockscale, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [part for part in command(folder, None) if part not in ("--out", None)]
    assert blockscale(*asked)[0] == 0
    assert (tmp_path / "source-int3" / "config.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lr", "-1"), "lr: out of range"),
        (("--recipe", "nothing.json"), "cannot be read"),
        (("--freeze", "model.layers.1.*"), "are frozen"),
        (("--freeze", "modle.*"), "pattern matches no tensor"),
        (("--include", "modle.*"), "pattern matches no tensor"),
        (("--resume",), "there is nothing to resume"),
        (("--compute", "fp8"), "FP8 products need a GPU"),
        (("--report", "no/such/folder.html"), "no such folder"),
        (("--micro-batch", 3), "micro_batch"),
    ],
)
def test_what_cannot_be_done_is_one_line(blockscale, folder, tmp_path, more, message):
    code, out, err = blockscale(*command(folder, tmp_path / "out", *more))
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_refused(blockscale, folder, tmp_path):
    quantize_checkpoint(folder / "source", tmp_path / "fp8")
    asked = [
        tmp_path / "fp8" if part == folder / "source" else part for part in command(folder, tmp_path / "out")
    ]
    code, _, err = blockscale(*asked)
    assert code == 2
    assert "is quantized already" in err
