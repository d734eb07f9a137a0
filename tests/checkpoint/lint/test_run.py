"""Checkpoints that are remote or not whole, and requests that make no sense."""

import tempfile
from pathlib import Path

import fsspec
import pytest

from blockscale import quantize_checkpoint
from blockscale.checkpoint.lint.run import lint_checkpoint
from tests import data
from tests.checkpoint.lint.checkpoints import aligned, findings, write


def test_a_remote_checkpoint(made):
    folder = "memory://lint/out"
    store = fsspec.filesystem("memory")
    with tempfile.TemporaryDirectory() as here:
        for name, content in data.contents(write(Path(here), *made)).items():
            store.pipe(f"/lint/out/{name}", content)
    assert lint_checkpoint(folder, "vllm").ok


def test_a_missing_mtp_layer(tmp_path):
    model = aligned(data.deepseek_v3())
    gone = {name: None for name in model.tensors if ".layers.2." in name}
    quantize_checkpoint(data.write(tmp_path / "source", model.changed(gone)), tmp_path / "out")
    assert findings(tmp_path / "out", "vllm") == {("warning", "mtp", "model.layers.2")}


def test_an_index_that_names_absent_files(tmp_path, made):
    folder = data.write(tmp_path / "out", data.Model(*made), shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (finding,) = lint_checkpoint(folder, "vllm").findings
    assert (finding.severity, finding.rule) == ("error", "index")
    assert "files that the index names are absent" in finding.what


def test_values_that_make_no_sense(tmp_path, made):
    folder = write(tmp_path / "out", *made)
    assert "unknown engine (expected vllm | sglang | transformers" in data.told(
        lint_checkpoint, folder, "ollama"
    )
    with pytest.raises(Exception, match="bad number of ranks"):
        lint_checkpoint(folder, "vllm", tp=0)
