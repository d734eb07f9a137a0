import errno
import json

import pytest
import torch
from safetensors.torch import save_file

from blockscale import reference
from blockscale.calibrate import checkpoint
from blockscale.calibrate.checkpoint import CalibratedRounder
from blockscale.calibrate.text import SELF, Calibration
from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.checkpoint.progress import Silent
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.source import Source, open_source
from blockscale.checkpoint.verify import verify_checkpoint
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.formats import BlockFP8
from blockscale.huggingface.load import local_or_hub
from tests import data

checkpoints = pytest.importorskip("tests.huggingface.checkpoints")
FUSED = "model.layers.1.mlp.experts"


def encode(text: str) -> list[int]:
    return [ord(letter) % 64 for letter in text]


def calibration(tokens: int = 2048, length: int = 64, text: str = SELF) -> Calibration:
    return Calibration((text,), encode, tokens, length)


def calibrated(source, folder, recipe=None, **options):
    rounder = CalibratedRounder(open_source(source), calibration(**options))
    quantize_checkpoint(source, folder, recipe, rounder=rounder)
    return folder


def weights_of(folder):
    """name -> (codes, scale) of what is FP8."""
    tensors = data.read(folder)
    return {
        name: (each, tensors[f"{name}_scale_inv"].float())
        for name, each in tensors.items()
        if each.dtype == torch.float8_e4m3fn
    }


def relative(folder, source) -> dict[str, float]:
    original = data.read(source)
    return {
        name: float((reference.dequantize_weight(*made, dtype=torch.float32) - original[name].float()).norm())
        / float(original[name].float().norm())
        for name, made in weights_of(folder).items()
    }


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "deepseek_v3"])
def pair(request, tmp_path_factory):
    """A checkpoint, plainly quantized and calibrated."""
    folder = tmp_path_factory.mktemp(request.param)
    source = checkpoints.make(folder / "source", request.param)
    quantize_checkpoint(source, folder / "plain")
    return source, folder / "plain", calibrated(source, folder / "calibrated")


def test_codes_land_under_the_names_they_are_of_and_differ_from_nearest_rounding(pair):
    source, plain, ours = pair
    errors, nearest = relative(ours, source), relative(plain, source)
    assert errors.keys() == nearest.keys()
    assert all(
        error < 0.15 for error in errors.values()
    )  # another weight's codes would be off by more than 1
    moved = [name for name in errors if errors[name] > nearest[name]]
    assert len(moved) > 0.5 * len(errors)
    manifest = json.loads((ours / "blockscale.json").read_text())
    assert set(manifest["calibrated"]) == set(errors)
    assert verify_checkpoint(ours, source).ok


def test_predictions_are_nearer_to_the_original_than_with_plain_rounding(pair):
    source, plain, ours = pair
    wanted = checkpoints.logits(checkpoints.plain(source)).log_softmax(-1)

    def divergence(folder) -> float:
        model = checkpoints.fake_quantized(checkpoints.plain(source), folder)
        for name, made in weights_of(folder).items():
            _put(model, name, reference.dequantize_weight(*made, dtype=torch.float32))
        found = checkpoints.logits(model).log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    assert divergence(ours) < 0.8 * divergence(plain)


def _put(model, name, values):
    """Set a weight by its name in a checkpoint."""
    path, _, _ = name.rpartition(".weight")
    head, _, leaf = path.rpartition(".experts.")
    if not head:
        model.get_submodule(path).weight.data.copy_(values)
        return
    expert, role = leaf.split(".")
    experts = model.get_submodule(f"{head}.experts")
    if role == "down_proj":
        experts.down_proj.data[int(expert)] = values
    else:
        half = values.shape[0] * (role == "up_proj")
        experts.gate_up_proj.data[int(expert), half : half + values.shape[0]] = values


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_an_interrupted_run_goes_on_where_it_was(name, tmp_path, monkeypatch):
    source = checkpoints.make(tmp_path / "source", name)
    whole = calibrated(source, tmp_path / "whole")
    real, calls = checkpoint.round_layer, []

    def interrupted(layer, chunks, wanted, search, known):
        calls.append(known is not None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(layer, chunks, wanted, search, known)

    monkeypatch.setattr(checkpoint, "round_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated(source, tmp_path / "again")
    calibrated(source, tmp_path / "again")
    assert calls == [False, False, True, False]
    told = [json.loads((folder / "blockscale.json").read_text()) for folder in (tmp_path / "again", whole)]
    assert told[0].get("calibrated_experts") == told[1].get("calibrated_experts")
    assert ("calibrated_experts" in told[0]) == (name != "llama")
    ours, theirs = data.read(tmp_path / "again"), data.read(whole)
    assert all(torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)) for key in theirs)


