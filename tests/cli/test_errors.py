"""What a user can do wrong: one line on standard error, exit code 2, no traceback, nothing left behind."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests import data


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.llama(), shards=2)


def _one_line(result):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err[:-1]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("frobnicate",), "frobnicate"),
        (("--frobnicate",), "--frobnicate"),
        (("quantize",), "src"),
        (("quantize", "source"), "dst"),
        (("quantize", "source", "out", "--frobnicate"), "--frobnicate"),
        (("quantize", "source", "out", "more"), "more"),
        (("quantize", "source", "out", "--scale-fmt", "e5m2"), "ue8m0"),
        (("quantize", "source", "out", "--layout", "gguf"), "compressed-tensors"),
        (("dequantize", "source", "out", "--dtype", "int8"), "bfloat16"),
        (("dequantize", "source", "out", "--on-missing-scale", "ignore"), "keep"),
        (("quantize", "source", "out", "--workers", "0"), "--workers"),
        (("verify", "source", "--workers", "x"), "--workers"),
        (("plan", "source", "--tp", "0"), "--tp"),
        (("plan", "source", "--rate", "-1"), "--rate"),
    ],
)
def test_a_command_line_that_cannot_be_understood(source, blockscale, monkeypatch, arguments, culprit):
    """The wording is typer's; what matters is one line that names the culprit or the choices."""
    monkeypatch.chdir(source.parent)
    assert culprit in _one_line(blockscale(*arguments)).lower()
    assert not (source.parent / "out").exists()


def test_no_command_shows_the_help(blockscale):
    code, out, err = blockscale()
    assert code == 2
    assert "quantize" in out + err
    assert err.endswith("no command given\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("quantize", "SOURCE", "OUT", "--block-size", "128x"),
            "bad block size (expected two positive integers, as 128x128, or auto, got '128x')",
        ),
        (("quantize", "SOURCE", "OUT", "--recipe", "SOURCE/none.json"), "SOURCE/none.json: cannot be read: "),
        (
            ("quantize", "SOURCE", "OUT", "--recipe", "SOURCE/tokenizer.json"),
            "SOURCE/tokenizer.json: bad recipe: ",
        ),
        (
            ("quantize", "SOURCE", "OUT", "--calibration-tokens", "4096"),
            "--calibration-tokens: nothing to calibrate on",
        ),
        (("quantize", "SOURCE", "SOURCE"), "SOURCE: source and destination overlap; write to another folder"),
        (("quantize", "SOURCE", "SOURCE/config.json"), "SOURCE/config.json: "),
        (("quantize", "SOURCE/absent", "OUT"), "SOURCE/absent: no such folder"),
        (("quantize", "SOURCE/config.json", "OUT"), "SOURCE/config.json: is a file"),
        (("quantize", "SOURCE", "OUT", "--exclude", "*.typo"), "'*.typo': pattern matches no tensor"),
        (
            ("quantize", "SOURCE", "OUT", "--device", "cuda"),
            "device cuda: no CUDA device (expected a GPU to run on, got PyTorch ",
        ),
        (("quantize", "nosuch://x", "OUT"), "nosuch://x: cannot be opened: "),
        (("quantize", "SOURCE", "nosuch://x"), "nosuch://x: cannot be opened: "),
        (("dequantize", "SOURCE", "OUT"), "no FP8 weight in the checkpoint"),
        (("verify", "SOURCE/absent"), "SOURCE/absent: no such folder"),
        (("verify", "SOURCE", "--against", "SOURCE/absent"), "SOURCE/absent: no such folder"),
        (("inspect", "SOURCE/absent"), "SOURCE/absent: no such folder"),
        (("plan", "SOURCE/absent"), "SOURCE/absent: no such folder"),
        (("plan", "SOURCE/tokenizer.json"), "config.json: tensor shapes cannot be computed"),
        (("inspect", "SOURCE", "--revision", "main"), "SOURCE: only a Hub repository has revisions"),
    ],
)
def test_one_line(source, blockscale, arguments, line):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    out = source.parent / "out"
    before = data.snapshot(source)
    places = {"SOURCE": str(source), "OUT": str(out)}
    spelled = [word.replace("SOURCE", places["SOURCE"]).replace("OUT", places["OUT"]) for word in arguments]
    got = _one_line(blockscale(*spelled))
    assert got.startswith(line.replace("SOURCE", str(source)))
    assert data.snapshot(source) == before
    assert not out.exists()


