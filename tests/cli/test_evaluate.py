"""`blockscale evaluate` and `blockscale diagnose` on small checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from tests.evaluate import task_files
from tests.evaluate.models import WORDS, save_byte_tokenizer, save_tokenizer
from tests.model import models

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli_evaluate")
    models.make(folder / "plain", initializer_range=0.05)
    save_tokenizer(folder / "plain")
    quantize_checkpoint(folder / "plain", folder / "fp8")
    (folder / "text.txt").write_text(WORDS)
    return folder


def test_evaluate_prints_figures_with_intervals(blockscale, folder):
    options = ("--data", folder / "text.txt", "--context", 64, "--limit", 4, "--device", "cpu")
    code, out, _ = blockscale("evaluate", folder / "fp8", "--against", folder / "plain", *options)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"252 tokens of {folder / 'text.txt'} in 4 windows of 64, a new one every 64"
    names = ["perplexity", "", "ratio", "KL divergence", "same likeliest"]
    assert [line[:20].strip() for line in lines[1:6]] == names
    assert all(" [" in line for line in lines[1:6])


def test_evaluate_as_json_and_to_a_file(blockscale, folder, tmp_path):
    options = ("--data", folder / "text.txt", "--context", 64, "--device", "cpu", "--tokens", 130)
    code, out, err = blockscale(
        "evaluate", folder / "plain", *options, "--json", "--out", tmp_path / "r.json"
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert (result["scores"]["windows"], result["scores"]["against"]) == (3, None)


def test_evaluate_says_in_a_line_what_cannot_be(blockscale, folder):
    code, out, err = blockscale("evaluate", folder / "plain", "--data", folder / "none.txt")
    assert (code, out) == (2, "")
    assert "cannot be read as text" in err
    assert err.count("\n") == 1


def test_diagnose_ranks_tensors_and_writes_a_recipe(blockscale, folder, tmp_path):
    recipe = tmp_path / "recipe.json"
    options = ("--prompts", folder / "text.txt", "--tokens", 64, "--context", 32, "--recipe", recipe)
    code, out, _ = blockscale("diagnose", folder / "fp8", "--against", folder / "plain", *options)
    assert code == 0
    titles, *lines = out.splitlines()
    assert titles.split("  ")[0].strip() == "KL nats"
    costs = [float(line.split()[0]) for line in lines if not line.startswith("a recipe")]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 0
    assert json.loads(recipe.read_text())["exclude"]


def test_diagnose_names_a_fault_and_exits_with_1(blockscale, folder, tmp_path):
    quantize_checkpoint(folder / "plain", tmp_path / "fp8")
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    tensors = load_file(file)
    scale = tensors[f"{DOWN}_scale_inv"]
    tensors[f"{DOWN}_scale_inv"] = torch.exp2(scale.log2().ceil())
    save_file(tensors, file)
    code, out, _ = blockscale("diagnose", tmp_path / "fp8", "--against", folder / "plain")
    assert code == 1
    assert out.splitlines()[1].endswith(DOWN)
    assert f"fault: {DOWN}: scale" in out


def test_debug_gemm_shows_where_precision_goes(blockscale, folder):
    options = (
        "--data",
        folder / "text.txt",
        "--context",
        64,
        "--limit",
        1,
        "--device",
        "cpu",
        "--debug-gemm",
    )
    code, out, _ = blockscale("evaluate", folder / "fp8", *options)
    assert code == 0
    for name in ("layers.0.attention.o", "layers.0.mlp.down", "layers.1.mlp.gate_up"):
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        titles = next(line for line in out.splitlines() if line.startswith("site "))
        # What quantized activations cost is known of every product, and arithmetic costs next to nothing.
        place = titles.index("act diff")
        assert 1e-5 < float(line[place : place + 8]) < 1e-2
        place = titles.index("acc diff")
        assert float(line[place : place + 8]) < 1e-9


def test_debug_gemm_says_that_there_was_nothing_to_check(blockscale, folder):
    options = (
        "--data",
        folder / "text.txt",
        "--context",
        64,
        "--limit",
        1,
        "--device",
        "cpu",
        "--debug-gemm",
    )
    code, out, err = blockscale("evaluate", folder / "plain", *options)
    assert code == 0
    assert "site " not in out
    assert "no FP8 GEMM ran" in err


SHORT = ("--context", 64, "--limit", 1, "--device", "cpu")


def test_evaluate_prints_the_metrics_that_were_chosen(blockscale, folder):
    both = ("evaluate", folder / "fp8", "--against", folder / "plain", "--data", folder / "text.txt", *SHORT)
    code, out, _ = blockscale(*both, "--metrics", "top1,kl")
    assert code == 0
    assert [line[:14].strip() for line in out.splitlines()[1:-1]] == ["KL divergence", "same likeliest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--metrics", "perplexity,kld"),
            "--metrics: unknown metric (expected perplexity | kl | top1 | tasks, got 'kld')",
        ),
        (("--metrics", "kl"), "--metrics: kl needs a reference; name it: --against REF"),
        (("--metrics", "perplexity,top1"), "--metrics: top1 needs a reference; name it: --against REF"),
        (
            ("--metrics", "tasks"),
            "--metrics: tasks are asked for and none is named; name some: --tasks hellaswag",
        ),
        (("--metrics", "perplexity", "--tasks", "mmlu"), "tasks are named and not asked for; add tasks"),
        (("--shots", "3"), "--shots: there are no tasks; name some"),
        (("--task-data", "."), "--task-data: there are no tasks; name some"),
        (("--limit", "0"), "'--limit'"),
        (("--recipe", "/nowhere.json"), "/nowhere.json"),
    ],
)
def test_what_does_not_go_together_is_a_line(blockscale, folder, options, message):
    code, out, err = blockscale("evaluate", folder / "plain", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_tasks_need_their_package_before_anything_is_read(blockscale, monkeypatch):
    from blockscale.evaluate.tasks import questions

    monkeypatch.setattr(questions, "find_spec", lambda name: None)
    code, _, err = blockscale("evaluate", "/nowhere", "--tasks", "mmlu")
    assert (code, err) == (2, "tasks need the package lm_eval; pip install 'blockscale[eval]'\n")


def test_a_recipe_quantizes_at_load(blockscale, folder, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"scale_fmt": "ue8m0"}')
    text = ("--data", folder / "text.txt", *SHORT, "--json")
    quantize_checkpoint(folder / "plain", tmp_path / "fp8", Recipe("ue8m0"))
    _, stored, _ = blockscale("evaluate", tmp_path / "fp8", *text)
    for options in (
        ("--recipe", recipe),
        ("--scale-fmt", "ue8m0"),
        ("--scale-fmt", "ue8m0", "--block-size", "128x128"),
    ):
        code, out, _ = blockscale("evaluate", folder / "plain", *text, *options)
        assert code == 0
        result = json.loads(out)
        assert result["scores"] == json.loads(stored)["scores"]
        assert result["loading"]["recipe"]["scale_fmt"] == "ue8m0"


def test_tasks_are_printed_with_both_models_and_their_difference(blockscale, tmp_path):
    pytest.importorskip("lm_eval")
    task_files.write(tmp_path)
    models.make(tmp_path / "plain", vocab_size=258)
    save_byte_tokenizer(tmp_path / "plain")
    options = (
        "--tasks",
        "arc_challenge,mmlu",
        "--task-data",
        tmp_path,
        "--limit",
        2,
        "--shots",
        1,
        "--device",
        "cpu",
    )
    code, out, _ = blockscale("evaluate", tmp_path / "plain", "--against", tmp_path / "plain", *options)
    assert code == 0
    *lines, last = out.splitlines()
    starts = [line[:24].rstrip() for line in lines]
    assert starts == [
        *("arc_challenge acc", "", "  difference"),
        *("arc_challenge acc_norm", "", "  difference"),
        *("mmlu acc", "", "  difference"),
    ]
    assert lines[0].endswith("plain, 2 questions, 1 shots")
    assert all("0.0000 [-0." in line and line.endswith("paired by questions") for line in lines[2::3])
    assert last == "In brackets: 95 % confidence intervals."
