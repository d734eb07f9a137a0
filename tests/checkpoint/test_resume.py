"""Killed at any change to the disk, a run leaves nothing half-made; run again, it ends in the same bytes."""

import json
import shutil

import pytest

from blockscale.checkpoint.ranks import read_rank_index
from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError
from tests import data

FILES = {"tokenizer.json": b"{}", "assets/logo.png": b"\x89PNG"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A small BF16 checkpoint in three shards, the same as FP8, and another model."""
    folder = tmp_path_factory.mktemp("sources")
    model = data.Model(data.llama(hidden=64, intermediate=96).tensors, data.llama().config, FILES)
    fp8 = data.in_fp8(model, scale_fmt="ue8m0")
    other = data.llama(hidden=32, intermediate=64)
    return {
        "quantize": data.write(folder / "bf16", model, shards=3),
        "dequantize": data.write(folder / "fp8", fp8, shards=3),
        "other": data.write(folder / "other", other, shards=5),
    }


def _visible(folder):
    return {name: raw for name, raw in data.contents(folder).items() if not name.startswith(".blockscale/")}


def _journal(folder):
    path = folder / ".blockscale" / "journal.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def _weights(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as shard:
        return set(shard.keys())


def _todo(source, journal):
    """Names of the tensors whose shards the journal does not hold yet."""
    if any("commit" in record for record in journal):
        return set()
    done = {record["shard"] for record in journal if "shard" in record}
    shards = {path.name: _weights(path) for path in source.glob("*.safetensors")}
    return {name for file, names in shards.items() if file not in done for name in names}


@pytest.mark.parametrize(
    ("command", "workers", "stride"), [("quantize", 1, 1), ("dequantize", 1, 3), ("quantize", 3, 4)]
)
def test_killed_at_every_step_and_run_again(tmp_path, crash, sources, command, workers, stride):
    source = sources[command]
    scales = {name for name in data.read(source) if name.endswith("_scale_inv")}
    whole = crash(source, tmp_path / "whole", command=command, workers=workers)
    expected = data.contents(tmp_path / "whole")
    assert whole["resumed"] == 0
    committed = 0
    for step in range(1, whole["steps"] + 1, stride):
        target = tmp_path / str(step)
        options = {"command": command, "workers": workers}
        assert crash(source, target, kill_at=step, **options) == {"killed": True}
        visible, journal = _visible(target), _journal(target)
        assert visible.items() <= expected.items(), f"step {step}: half-made file under a final name"
        assert "config.json" not in visible or visible == expected, f"step {step}: looks complete and is not"
        assert not visible or any("commit" in record for record in journal) or visible == expected
        committed += "config.json" in visible
        answer = crash(source, target, **options)
        assert data.contents(target) == expected, f"step {step}: another result than without the kill"
        if answer["already_complete"]:
            assert visible == expected
        else:
            todo = _todo(source, journal) - scales
            assert sorted(answer["tasks"]) == sorted(todo), f"step {step}: finished work was done again"
            assert answer["resumed"] == sum("shard" in record for record in journal)
    assert committed, "kills in the last part of the commit were tried"


def test_killed_while_replacing_another_model_which_stays_loadable_until_the_commit(tmp_path, crash, sources):
    source = sources["quantize"]
    crash(source, tmp_path / "whole", overwrite=True)
    new = data.contents(tmp_path / "whole")
    crash(sources["other"], tmp_path / "old")
    mine = {"NOTES.md": b"mine", "sub/model.safetensors": b"of another model", "empty.txt": b"edited"}
    old = data.contents(tmp_path / "old") | mine

    def restore(folder):
        for name, raw in old.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)
        return folder

    steps = crash(source, restore(tmp_path / "count"), overwrite=True)["steps"]
    # The old model's tokenizer, remote code and chat template would pass for the new model's: they go, too.
    assert data.contents(tmp_path / "count") == new | mine
    states = set()
    for step in range(1, steps + 1, 2):
        target = restore(tmp_path / str(step))
        assert crash(source, target, overwrite=True, kill_at=step) == {"killed": True}
        visible = _visible(target)
        if "config.json" in visible:
            assert visible in (old, new | mine), f"step {step}: a mixture that looks like a model"
            states.add("old" if visible == old else "new")
        else:
            states.add("neither")
            assert all(raw in (old.get(name), new.get(name)) for name, raw in visible.items())
        assert crash(source, target, overwrite=True).get("error") is None
        assert data.contents(target) == new | mine, f"step {step}"
    assert states == {"old", "neither", "new"}


def _ranks(folder):
    """The bytes of every tensor of both ranks as a reader finds them, or None if it is refused."""
    try:
        source = open_source(folder)
        found = [read_rank_index(source, rank, 2).tensors for rank in (0, 1)]
    except BlockscaleError:
        return None
    return [
        {name: source.read(entry.file, entry.start, entry.nbytes) for name, entry in tensors.items()}
        for tensors in found
    ]


def test_shards_for_ranks_are_never_a_mixture(tmp_path, crash):
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 1}
    names = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight")
    old = data.Model({name: data.weight(name, 8, 8) for name in names}, config, FILES)
    new = data.Model({name: tensor + 1 for name, tensor in old.tensors.items()}, config, FILES)
    sources = {name: data.write(tmp_path / name, model) for name, model in (("old", old), ("new", new))}
    for name, source in sources.items():
        crash(source, tmp_path / f"whole {name}", command="convert")
    expected = data.contents(tmp_path / "whole new")
    states = {"old": _ranks(tmp_path / "whole old"), "new": _ranks(tmp_path / "whole new"), "neither": None}
    shutil.copytree(tmp_path / "whole old", tmp_path / "count")
    steps = crash(sources["new"], tmp_path / "count", command="convert", overwrite=True)["steps"]
    for replaced in (False, True):
        seen = set()
        for step in range(1, steps + 1, 2):
            target = tmp_path / f"{step} {replaced}"
            if replaced:
                shutil.copytree(tmp_path / "whole old", target)
            options = {"command": "convert", "overwrite": replaced}
            if "steps" in crash(sources["new"], target, kill_at=step, **options):
                break  # without old files there is less to do
            found = _ranks(target)
            assert found in states.values(), f"step {step}: a mixture"
            seen.add(next(name for name, state in states.items() if state == found))
            visible = _visible(target)
            assert replaced or visible.items() <= expected.items(), f"step {step}: half-made file"
            crash(sources["new"], target, **options)
            assert data.contents(target) == expected, f"step {step}: another result than without the kill"
        assert seen == ({"old", "neither", "new"} if replaced else {"neither", "new"})


def test_killed_over_and_over(tmp_path, crash, sources):
    source = sources["quantize"]
    crash(source, tmp_path / "whole")
    target, runs = tmp_path / "target", 0
    while crash(source, target, kill_at=25) == {"killed": True}:
        runs += 1
        assert runs < 100, "no progress from run to run"
    assert runs > 1
    assert data.contents(target) == data.contents(tmp_path / "whole")


@pytest.mark.parametrize("records", [1, 2, 4, 5])
def test_a_torn_journal_line_counts_for_nothing(tmp_path, crash, sources, records):
    source = sources["quantize"]
    crash(source, tmp_path / "whole")
    folder = tmp_path / "run"
    assert crash(source, folder, records=records) == {"killed": True}
    lines = (folder / ".blockscale" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    last = len(lines[-1])
    for cut, junk in ((1, b""), (1, b"\x00\xff"), (2, b""), (last // 2, b""), (last, b"{")):
        target = tmp_path / f"{cut}-{len(junk)}"
        shutil.copytree(folder, target)
        (target / ".blockscale" / "journal.jsonl").write_bytes(b"".join(lines)[:-cut] + junk)
        answer = crash(source, target)
        assert data.contents(target) == data.contents(tmp_path / "whole")
        assert answer["resumed"] == max(0, records - 2)


def test_what_is_recorded_after_a_torn_line_counts(tmp_path, crash, sources):
    source, folder = sources["quantize"], tmp_path / "run"
    assert crash(source, folder, records=2) == {"killed": True}
    journal = folder / ".blockscale" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    assert crash(source, folder, records=1) == {"killed": True}
    assert crash(source, folder)["resumed"] == 1


def test_a_journaled_shard_that_somebody_removed_is_made_again(tmp_path, crash, sources):
    source = sources["quantize"]
    crash(source, tmp_path / "whole", recipe={})
    # Replacing a result of the same sizes: the old shards must not pass for the missing new ones.
    folder = tmp_path / "target"
    crash(source, folder)
    assert crash(source, folder, recipe={}, overwrite=True, records=3) == {"killed": True}
    for shard in (folder / ".blockscale" / "staging").glob("*.safetensors"):
        shard.unlink()
    answer = crash(source, folder, recipe={}, overwrite=True)
    assert answer["resumed"] == 0
    assert data.contents(folder) == data.contents(tmp_path / "whole")


def test_a_run_that_was_killed_refuses_other_options_and_a_changed_source(tmp_path, crash, sources):
    model = data.llama(hidden=64, intermediate=96)
    source = data.write(tmp_path / "source", model, shards=3)
    folder = tmp_path / "run"
    assert crash(source, folder, records=3) == {"killed": True}
    line = (
        f"{folder}: holds an unfinished run of another plan: the source, the options or the version changed; "
        "repeat the earlier command to finish it, or discard it with --overwrite"
    )
    before = data.contents(folder)
    assert crash(source, folder, recipe={"block_size": [64, 64]}) == {"error": line}
    assert data.contents(folder) == before
    (source / "tokenizer.json").write_bytes(b"changed")
    assert crash(source, folder) == {"error": line}
    assert data.contents(folder) == before
    (source / "tokenizer.json").unlink()
    assert crash(source, folder) == {"error": line}
    answer = crash(source, folder, overwrite=True)
    assert answer["resumed"] == 0
    crash(source, tmp_path / "whole")
    assert data.contents(folder) == data.contents(tmp_path / "whole")
