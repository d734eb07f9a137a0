"""`blockscale convert`: what it prints, as text and as one JSON object, and what it refuses."""

import json

import pytest

from tests import data


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.deepseek_v3(), shards=3)


@pytest.fixture
def fp8(tmp_path):
    return data.write(tmp_path / "fp8", data.in_fp8(data.deepseek_v3(), block_size=(16, 16)))


def test_text(tmp_path, source, blockscale):
    code, out, err = blockscale("convert", source, tmp_path / "out", "--mp", 2)
    assert code == 0
    assert out.startswith("divided 73 tensors over 2 ranks: ")
    assert out.endswith(f"result: {tmp_path}/out\n")
    assert err.startswith("warning: multi-token prediction is kept as layers.2.*, which ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        "model0-mp2.safetensors",
        "model1-mp2.safetensors",
    ]
    _, out, _ = blockscale("convert", source, tmp_path / "out", "--mp", 2)
    assert out == f"{tmp_path}/out is complete already: nothing to do\n"


def test_options_and_json(tmp_path, source, blockscale):
    code, out, err = blockscale("convert", source, tmp_path / "out", "--mp", 2, "--no-mtp", "--json")
    assert code == 0
    assert err == "warning: multi-token prediction (layer 2) is left out\n"
    report = json.loads(out)
    assert (report["command"], report["shards"]) == ("convert", 2)
    assert report["tensors"] == {"copy": 41, "drop": 32}
    code, _, err = blockscale("convert", source, tmp_path / "out", "--mp", 1)
    assert code == 2
    assert "replace them with --overwrite" in err
    assert blockscale("convert", source, tmp_path / "out", "--mp", 1, "--overwrite", "--workers", 1)[0] == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model0-mp1.safetensors"]


def test_cuts_through_blocks(tmp_path, fp8, blockscale):
    code, out, err = blockscale("convert", fp8, tmp_path / "out", "--mp", 2)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "cuts through its FP8 blocks; 8 more like it" in err
    assert not (tmp_path / "out").exists()
    requantize = ("--on-ragged-split", "requantize")
    code, out, err = blockscale("convert", fp8, tmp_path / "out", "--mp", 2, *requantize)
    assert code == 0
    assert out.startswith("divided 122 tensors over 2 ranks, 9 of them requantized: ")
    assert "warning: 9 FP8 weights are requantized" in err


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ((), "--mp"),
        (("--mp", "0"), "--mp"),
        (("--mp", "2", "--on-ragged-split", "ignore"), "requantize"),
    ],
)
def test_a_command_line_that_cannot_be_understood(source, blockscale, arguments, culprit):
    code, out, err = blockscale("convert", source, source.parent / "out", *arguments)
    assert (code, out) == (2, "")
    assert culprit in err.lower()
    assert not (source.parent / "out").exists()


def test_the_result_is_no_source_for_other_commands(tmp_path, source, blockscale):
    blockscale("convert", source, tmp_path / "out", "--mp", 2)
    for command in (("inspect",), ("verify",), ("quantize", tmp_path / "again")):
        code, out, err = blockscale(command[0], tmp_path / "out", *command[1:])
        assert (code, out) == (2, "")
        assert err.startswith(f"{tmp_path}/out: shards of DeepSeek's inference folder")
