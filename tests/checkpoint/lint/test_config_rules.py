"""What config.json declares: stale, missing, unknown to us, and what transformers parses of it."""

import json

import pytest
import torch

from blockscale.checkpoint.lint.run import lint_checkpoint
from tests import data
from tests.checkpoint.lint.checkpoints import aligned, findings, write


def test_transformers_parses_what_is_clean_and_refuses_what_is_not(made):
    transformers = pytest.importorskip("transformers")
    entry = made[1]["quantization_config"]
    transformers.FineGrainedFP8Config(**entry)
    for value in (None, "uf8m0", "float32"):
        with pytest.raises(ValueError, match="scale_fmt"):
            transformers.FineGrainedFP8Config(**entry, scale_fmt=value)


def test_what_engines_know_and_we_do_not_is_not_called_wrong(tmp_path, made):
    per_tensor = {name: each for name, each in made[0].items() if not name.endswith("_scale_inv")}
    config = json.loads(json.dumps(made[1]))
    del config["quantization_config"]["weight_block_size"]
    found = lint_checkpoint(write(tmp_path / "tensor", per_tensor, config), "vllm")
    assert {(each.severity, each.rule) for each in found.findings} == {("warning", "config")}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}},
        "ignore": ["lm_head"],
    }
    codes = {
        name: torch.zeros(each.shape, dtype=torch.int8) if "_proj" in name else each
        for name, each in per_tensor.items()
    }
    found = lint_checkpoint(write(tmp_path / "int8", codes, config), "vllm")
    assert {(each.severity, each.rule) for each in found.findings} == {("warning", "config")}


def test_stale_and_missing_declarations(tmp_path, made):
    source = aligned(data.llama())
    stale = {**source.config, "quantization_config": made[1]["quantization_config"]}
    rules = {rule for _, rule, _ in findings(write(tmp_path / "stale", source.tensors, stale), "vllm")}
    assert "stale" in rules
    bare = {key: value for key, value in made[1].items() if key != "quantization_config"}
    assert findings(write(tmp_path / "bare", made[0], bare), "vllm") == {
        ("silent", "declared", "config.json")
    }
