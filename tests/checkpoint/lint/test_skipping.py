"""Which modules the skip list of each engine matches."""

import json

import pytest

from blockscale.checkpoint.lint.run import lint_checkpoint
from blockscale.checkpoint.lint.skipping import first_match, matcher
from tests.checkpoint.lint.checkpoints import write


def test_what_the_skip_list_of_each_engine_matches(tmp_path, made):
    tensors, config = dict(made[0]), json.loads(json.dumps(made[1]))
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "layers.1", "down_proj", "mlp.gate"]
    folder = write(tmp_path / "bad", tensors, config)
    down = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    first = {name for name in tensors if name.startswith("model.layers.1.") and name.endswith("_proj.weight")}

    def skipped(engine):
        return {each.where for each in lint_checkpoint(folder, engine).findings if each.rule == "skipped"}

    assert skipped("vllm") == set()  # full paths alone
    assert skipped("sglang") == down | first  # whole segments anywhere: mlp.gate is not mlp.gate_proj
    assert skipped("transformers") == down  # from the start, or the end


def test_transformers_matches_as_its_own_code_does():
    module = pytest.importorskip("transformers.quantizers.quantizers_utils")

    names = ["model.layers.1.mlp.gate", "model.layers.10.mlp.gate_proj", "lm_head", "model.layers.1", "fc1"]
    entries = [
        "model.layers.1",
        "layers.1",
        "mlp.gate",
        "gate",
        "model.layers.*.mlp",
        "lm_head",
        "head",
        "c1",
        "m.",
    ]
    for name in names:
        for entry in entries:
            ours = first_match(matcher("transformers", "fp8"), [entry], name) is None
            assert ours == module.should_convert_module(name, [entry]), (name, entry)
