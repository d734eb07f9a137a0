"""Weights that a rounder has rounded become the result as they are; the others are rounded to nearest."""

import json
import shutil
from collections import namedtuple

import fsspec
import pytest
import torch

from blockscale import BlockscaleError, Recipe, RunOptions, quantize_checkpoint, verify_checkpoint
from blockscale.checkpoint import convert, strips
from blockscale.formats import BlockFP8
from tests import data
from tests.checkpoint.rounders import StepUp, stepped

Q = "model.layers.0.self_attn.q_proj.weight"
FUSED = {"nk": "qwen3_moe", "kn": "gpt_oss"}


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.llama(), shards=3)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def _manifest(folder):
    return json.loads((folder / "blockscale.json").read_text())


def _same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _expected(source, plain, rounder, suffix="_scale_inv"):
    """The tensors of a plain result, with those of the rounder in their places."""
    weights, tensors = data.read(source), data.read(plain)
    for name, fmt in rounder.asked.items():
        if rounder.wants(name):
            tensors[name], tensors[name + suffix] = stepped(weights[name], fmt, rounder.every)
    return tensors


@pytest.mark.parametrize("layout", ["deepseek", "compressed-tensors"])
@pytest.mark.parametrize("recipe", [{}, {"scale_fmt": "ue8m0", "block_size": (32, 48)}])
def test_codes_and_scales_are_the_rounders_and_the_rest_is_plain(tmp_path, source, out, layout, recipe):
    recipe = Recipe(**recipe, layout=layout)
    quantize_checkpoint(source, tmp_path / "plain", recipe)
    rounder = StepUp(source, wants=lambda name: "self_attn" in name)
    report = quantize_checkpoint(source, out, recipe, rounder=rounder)
    suffix = "_scale_inv" if layout == "deepseek" else "_scale"
    expected, found = _expected(source, tmp_path / "plain", rounder, suffix), data.read(out)
    assert found.keys() == expected.keys()
    assert all(_same(found[name], expected[name]) for name in expected)
    assert not _same(found[Q], data.read(tmp_path / "plain")[Q])
    assert len(rounder.asked) == report.tensors["quantize"] == 7
    assert set(rounder.asked.values()) == {BlockFP8(recipe.block_size, recipe.scale_fmt)}
    assert report.calibrated == 4
    assert _manifest(out)["calibrated"] == sorted(rounder.rounded)
    assert not (out / ".blockscale").exists()


def _fused(tmp_path, axes):
    source = data.write(tmp_path / "source", data.fused_experts(FUSED[axes], axes))
    recipe = Recipe(block_size=(32, 16))
    quantize_checkpoint(source, tmp_path / "plain", recipe)
    return source, recipe


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("axes", ["nk", "kn"])
def test_fused_experts_have_blocks_on_their_axes_as_stored(tmp_path, out, monkeypatch, axes, lanes):
    source, recipe = _fused(tmp_path, axes)
    if lanes:
        monkeypatch.setattr(convert, "usable_device", lambda asked: "cpu:0")
    rounder = StepUp(source, wants=lambda name: "experts" in name)
    quantize_checkpoint(source, out, recipe, rounder=rounder)
    sizes = {fmt.block_size for name, fmt in rounder.asked.items() if "experts" in name}
    assert sizes == {(32, 16) if axes == "nk" else (16, 32)}
    expected, found = _expected(source, tmp_path / "plain", rounder), data.read(out)
    assert found.keys() == expected.keys()
    assert all(_same(found[name], expected[name]) for name in expected)
    assert len(rounder.rounded) == 2
    assert verify_checkpoint(out, source).problems == ()


def test_strips_of_one_row_of_blocks_are_the_same(tmp_path, monkeypatch):
    source, recipe = _fused(tmp_path, "nk")
    quantize_checkpoint(source, tmp_path / "whole", recipe, rounder=StepUp(source))
    monkeypatch.setattr(strips, "CHUNK_BYTES", 1)
    quantize_checkpoint(source, tmp_path / "strips", recipe, rounder=StepUp(source))
    assert data.contents(tmp_path / "strips") == data.contents(tmp_path / "whole")


def test_a_rounder_that_leaves_everything_changes_no_tensor(tmp_path, source, out):
    quantize_checkpoint(source, tmp_path / "plain")
    report = quantize_checkpoint(source, out, rounder=StepUp(source, wants=lambda name: False))
    plain, found = data.contents(tmp_path / "plain"), data.contents(out)
    assert report.calibrated == 0
    assert _manifest(out)["calibrated"] == []
    assert {name for name in plain if plain[name] != found[name]} == {"blockscale.json"}
    assert "calibrated" not in _manifest(tmp_path / "plain")


def test_chosen_block_sizes_reach_the_rounder(source, out):
    rounder = StepUp(source)
    quantize_checkpoint(source, out, Recipe(block_size="auto"), rounder=rounder)
    assert _manifest(out)["calibrated"] == sorted(rounder.asked)
    assert verify_checkpoint(out, source).problems == ()
    assert quantize_checkpoint(
        source, out, Recipe(block_size="auto"), rounder=StepUp(source)
    ).already_complete