def test_other_settings_do_not_go_on_with_an_unfinished_run(tmp_path, monkeypatch):
    source = checkpoints.make(tmp_path / "source", "llama")
    monkeypatch.setattr(checkpoint, "round_layer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        calibrated(source, tmp_path / "result")
    with pytest.raises(BlockscaleError, match="overwrite"):
        calibrated(source, tmp_path / "result", tokens=1024)


def test_experts_that_see_too_few_tokens_are_rounded_plainly(tmp_path):
    source = checkpoints.make(tmp_path / "source", "qwen3_moe")
    quantize_checkpoint(source, tmp_path / "plain")
    # 128 for an expert on average: fewer than the 160 inputs of gate and up, more than the 72 of down.
    ours = weights_of(calibrated(source, tmp_path / "calibrated", tokens=384))
    same = {
        name: torch.equal(codes.view(torch.uint8), ours[name][0].view(torch.uint8))
        for name, (codes, _) in weights_of(tmp_path / "plain").items()
    }
    assert sum(same[name] for name in same if ".experts." in name and "down" not in name) >= 8  # of 12
    assert not all(same[name] for name in same if ".experts." in name and "down" in name)
    assert not any(same[name] for name in same if ".experts." not in name)


def test_the_manifest_and_the_report_tell_of_experts_with_too_few_tokens(tmp_path):
    source = checkpoints.make(tmp_path / "source", "qwen3_moe")
    folder = tmp_path / "result"
    rounder = CalibratedRounder(open_source(source), calibration(tokens=384))
    report = quantize_checkpoint(source, folder, rounder=rounder)
    (found,) = report.calibrated_experts
    assert (found.layer, found.experts, found.needed) == (1, 6, 160)
    assert 0 < found.least <= found.median < 160  # 384 tokens, 2 of 6 experts each
    plain, ours = tmp_path / "plain", weights_of(folder)
    quantize_checkpoint(source, plain)
    same = {
        name: torch.equal(codes.view(torch.uint8), ours[name][0].view(torch.uint8))
        for name, (codes, _) in weights_of(plain).items()
    }
    gates = [same[f"{FUSED}.{expert}.gate_proj.weight"] for expert in range(6)]
    assert found.plain == tuple(expert for expert, alike in enumerate(gates) if alike)
    assert 0 < len(found.plain) < 6
    (record,) = json.loads((folder / "blockscale.json").read_text())["calibrated_experts"]
    assert record["plain"] == list(found.plain)
    assert report.calibration_tokens == 384


def test_only_what_is_quantized_is_calibrated_and_other_layers_stay_exact(tmp_path):
    source = checkpoints.make(tmp_path / "source", "llama")
    folder = calibrated(source, tmp_path / "result", Recipe(include=("*.mlp.*",), block_size=(64, 64)))
    assert len(weights_of(folder)) == 6
    original, ours = data.read(source), data.read(folder)
    assert all(torch.equal(ours[name], original[name]) for name in original if ".mlp." not in name)


def test_too_few_tokens_are_refused_before_anything_is_rounded(tmp_path, monkeypatch):
    source = checkpoints.make(tmp_path / "source", "llama")
    monkeypatch.setattr(checkpoint, "round_layer", None)
    with pytest.raises(BlockscaleError, match=r"too few calibration tokens.*at least 200.*got 128"):
        calibrated(source, tmp_path / "result", tokens=128)


def test_too_short_a_text_is_refused(tmp_path):
    source = checkpoints.make(tmp_path / "source", "llama")
    with pytest.raises(BlockscaleError, match=r"too few calibration tokens.*2048 in the text.*got 1000"):
        calibrated(source, tmp_path / "result", text="x" * 1000)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_weight_with_nan_is_named(name, tmp_path):
    source = checkpoints.make(tmp_path / "source", name)
    tensors = data.read(source)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.up_proj\.weight.*first at \[3, 5\]"):
        calibrated(source, tmp_path / "result")


def test_a_full_disk_is_told_in_a_line_and_leaves_no_half_file(tmp_path, monkeypatch):
    source = checkpoints.make(tmp_path / "source", "llama")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("blockscale.calibrate.text.os.fsync", full)
    with pytest.raises(BlockscaleError, match="disk is full"):
        CalibratedRounder(open_source(source), calibration()).run(
            {"model.layers.0.mlp.up_proj.weight": BlockFP8()}, "float32", tmp_path, Silent()
        )
    assert not [each for each in tmp_path.iterdir() if each.suffix == ".safetensors"]


def test_a_repository_is_read_at_the_commit_that_was_opened():
    source = Source("org/name@main", object(), "org/name@0123abc/folder", pinned=True)
    assert local_or_hub(source) == ("org/name", {"revision": "0123abc", "subfolder": "folder"})
    with pytest.raises(BlockscaleError, match="transformers reads no URLs"):
        local_or_hub(Source("s3://bucket/name", object(), "bucket/name"))
