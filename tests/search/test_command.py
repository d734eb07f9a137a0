"""`blockscale search` as it is called."""

import json

import pytest

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.checkpoint.recipe import read_recipe
from tests.report.parsed import Parsed


def options(folder, *more):
    return ("search", folder, "--prompts", folder.parent / "text.txt", *more, "--device", "cpu")


SHORT = ("--tokens", 64, "--context", 32)


def test_prints_what_was_found_and_writes_the_recipe(blockscale, llama, tmp_path):
    recipe = tmp_path / "recipe.json"
    more = ("--target-size", "0.8x", *SHORT, "--measure", "--recipe-out", recipe)
    code, out, _ = blockscale(*options(llama, *more))
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "2 sequences of 32 tokens"
    starts = ("chosen: ", "predicted KL ", "measured KL ", "same likeliest ", "trade-off: ")
    for line, start in zip(lines[1:], starts, strict=False):
        assert line.startswith(start)
    assert json.loads(lines[-1].removeprefix("recipe: ")) == json.loads(recipe.read_text())
    assert read_recipe(recipe).precision.entries
    code, out, _ = blockscale("quantize", llama, tmp_path / "made", "--recipe", recipe, "--device", "cpu")
    assert code == 0


def test_writes_a_report(blockscale, llama, tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "search.html"
    more = ("--target-size", "0.8x", *SHORT, "--measure", "--report", page, "--json")
    code, out, _ = blockscale(*options(llama, *more))
    assert code == 0
    result = json.loads(out)
    found = Parsed(page.read_text(encoding="utf-8"))
    assert found.headings[1:] == ["Pareto curve", "Sensitivity", "Formats", "Recipe", "Versions"]
    assert json.loads(found.code[0]) == result["recipe"]
    assert sorted(row[0] for row in found.table("unit", "format")) == sorted(
        unit["name"] for unit in result["units"]
    )
    (ranking,) = found.traces("bar")
    costs = sorted((cost["kl"] for unit in result["units"] for cost in unit["costs"]), reverse=True)
    assert ranking["x"] == costs
    chosen = [trace for trace in found.traces("scatter") if trace["name"] == "chosen"]
    assert chosen[0]["x"] == [result["chosen"]["nbytes"] / 1e6]
    assert f"{result['measured']['kl']['value']:.5f}" in found.source


def test_a_report_that_cannot_be_written_is_refused_at_once(blockscale, llama, tmp_path):
    page = tmp_path / "no" / "folder.html"
    code, _, err = blockscale(*options(llama, "--target-size", "0.8x", *SHORT, "--report", page))
    assert code == 2
    assert "no such folder" in err


def test_as_json(blockscale, llama):
    code, out, err = blockscale(*options(llama, "--target-size", "0.9x", *SHORT, "--json"))
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["chosen"]["nbytes"] <= result["target_bytes"]
    assert result["measured"] is None
    assert {"label", "nbytes", "predicted_kl", "measured_kl", "top1"} == result["points"][0].keys()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--target-size", "0.2x", *SHORT), "no assignment of these formats is that small"),
        (("--target-size", "half", *SHORT), "bad size"),
        (("--target-size", "0.8x", "--tokens", 4096, "--context", 4096), "not enough text"),
        (SHORT, "nothing is asked of the result"),
        (("--target-size", "0.8x", "--formats", "fp8,fp8:64x64", *SHORT), "one block size"),
        (("--target-size", "0.8x", "--recipe-out", "no/such/folder/r.json", *SHORT), "no such folder"),
        (("--target-size", "0.8x", "--max-kl", "1e-9", *SHORT), "max-kl: is not met"),
    ],
)
def test_what_cannot_be_is_one_line(blockscale, llama, more, said):
    code, out, err = blockscale(*options(llama, *more))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_quantized_model_is_refused_in_one_line(blockscale, llama, tmp_path):
    quantize_checkpoint(llama, tmp_path / "made")
    more = ("--prompts", llama.parent / "text.txt", "--target-size", "0.8x")
    code, _, err = blockscale("search", tmp_path / "made", *more)
    assert code == 2
    assert "already quantized" in err
    assert err.count("\n") == 1
