"""Calibrated rounding of weights of fewer than 8 bits, from a checkpoint to what transformers computes."""

import json

import pytest
import torch

from blockscale import huggingface, quantize_checkpoint, verify_checkpoint
from blockscale.calibrate import checkpoint
from blockscale.calibrate.checkpoint import CalibratedRounder
from blockscale.calibrate.experts import Call, round_experts
from blockscale.calibrate.stations import Wanted
from blockscale.calibrate.text import SELF, Calibration
from blockscale.checkpoint.progress import Silent
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.rounded import add_inputs, read_inputs
from blockscale.checkpoint.source import open_source
from blockscale.formats import BlockFP8
from blockscale.group_formats import GroupInt
from tests import data

checkpoints = pytest.importorskip("tests.huggingface.checkpoints")
CASES = [
    ("llama", {"default": "int4:g64"}, "float32"),
    ("deepseek_v3", {"default": "fp8", "experts": "int4:g32"}, "ue8m0"),
    ("qwen3_moe", {"default": "mxfp4", "experts": "int3:g64:ue8m0"}, "float32"),
]


def rounder(source):
    def encode(text: str) -> list[int]:
        return [ord(letter) % 64 for letter in text]

    return CalibratedRounder(open_source(source), Calibration((SELF,), encode, 2048, 64))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join([case[0], *case[1].values()]))
def case(request, tmp_path_factory):
    """(source, plainly quantized, calibrated, its recipe)."""
    name, precision, scale_fmt = request.param
    folder = tmp_path_factory.mktemp(name)
    source = checkpoints.make(folder / "source", name)
    recipe = Recipe(scale_fmt, layout="blockscale", precision=precision)
    quantize_checkpoint(source, folder / "plain", recipe)
    quantize_checkpoint(source, folder / "calibrated", recipe, rounder=rounder(source))
    return source, folder / "plain", folder / "calibrated", recipe


def test_predictions_are_nearer_to_the_original_than_with_plain_rounding(case):
    source, plain, calibrated, _ = case
    wanted = checkpoints.logits(checkpoints.plain(source)).log_softmax(-1)

    def divergence(folder) -> float:
        model = huggingface.load_model(folder, huggingface.BlockscaleConfig(), dtype=torch.float32)
        found = checkpoints.logits(model).log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    assert divergence(calibrated) < 0.8 * divergence(plain)


def test_it_verifies_and_has_the_tensors_of_plain_rounding(case):
    source, plain, calibrated, _ = case
    assert verify_checkpoint(calibrated, source).ok
    ours, theirs = data.read(calibrated), data.read(plain)
    assert {name: (each.dtype, each.shape) for name, each in ours.items()} == {
        name: (each.dtype, each.shape) for name, each in theirs.items()
    }
    low = [name for name, each in ours.items() if each.dtype == torch.uint8]
    assert low
    assert sum(not torch.equal(ours[name], theirs[name]) for name in low) > 0.9 * len(low)
    assert set(low) <= set(json.loads((calibrated / "blockscale.json").read_text())["calibrated"])


def test_an_interrupted_run_goes_on_to_the_same_bytes(case, tmp_path, monkeypatch):
    source, _, calibrated, recipe = case
    real, calls = checkpoint.round_layer, []

    def interrupted(layer, chunks, wanted, search, known):
        calls.append(known is not None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(layer, chunks, wanted, search, known)

    monkeypatch.setattr(checkpoint, "round_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "again", recipe, rounder=rounder(source))
    quantize_checkpoint(source, tmp_path / "again", recipe, rounder=rounder(source))
    assert calls == [False, False, True, False]
    assert data.contents(tmp_path / "again") == data.contents(calibrated)


@torch.no_grad()
def test_the_largest_inputs_of_experts_are_told(tmp_path):
    model = checkpoints.plain(checkpoints.make(tmp_path / "source", "qwen3_moe"))
    module = model.model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 160, generator=generator)
    experts = torch.stack([torch.arange(40) % 3, torch.full((40,), 4)], 1)
    wanted = Wanted(GroupInt(4, 32), BlockFP8(), parts=2)
    found = round_experts(module, module, [Call(x, x, experts)], {"gate_up_proj": wanted})
    told = {expert: amax for (name, expert), amax in found.amax.items()}
    assert told == {
        expert: float(x[(experts == expert).any(1)].abs().max()) if expert in (0, 1, 2, 4) else 0.0
        for expert in range(6)
    }


def test_what_is_told_of_inputs_adds_up(tmp_path):
    add_inputs(tmp_path, {})
    assert not list(tmp_path.iterdir())
    add_inputs(tmp_path, {"a": 1.5, "b": 2.0})
    add_inputs(tmp_path, {"b": 3.0})
    assert read_inputs(tmp_path) == {"a": 1.5, "b": 3.0}


def test_both_projections_of_an_expert_are_told_of(tmp_path):
    source = checkpoints.make(tmp_path / "source", "deepseek_v3")
    names = [name for name in data.read(source) if ".experts." in name]
    (tmp_path / "folder").mkdir()
    weights = {name: GroupInt(4, 32) for name in names}
    rounder(source).run(weights, "float32", tmp_path / "folder", Silent())
    found = read_inputs(tmp_path / "folder")
    assert found.keys() == set(names)
    assert all(value > 0 for value in found.values())
    for name in names:
        twin = name.replace("gate_proj", "up_proj")
        assert found[name] == found[twin]
    downs = {found[name] for name in names if "down_proj" in name}
    assert len(downs) == 8