def test_a_non_finite_weight_and_a_missing_scale(tmp_path, blockscale):
    name = "model.layers.0.mlp.up_proj.weight"
    bad = data.llama().tensors[name].clone()
    bad[3, 4] = float("nan")
    source = data.write(tmp_path / "source", data.llama().changed({name: bad}))
    line = _one_line(blockscale("quantize", source, tmp_path / "out"))
    assert line.startswith(f"{name} in model.safetensors: 1 NaN or Inf value, the first at [3, 4]")
    assert not (tmp_path / "out").exists()
    code, _, err = blockscale("quantize", source, tmp_path / "out", "--on-nonfinite", "keep")
    assert code == 0
    assert f"warning: {name} keeps its precision: 1 NaN or Inf" in err
    fp8 = data.in_fp8(data.llama()).changed({f"{name}_scale_inv": None})
    source = data.write(tmp_path / "fp8", fp8)
    line = _one_line(blockscale("dequantize", source, tmp_path / "back"))
    assert line.startswith(f"1 of 7 FP8 weights have no scale (expected {name}_scale_inv beside {name}")
    code, _, err = blockscale("dequantize", source, tmp_path / "back", "--on-missing-scale", "keep")
    assert (code, err.count("\n")) == (0, 1)
    assert f"warning: {name}: no scale; kept as raw FP8" in err


def test_names_with_escapes_and_markup_are_printed_plainly(tmp_path, blockscale):
    name, folder = "model.layers.0.[bold]\x1b[31m.weight", tmp_path / "[red] :smile: [/x]"
    fp8 = data.in_fp8(data.llama()).changed({name: torch.ones(3).to(torch.float8_e4m3fn)})
    source = data.write(folder, fp8.changed({}, model_type="[/b]\x1b[32m\ud800"))
    line = _one_line(blockscale("dequantize", source, tmp_path / "out"))
    assert "model.layers.0.[bold]\\x1b[31m.weight" in line
    code, out, err = blockscale("inspect", source)
    assert (code, err.count("\n")) == (0, 1)
    assert "\x1b" not in out + err
    assert out.startswith(f"{folder}: [/b]\\x1b[32m\\ud800, ")
    assert "error: model.layers.0.[bold]\\x1b[31m.weight: FP8 weight without a scale" in out


def _subprocess(*arguments, script=None):
    command = [
        sys.executable,
        *(("-c", script) if script else ("-m", "blockscale")),
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("quantize", "SOURCE", "OUT"), "model-00002-of-00002.safetensors: file is truncated (expected "),
        (("inspect", "SOURCE"), "model-00002-of-00002.safetensors: file is truncated (expected "),
        (("plan", "SOURCE", "--frobnicate"), "No such option: --frobnicate"),
    ],
)
def test_a_process_of_its_own(source, arguments, line):
    shard = source / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    out = source.parent / "out"
    run = _subprocess(*(word.replace("SOURCE", str(source)).replace("OUT", str(out)) for word in arguments))
    assert _one_line((run.returncode, run.stdout, run.stderr)).startswith(line)
    assert not out.exists()


INTERRUPTED = """
import os, signal, sys
from blockscale.checkpoint import engine
from blockscale.cli.main import main

run_task, calls, last = engine.run_task, [], int(sys.argv.pop())

def interrupting(task, *rest):
    calls.append(task)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGINT)
    return run_task(task, *rest)

engine.run_task = interrupting
main()
"""


@pytest.mark.parametrize(("call", "kept"), [(1, 0), (16, 1)])
def test_ctrl_c_ends_in_one_line_and_exit_code_130_and_can_be_resumed(tmp_path, blockscale, call, kept):
    source = data.write(tmp_path / "source", data.llama(layers=2), shards=3)
    out = tmp_path / "out"
    run = _subprocess("quantize", source, out, "--workers", 1, call, script=INTERRUPTED)
    assert run.returncode == 130, run.stderr
    assert run.stdout == ""
    assert run.stderr == "interrupted; what is finished is kept: run the same command again to go on\n"
    assert all(name.startswith(".blockscale/") for name in data.contents(out))
    code, text, _ = blockscale("quantize", source, out, "--json")
    report = json.loads(text)
    assert code == 0
    assert report["resumed_shards"] >= kept
    blockscale("quantize", source, tmp_path / "whole")
    assert data.contents(out) == data.contents(tmp_path / "whole")


def test_ctrl_c_while_looking_is_told_the_same(source):
    script = (
        "import os, signal\n"
        "from blockscale.checkpoint import inspect\n"
        "from blockscale.cli.main import main\n"
        "inspect.read_index = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "main()\n"
    )
    run = _subprocess("inspect", source, script=script)
    assert run.returncode == 130
    assert run.stderr.startswith("interrupted")
    assert run.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_traceback(source):
    command = [sys.executable, "-m", "blockscale", "inspect", str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
        code = process.wait(timeout=60)
    assert err == ""
    assert code == 1