def test_a_remote_destination(tmp_path, source, out, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    quantize_checkpoint(source, out, rounder=StepUp(source))
    quantize_checkpoint(source, "memory://rounded/result", rounder=StepUp(source))
    fs, root = fsspec.core.url_to_fs("memory://rounded/result")
    fs.get(root, str(tmp_path / "got"), recursive=True)
    fs.rm(root, recursive=True)
    assert data.contents(tmp_path / "got") == data.contents(out)
    assert data.contents(tmp_path / "cache") == {}


def test_a_cluster_is_refused(source, out):
    run = RunOptions(cluster="auto")
    line = data.refusal(
        lambda: quantize_checkpoint(source, out, run=run, rounder=StepUp(source)), source, out
    )
    assert line == "cluster auto: weights are calibrated on one machine; leave out --cluster"


def test_a_disk_that_is_too_small_is_told_before_anything_is_rounded(source, out, monkeypatch):
    usage = namedtuple("usage", "total used free")(1, 1, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    rounder = StepUp(source)
    line = data.refusal(lambda: quantize_checkpoint(source, out, rounder=rounder), source, out)
    assert "not enough disk space" in line
    assert rounder.rounded == []


def test_progress_counts_what_the_rounder_and_the_converter_do(source, out):
    class Counts:
        total, done = [0, 0], [0, 0]

        def start(self, nbytes, tensors):
            self.total = [self.total[0] + nbytes, self.total[1] + tensors]

        def advance(self, nbytes, tensors):
            self.done = [self.done[0] + nbytes, self.done[1] + tensors]

    counts, model = Counts(), data.llama()
    quantize_checkpoint(source, out, run=RunOptions(progress=counts), rounder=StepUp(source))
    assert counts.done == counts.total
    assert counts.total == [
        sum(tensor.nbytes for tensor in model.tensors.values()),
        len(model.tensors) + 7,
    ]


def _stop_at(count):
    calls = []

    def stop(name):
        calls.append(name)
        if len(calls) == count:
            raise KeyboardInterrupt

    return stop


def test_a_file_that_is_cut_short_is_refused(source, out):
    rounder = StepUp(source, before=_stop_at(3))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, rounder=rounder)
    file = out / ".blockscale" / "rounded" / f"{rounder.rounded[0]}.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    line = data.told(lambda: quantize_checkpoint(source, out, rounder=StepUp(source)))
    assert line.startswith(f"{file}: cannot be used (got {file.name}: file is truncated (")
    assert line.endswith("; remove the file and run the same command again")


def test_what_was_rounded_before_an_interruption_is_not_rounded_again(tmp_path, source, out):
    quantize_checkpoint(source, tmp_path / "whole", rounder=StepUp(source))
    first, second = StepUp(source, before=_stop_at(4)), StepUp(source)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, rounder=first)
    assert len(first.rounded) == 3
    assert [path.name for path in out.iterdir()] == [".blockscale"]
    report = quantize_checkpoint(source, out, rounder=second)
    assert sorted(first.rounded + second.rounded) == sorted(second.asked)
    assert report.calibrated == 7
    assert data.contents(out) == data.contents(tmp_path / "whole")


def test_an_interruption_before_anything_was_rounded_leaves_nothing(source, out):
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, rounder=StepUp(source, before=_stop_at(1)))
    assert data.contents(out) == {}


def test_an_interrupted_conversion_goes_on_with_what_was_rounded(tmp_path, source, out, monkeypatch):
    quantize_checkpoint(source, tmp_path / "whole", rounder=StepUp(source))

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "finish_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, out, rounder=StepUp(source))
    again = StepUp(source)
    assert quantize_checkpoint(source, out, rounder=again).resumed_shards == 0
    assert again.rounded == []
    assert data.contents(out) == data.contents(tmp_path / "whole")


def test_killed_at_steps_and_run_again(tmp_path, crash):
    source = data.write(tmp_path / "source", data.llama(hidden=64, intermediate=96), shards=3)
    whole = crash(source, tmp_path / "whole", rounder=True)
    expected = data.contents(tmp_path / "whole")
    assert len(_manifest(tmp_path / "whole")["calibrated"]) == 7
    for step in range(1, whole["steps"] + 1, 2):
        target = tmp_path / str(step)
        assert crash(source, target, rounder=True, kill_at=step) == {"killed": True}
        assert "error" not in crash(source, target, rounder=True)
        assert data.contents(target) == expected, f"step {step}: another result than without the kill"


def test_settings_are_a_part_of_the_plan(source, out):
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, rounder=StepUp(source, before=_stop_at(3)))
    before = data.contents(out)
    for other in (StepUp(source, every=5), None):
        with pytest.raises(BlockscaleError, match="unfinished run of another plan"):
            quantize_checkpoint(source, out, rounder=other)
        assert data.contents(out) == before
    changed = StepUp(source, every=5)
    quantize_checkpoint(source, out, run=RunOptions(overwrite=True), rounder=changed)
    assert sorted(changed.rounded) == sorted(changed.asked), "nothing of other settings was taken over"
    assert _manifest(out)["options"]["calibration"] == {"every": 5}
    again = StepUp(source, every=5)
    assert quantize_checkpoint(source, out, rounder=again).already_complete
    assert again.asked == {}
    for other in (StepUp(source), None):
        with pytest.raises(BlockscaleError, match="already holds a checkpoint"):
            quantize_checkpoint(source, out, rounder=other)
