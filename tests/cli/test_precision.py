"""Precision on the command line: `quantize`, `plan` and `generate`, and the article's config file."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from blockscale.checkpoint.names import role_of
from tests import data

GENERATE = Path(__file__).parent.parent.parent / "inference" / "generate.py"
tiny = pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")

SPELLINGS = "fp8 | fp8:ROWSxCOLUMNS | bf16 | int4[:g32|g64|g128][:ue8m0] | int3[...] | mxfp4"


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.deepseek_v3(), shards=2)


def _quantized_roles(folder):
    return {
        role_of(name) for name, tensor in data.read(folder).items() if tensor.dtype == torch.float8_e4m3fn
    }


def test_quantize_takes_it_from_options_or_a_recipe_and_plan_shows_it(tmp_path, source, blockscale):
    options = ("--precision", "experts=fp8", "--precision", "model.layers.2.*=bf16")
    planned = json.loads(blockscale("plan", source, *options, "--json")[1])
    dry = json.loads(blockscale("quantize", source, tmp_path / "a", *options, "--dry-run", "--json")[1])
    assert not (tmp_path / "a").exists()
    assert planned["after"] == dry["after"]
    assert {role["role"]: role["quantized"] for role in planned["roles"] if role["quantized"]} == {
        "experts": 12
    }
    assert dry["kept"]["set to bf16"] == planned["kept"]["set to bf16"] == 20
    report = json.loads(blockscale("quantize", source, tmp_path / "a", *options, "--json")[1])
    assert report["output_bytes"] == planned["after"]
    assert report["tensors"]["quantize"] == 12
    recipe = {"precision": {"experts": "fp8", "model.layers.2.*": "bf16"}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    blockscale("quantize", source, tmp_path / "b", "--recipe", tmp_path / "recipe.json")
    assert data.contents(tmp_path / "a") == data.contents(tmp_path / "b")
    replaced = ("--recipe", tmp_path / "recipe.json", "--precision", "attention=fp8")
    blockscale("quantize", source, tmp_path / "c", *replaced)
    assert _quantized_roles(tmp_path / "c") == {"attention"}


def test_a_quantized_head_is_warned_of_once(tmp_path, source, blockscale):
    code, _, err = blockscale("quantize", source, tmp_path / "out", "--precision", "head=fp8")
    assert code == 0
    assert err.count("load no FP8 one") == 1
    code, out, err = blockscale("verify", tmp_path / "out", "--against", source)
    assert (code, err) == (0, "")
    assert "warning: lm_head.weight: head is FP8; engines keep it in high precision" in out


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("expert=fp8", "precision 'expert': unknown role (expected attention | dense_mlp | "),
        ("experts", f"bad precision (expected ROLE or PATTERN={SPELLINGS}, got 'experts')"),
        (
            "experts=fp16",
            f"precision experts: unknown precision (expected {SPELLINGS}, got 'fp16')",
        ),
        ("norm=fp8", "precision 'norm': role is never quantized and has no precision to set"),
        ("*.norm=fp8", "precision *.norm=fp8: nothing becomes FP8 by it"),
        ("*.norm=fp8:64x64", "precision *.norm=fp8:64x64: nothing becomes FP8 by it"),
        (
            "experts=fp8:",
            "precision experts: bad block size (expected two positive integers, as 128x128, got '')",
        ),
        (
            "experts=fp8:64x",
            "precision experts: bad block size (expected two positive integers, as 128x128, ",
        ),
        (
            "experts=bf16:64x64",
            f"precision experts: unknown precision (expected {SPELLINGS}, ",
        ),
        ("*.q_porj=bf16", "'*.q_porj': pattern matches no tensor"),
    ],
)
def test_one_line_and_nothing_is_left(tmp_path, source, blockscale, value, line):
    for command in (("quantize", source, tmp_path / "out"), ("plan", source)):
        code, out, err = blockscale(*command, "--precision", value)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(line)
    assert not (tmp_path / "out").exists()


def test_block_sizes_by_tensor_and_auto_are_told(tmp_path, source, blockscale):
    pytest.importorskip("compressed_tensors")
    options = (
        "--layout",
        "compressed-tensors",
        "--precision",
        "default=fp8",
        "--precision",
        "experts=fp8:64x64",
    )
    code, out, err = blockscale("quantize", source, tmp_path / "a", *options)
    assert code == 0
    assert "blocks: 24 weights 128x128, 24 weights 64x64\n" in out
    assert err == (
        "warning: 24 weights (24 of 64x64) have other blocks than 128x128, the only ones that vLLM and "
        "SGLang are known to run\n"
    )
    assert "blocks 128x128, 64x64, scale_fmt" in blockscale("inspect", tmp_path / "a")[1]
    auto = ("--layout", "compressed-tensors", "--block-size", "auto", "--json")
    dry = json.loads(blockscale("quantize", source, tmp_path / "b", *auto, "--dry-run")[1])
    assert not (tmp_path / "b").exists()
    done = json.loads(blockscale("quantize", source, tmp_path / "b", *auto)[1])
    planned = json.loads(blockscale("plan", source, *auto)[1])
    assert dry["block_choice"] == planned["block_choice"] == done["block_choice"]
    chosen = next(iter(done["block_choice"].values()))
    assert chosen["block_size"] == [128, 128]
    assert chosen["reason"].startswith("no finer blocks are worth their scales: 64x64 ")
    assert chosen["scale_bytes"].keys() == {"128x128", "64x64", "32x32", "1x128"}
    code, out, err = blockscale("quantize", source, tmp_path / "c", "--block-size", "best")
    assert (code, out) == (2, "")
    assert err == "bad block size (expected two positive integers, as 128x128, or auto, got 'best')\n"


@tiny
def test_the_articles_config_answers_as_the_option_does(tmp_path, blockscale, monkeypatch, capsys):
    (tmp_path / "mixed.json").write_text('{"dtype": "bf16", "moe_inter_dim": "fp8"}')
    (tmp_path / "prompts").write_text("Who are you?\n")
    rest = ("--input-file", tmp_path / "prompts", "--max-new-tokens", 12, "--temperature", 0)
    checkpoint = ("--ckpt-path", data.TINY_DEEPSEEK)
    config = ("--config", tmp_path / "mixed.json")
    code, out, err = blockscale("generate", *checkpoint, *config, *rest)
    assert code == 0, err
    assert out.startswith("Prompt: Who are you?\nCompletion: ")
    assert blockscale("generate", *checkpoint, "--precision", "experts=fp8", *rest)[:2] == (0, out)
    monkeypatch.setattr(sys, "argv", [str(GENERATE), *map(str, (*checkpoint, *config, *rest))])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(GENERATE), run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out) == (0, out)


@tiny
def test_generate_refuses_what_cannot_be_given(blockscale):
    for value, line in (
        ("experts=int2", "precision experts: unknown"),
        ("experts=int4", "precision int4:g128: this runtime makes FP8 and BF16 as it loads"),
        ("*.gate=fp8", "precision *.gate=fp8: "),
    ):
        command = ("generate", "--ckpt-path", data.TINY_DEEPSEEK, "--interactive", "--precision", value)
        code, out, err = blockscale(*command)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith(line)
