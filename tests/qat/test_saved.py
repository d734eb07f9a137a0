"""Saves are whole or not there."""

import json

import pytest
import torch

from blockscale import BlockscaleError
from blockscale.qat import saved
from blockscale.qat.history import Check, History, Step, recovered
from blockscale.qat.saved import newest, save

MODEL, MOMENTS = (
    {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)},
    {"a.exp_avg": torch.ones(4)},
)


def test_what_is_saved_is_found_and_the_one_before_is_gone(tmp_path):
    save(tmp_path, 3, MODEL, MOMENTS, {"x": 1})
    save(tmp_path, 12, MODEL, MOMENTS, {"x": [2, "y"]})
    found = newest(tmp_path)
    assert (found.step, found.facts) == (12, {"x": [2, "y"]})
    assert all(torch.equal(found.model()[name], each) for name, each in MODEL.items())
    assert torch.equal(found.optimizer()["a.exp_avg"], MOMENTS["a.exp_avg"])
    assert [each.name for each in tmp_path.iterdir()] == ["step-12"]


@pytest.mark.parametrize("dies_in", ["save_file", "sync_folder"])
def test_a_save_that_is_cut_off_leaves_the_one_before(tmp_path, monkeypatch, dies_in):
    save(tmp_path, 3, MODEL, MOMENTS, {})

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved, dies_in, die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 6, MODEL, MOMENTS, {})
    monkeypatch.undo()
    assert newest(tmp_path).step == 3
    save(tmp_path, 6, MODEL, MOMENTS, {})
    assert newest(tmp_path).step == 6


def test_nothing_saved_is_none_and_a_spoiled_file_is_named(tmp_path):
    assert newest(tmp_path) is None
    save(tmp_path, 3, MODEL, MOMENTS, {})
    (tmp_path / "step-3" / "facts.json").write_text("{")
    with pytest.raises(BlockscaleError, match=r"facts\.json"):
        newest(tmp_path)


def test_a_history_is_read_up_to_the_save_and_a_torn_line_is_dropped(tmp_path):
    file = tmp_path / "history.jsonl"
    written = History(file)
    entries = [
        Check(0, 2.0, 0.1),
        *(Step(step, 1.0 / step, 1e-3, 2.0, 0.5) for step in range(1, 6)),
        Check(5, 1, 0),
    ]
    for entry in entries:
        written.add(entry)
    with file.open("a") as stream:
        stream.write('{"step": 6, "lo')
    found = History.read(file, 3)
    assert found.steps == written.steps[:3]
    assert found.checks == written.checks[:1]
    assert all(json.loads(line)["step"] <= 3 for line in file.read_text().splitlines())
    found.add(Step(4, 9.0, 1e-3, 2.0, 0.5))
    assert History.read(file, 9).steps == found.steps


def test_what_is_recovered_is_a_share_of_the_gap():
    assert recovered(40.0, 42.0, 40.5) == 0.75
    assert recovered(40.0, 42.0, 43.0) == -0.5
    assert recovered(40.0, 40.0, 41.0) != recovered(40.0, 40.0, 41.0)  # NaN: there is no gap
