"""Planted faults of a checkpoint are found and come first; a sound one gets a recipe."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.errors import BlockscaleError
from blockscale.evaluate.diagnose import diagnose_weights, rank
from blockscale.evaluate.sensitivity import Sensitivity
from tests.checkpoint.rounders import StepUp
from tests.model import models

DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
O_PROJ = "model.layers.2.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose") / "source"
    models.make(folder, hidden_size=384, initializer_range=0.05)
    return folder


@pytest.fixture
def fp8(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "fp8")
    return tmp_path / "fp8"


def change(folder, edit):
    """Rewrite the tensors of a checkpoint of one file."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def diagnosed(model, source):
    return rank(*diagnose_weights(str(model), str(source)))


def test_a_sound_checkpoint_has_no_fault(fp8, source):
    result = diagnosed(fp8, source)
    assert result.problems == ()
    assert not any(tensor.at_fault for tensor in result.tensors)
    assert all(20 < tensor.weight.sqnr_db < 40 for tensor in result.tensors)
    noise = [tensor.weight.sqnr_db for tensor in result.tensors]
    assert noise == sorted(noise)


@pytest.mark.parametrize(
    ("name", "spoil", "fault"),
    [
        (O_PROJ, lambda scale: torch.exp2(scale.log2().ceil()), "scales were changed after the codes"),
        (O_PROJ, lambda scale: scale.flip(0).contiguous(), "scale grid is swapped"),
        (DOWN, lambda scale: torch.cat([scale[:-1], 1.7 * scale[-1:]]), "scale of a block is wrong"),
    ],
)
def test_a_planted_fault_comes_first(fp8, source, name, spoil, fault):
    def edit(tensors):
        tensors[f"{name}_scale_inv"] = spoil(tensors[f"{name}_scale_inv"])

    change(fp8, edit)
    first, *others = diagnosed(fp8, source).tensors
    assert (first.name, first.weight.fault) == (name, fault)
    assert not any(tensor.at_fault for tensor in others)


def test_a_quantized_gate_comes_first(fp8, source):
    name = "model.layers.1.mlp.gate.weight"

    def edit(tensors):
        from blockscale.reference import quantize_weight

        codes, scale = quantize_weight(tensors[name])
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale

    change(fp8, edit)
    first, *others = diagnosed(fp8, source).tensors
    assert first.name == name
    assert "router is FP8" in first.problems[0]
    assert not any(tensor.at_fault for tensor in others)


def test_a_missing_scale_and_a_wrong_config_are_told(fp8, source):
    change(fp8, lambda tensors: tensors.pop(f"{O_PROJ}_scale_inv"))
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (fp8 / "config.json").write_text(json.dumps(config))
    result = diagnosed(fp8, source)
    by_name = {tensor.name: tensor for tensor in result.tensors}
    assert "without a scale" in by_name[O_PROJ].problems[0]
    assert "not a power of two" in by_name[DOWN].problems[0]


def test_the_recipe_keeps_the_costliest_with_what_is_fused_with_it(fp8, source):
    problems, tensors = diagnose_weights(str(fp8), str(source))
    dense = "model.layers.0.mlp"
    costs = [
        Sensitivity(f"{dense}.up_proj", 0.5, 20.0),
        Sensitivity(f"{dense}.gate_proj", 0.1, 21.0),
        Sensitivity(f"{dense}.down_proj", 0.3, 22.0),
        Sensitivity("model.layers.1.mlp.experts", 0.1, 23.0),
    ]
    result = rank(problems, tensors, costs)
    assert [tensor.name for tensor in result.tensors[:2]] == [
        f"{dense}.up_proj.weight",
        f"{dense}.down_proj.weight",
    ]
    experts = [tensor for tensor in result.tensors if ".1.mlp.experts." in tensor.name]
    assert {tensor.cost for tensor in experts} == {costs[3]}
    assert len(experts) > 3
    assert set(result.keep) == {f"{dense}.up_proj", f"{dense}.gate_proj"}
    assert result.saved == pytest.approx(0.6)


def test_another_models_checkpoint_is_no_reference(fp8, tmp_path):
    models.make(tmp_path / "other", hidden_size=256)
    with pytest.raises(BlockscaleError, match="reference is not what the model was made from"):
        diagnosed(fp8, tmp_path / "other")


def test_the_manifest_says_which_weights_are_judged_as_calibrated(source, tmp_path):
    def shrink(tensors):  # as calibration does to make up for noise in the inputs
        for name, tensor in tensors.items():
            tensors[name] = 0.9 * tensor if name.endswith("_scale_inv") else tensor

    quantize_checkpoint(source, tmp_path / "fp8", rounder=StepUp(source, spoil=shrink))
    assert not any(tensor.at_fault for tensor in diagnosed(tmp_path / "fp8", source).tensors)
    (tmp_path / "fp8" / "blockscale.json").unlink()
    faults = {tensor.weight.fault for tensor in diagnosed(tmp_path / "fp8", source).tensors}
    assert faults == {"scales were changed after the codes"}
