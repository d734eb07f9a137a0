"""`blockscale lint`: one line a finding, and an exit code that says whether the engine loads it."""

import json

from blockscale import quantize_checkpoint
from tests import data


def test_findings_as_json(tmp_path, blockscale):
    quantize_checkpoint(data.write(tmp_path / "source", data.llama()), tmp_path / "fp8")
    code, out, _ = blockscale("lint", tmp_path / "fp8", "--engine", "vllm", "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (1, False)
    assert {each["rule"] for each in found["findings"]} == {"merged-rows"}  # 320 rows of the MLP


def test_findings_are_told_in_lines(tmp_path, blockscale):
    quantize_checkpoint(data.write(tmp_path / "source", data.llama()), tmp_path / "fp8")
    code, out, _ = blockscale("lint", tmp_path / "fp8", "--engine", "vllm")
    lines = out.splitlines()
    assert code == 1
    assert lines[-1] == f"{tmp_path / 'fp8'} is NOT loaded as it was meant by vllm"
    assert lines[0].startswith("error: model.layers.0.")
    assert "(expected a multiple of 128 rows on every rank, got 320)" in out
    (tmp_path / "fp8" / "model.safetensors").unlink()
    assert blockscale("lint", tmp_path / "fp8", "--engine", "vllm")[0] == 2
    assert blockscale("lint", tmp_path / "fp8", "--engine", "ollama")[0] == 2
    assert blockscale("lint", tmp_path / "fp8")[0] == 2


def test_what_is_loaded_exits_with_0(tmp_path, blockscale):
    quantize_checkpoint(data.write(tmp_path / "source", data.llama()), tmp_path / "fp8")
    code, out, _ = blockscale("lint", tmp_path / "fp8", "--engine", "transformers")
    assert (code, "ragged" in out) == (1, True)
    source = data.write(tmp_path / "wide", data.llama(hidden=256, intermediate=256))
    quantize_checkpoint(source, tmp_path / "out")
    code, out, _ = blockscale("lint", tmp_path / "out", "--engine", "transformers")
    assert (code, out) == (0, f"{tmp_path / 'out'} is loaded by transformers\n")
