"""Every command on small checkpoints: what it prints, as text and as one JSON object, and what it leaves."""

import json

import pytest
from rich.console import Console

from blockscale.cli import console
from blockscale.version import __version__
from tests import data

COMMANDS = ("quantize", "dequantize", "verify", "inspect", "plan")


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.deepseek_v3(), shards=3)


@pytest.fixture
def fp8(tmp_path, source, blockscale):
    assert blockscale("quantize", source, tmp_path / "fp8", "--scale-fmt", "ue8m0")[0] == 0
    return tmp_path / "fp8"


def _one_object(text):
    """Parse exactly one JSON object, as strictly as other languages do (no NaN, no Infinity)."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    parsed = json.loads(text, parse_constant=refuse)
    assert isinstance(parsed, dict)
    return parsed


def test_there_and_back_with_text(tmp_path, source, blockscale):
    code, out, err = blockscale("quantize", source, tmp_path / "fp8", "--scale-fmt", "ue8m0")
    assert (code, err) == (0, "")
    assert out.startswith("quantized 48 tensors, copied 25: ")
    assert out.endswith(f"result: {tmp_path}/fp8\n")
    code, out, err = blockscale("verify", tmp_path / "fp8", "--against", source)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("121 tensors read back, ")
    assert "121 checksums compared" in out
    assert f"73 tensors compared with {source}" in out
    assert "relative error of quantized weights 2." in out
    assert out.endswith("problems: none\nOK\n")
    code, out, err = blockscale("inspect", tmp_path / "fp8")
    assert (code, err) == (0, "")
    assert "deepseek_v3" in out
    assert "quantization: deepseek layout, blocks 128x128, scale_fmt ue8m0, 5 modules on the skip list" in out
    assert "scales: 48 of 48 tensors hold powers of two only" in out
    assert out.endswith("problems: none\n")
    code, out, err = blockscale("plan", source, "--tp", 2, "--ep", 4, "--rate", 0.001)
    assert (code, err) == (0, "")
    assert "tensor bytes" in out
    assert "in the MTP module" in out
    assert "(TP 2, EP 4)" in out
    code, out, err = blockscale("dequantize", tmp_path / "fp8", tmp_path / "back", "--dtype", "float16")
    assert (code, err) == (0, "")
    assert out.startswith("dequantized 48 tensors, copied 25: ")
    assert blockscale("verify", tmp_path / "back", "--against", tmp_path / "fp8")[0] == 0
    code, out, err = blockscale("quantize", source, tmp_path / "fp8", "--scale-fmt", "ue8m0")
    assert (code, out, err) == (0, f"{tmp_path}/fp8 is complete already: nothing to do\n", "")


def test_every_command_prints_one_json_object_and_nothing_else(tmp_path, source, fp8, blockscale):
    def run(*arguments):
        code, out, err = blockscale(*arguments, "--json")
        assert (code, err) == (0, "")
        return _one_object(out)

    report = run("quantize", source, tmp_path / "again", "--scale-fmt", "ue8m0")
    assert (report["command"], report["shards"], report["already_complete"]) == ("quantize", 3, False)
    assert report["tensors"] == {"copy": 25, "quantize": 48}
    assert run("quantize", source, tmp_path / "again", "--scale-fmt", "ue8m0")["already_complete"] is True
    assert run("dequantize", fp8, tmp_path / "back")["tensors"]["dequantize"] == 48
    verified = run("verify", fp8, "--against", source)
    assert (verified["ok"], verified["compared"], verified["problems"]) == (True, 73, [])
    assert 0.02 < verified["relative_error"] < 0.03
    assert run("verify", tmp_path / "back")["relative_error"] is None
    inspected = run("inspect", fp8)
    assert inspected["quantization"]["fmt"] == {"block_size": [128, 128], "scale_fmt": "ue8m0"}
    planned = run("plan", source)
    assert planned["after"] == report["output_bytes"]
    assert run("plan", source / "config.json")["after"] == planned["after"]
    assert run("quantize", source, tmp_path / "dry", "--dry-run")["after"] == planned["after"]
    assert not (tmp_path / "dry").exists()


def test_json_of_a_failed_verification_and_exit_code_1(fp8, source, blockscale):
    file = fp8 / "model-00001-of-00003.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5:] = b"\x7f" * 5  # NaN codes, whose error is no number
    file.write_bytes(raw)
    code, out, err = blockscale("verify", fp8, "--against", source, "--json")
    assert (code, err) == (1, "")
    found = _one_object(out)
    assert not found["ok"]
    assert any("5 NaN codes" in problem["message"] for problem in found["problems"])
    code, out, err = blockscale("verify", fp8)
    assert (code, err) == (1, "")
    assert out.endswith("NOT OK\n")
    assert "5 NaN codes" in out


def test_an_error_with_json_leaves_standard_output_empty(tmp_path, blockscale):
    code, out, err = blockscale("inspect", tmp_path, "--json")
    assert (code, out) == (2, "")
    assert err.startswith(f"{tmp_path}: no safetensors checkpoint in the folder")


def test_a_dry_run_writes_nothing(tmp_path, source, blockscale):
    before = data.snapshot(tmp_path)
    code, out, err = blockscale("quantize", source, tmp_path / "dry", "--dry-run", "--exclude", "*.o_proj")
    assert (code, err) == (0, "")
    assert "kept: 3 tensors, excluded" in out
    assert data.snapshot(tmp_path) == before
    assert not (tmp_path / "dry").exists()


def test_options_reach_the_conversion(tmp_path, source, blockscale):
    options = ("--block-size", "32x64", "--exclude", "*.o_proj", "--exclude", "*.q_b_proj", "--workers", 1)
    assert blockscale("quantize", source, tmp_path / "out", *options)[0] == 0
    quantization = data.read_config(tmp_path / "out")["quantization_config"]
    assert quantization["weight_block_size"] == [32, 64]
    assert "model.layers.0.self_attn.o_proj" in quantization["modules_to_not_convert"]
    assert "model.layers.0.self_attn.q_b_proj" in quantization["modules_to_not_convert"]
    assert blockscale("quantize", source, tmp_path / "in", "--include", "*.o_proj")[0] == 0
    converted = [name for name, tensor in data.read(tmp_path / "in").items() if tensor.element_size() == 1]
    assert sorted(converted) == [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)]
    assert blockscale("quantize", source, tmp_path / "in")[0] == 2
    assert blockscale("quantize", source, tmp_path / "in", "--overwrite")[0] == 0


def test_a_recipe_file_and_options_on_top_of_it(tmp_path, source, blockscale):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"scale_fmt": "ue8m0", "block_size": [64, 64], "exclude": ["*.o_proj"]}))
    code, out, _ = blockscale("plan", source, "--recipe", recipe, "--json")
    assert code == 0
    for extra, block_size in (((), [64, 64]), (("--block-size", "32x32"), [32, 32])):
        target = tmp_path / f"out{len(extra)}"
        code, report, _ = blockscale("quantize", source, target, "--recipe", recipe, *extra, "--json")
        assert code == 0
        quantization = data.read_config(target)["quantization_config"]
        assert (quantization["scale_fmt"], quantization["weight_block_size"]) == ("ue8m0", block_size)
        assert "model.layers.0.self_attn.o_proj" in quantization["modules_to_not_convert"]
        if not extra:
            assert _one_object(out)["after"] == _one_object(report)["output_bytes"]


def test_warnings_go_to_standard_error(tmp_path, blockscale):
    source = data.write(tmp_path / "source", data.llama(model_type="brand_new"))
    line = (
        "warning: model_type 'brand_new' is not known: only weights that are linear layers by their name are "
    )
    for arguments in (("quantize", source, tmp_path / "out"), ("plan", source)):
        for json_too in ((), ("--json",)):
            code, out, err = blockscale(*arguments, *json_too)
            assert code == 0
            assert err.count("\n") == 1
            assert err.startswith(line)
            assert "is not known" not in out.split('"warnings"')[0]


def test_progress_is_plain_lines_without_a_terminal(tmp_path, source, blockscale, monkeypatch):
    monkeypatch.setattr(console, "_PLAIN_INTERVAL", 0.0)
    code, out, err = blockscale("quantize", source, tmp_path / "out", "--workers", 1)
    assert code == 0
    lines = err.splitlines()
    assert len(lines) > 73
    assert all(" tensors, " in line and "/s, " in line and line.endswith(" left") for line in lines)
    assert lines[-1].startswith("73/73 tensors, ")
    assert "\x1b" not in err
    assert "tensors, copied" in out
    assert blockscale("verify", tmp_path / "out")[2].splitlines()[-1].startswith("121/121 tensors, ")
    assert blockscale("quantize", source, tmp_path / "out2", "--json")[2] == "", "quiet with --json"


def test_progress_is_a_bar_on_a_terminal(tmp_path, source, blockscale, monkeypatch, capsys):
    monkeypatch.setattr(console, "err", Console(stderr=True, force_terminal=True, width=120))
    code, _, err = blockscale("quantize", source, tmp_path / "out")
    assert code == 0
    assert "\x1b" in err
    assert "73/73 tensors" in err


def test_help(blockscale):
    code, out, err = blockscale("--help")
    assert (code, err) == (0, "")
    assert all(command in out for command in COMMANDS)
    for command in COMMANDS:
        for flag in ("--help", "-h"):
            code, text, err = blockscale(command, flag)
            assert (code, err) == (0, "")
            assert "--json" in text
    assert blockscale("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(("place", "option"), [(3, "--rate"), (1, "--tp")])
def test_numbers_out_of_range(source, blockscale, place, option):
    code, out, err = blockscale("plan", source, option, 0)
    assert (code, out) == (2, "")
    assert option in err
    assert err.count("\n") == 1
