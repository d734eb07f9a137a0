"""Calibrated rounding holds one decoder layer at a time, and reads what it needs for it."""

import gc

import pytest
import torch

from blockscale.calibrate import checkpoint
from blockscale.calibrate.checkpoint import CalibratedRounder
from blockscale.calibrate.text import SELF, Calibration
from blockscale.checkpoint.progress import Silent
from blockscale.checkpoint.source import open_source
from blockscale.formats import BlockFP8
from tests import data

checkpoints = pytest.importorskip("tests.huggingface.checkpoints")
partial = pytest.importorskip("blockscale.huggingface.partial")
TEXT = "".join(chr(48 + (i * i * 7 + i // 3) % 64) for i in range(40000))
LAYERS = 3  # a first, an inner and a last one


def rounder(folder, text=TEXT):
    return CalibratedRounder(
        open_source(folder), Calibration((text,), lambda text: [ord(each) % 64 for each in text], 512, 64)
    )


def weights_of(folder):
    names = [name for name, each in data.read(folder).items() if each.dim() == 2 and ".layers." in name]
    return {name: BlockFP8() for name in names if "gate.weight" not in name}


def parameter_bytes() -> int:
    """Of all parameters in memory, each tensor once."""
    storages = {}
    for each in gc.get_objects():
        if type(each) is torch.nn.Parameter and not each.is_meta:
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture(params=["llama", "qwen3_moe"])
def folder(request, tmp_path):
    return checkpoints.make(tmp_path / "source", request.param, num_hidden_layers=LAYERS)


def test_no_more_than_a_layer_is_in_memory(folder, tmp_path, monkeypatch):
    gc.collect()
    already, seen = parameter_bytes(), []
    real = checkpoint.round_layer

    def measured(layer, *rest):
        mine = sum(each.numel() * each.element_size() for each in layer.parameters())
        assert not any(each.is_meta for each in [*layer.parameters(), *layer.buffers()])
        gc.collect()
        seen.append((parameter_bytes() - already, mine))
        return real(layer, *rest)

    monkeypatch.setattr(checkpoint, "round_layer", measured)
    rounder(folder).run(weights_of(folder), "float32", tmp_path, Silent())
    assert len(seen) == LAYERS
    assert all(held <= mine for held, mine in seen)


def test_a_layer_is_gone_before_the_next_one_is_read(folder, tmp_path, monkeypatch):
    real, before = partial.read_tensor, {}

    def noted(source, entry):
        layer = entry.name.split(".")[2]
        if layer.isdigit() and layer not in before:
            gc.collect()
            before[layer] = parameter_bytes()
        return real(source, entry)

    monkeypatch.setattr(partial, "read_tensor", noted)
    gc.collect()
    already = parameter_bytes()
    rounder(folder).run(weights_of(folder), "float32", tmp_path, Silent())
    assert before == {str(number): already for number in range(LAYERS)}


def test_every_layer_reads_its_own_tensors_once(folder, tmp_path, monkeypatch):
    read, real, found = [], partial.read_tensor, []
    monkeypatch.setattr(
        partial, "read_tensor", lambda source, entry: read.append(entry.name) or real(source, entry)
    )
    monkeypatch.setattr(
        checkpoint,
        "round_layer",
        lambda *a, make=checkpoint.round_layer: found.append(list(read)) or read.clear() or make(*a),
    )
    rounder(folder).run(weights_of(folder), "float32", tmp_path, Silent())
    own = [[name for name in names if ".layers." in name] for names in found]
    for number, names in enumerate(own):
        prefix = f"model.layers.{number}."
        assert sorted(names) == sorted(name for name in data.read(folder) if name.startswith(prefix))
    assert all(names == mine for names, mine in zip(found[1:], own[1:], strict=True))
    assert not any("lm_head" in name for name in found[0])


def test_the_whole_model_is_loaded_only_to_write_text(folder, tmp_path, monkeypatch):
    loaded, real = [], checkpoint.load_as_stored
    monkeypatch.setattr(
        checkpoint, "load_as_stored", lambda source: loaded.append(source.root) or real(source)
    )
    for text in (TEXT, SELF):
        place = tmp_path / str(len(text))
        place.mkdir()
        rounder(folder, text).run(weights_of(folder), "float32", place, Silent())
    assert loaded == [str(folder)]
