"""The destination: one writer at a time, nothing of others touched, nothing half-made."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from blockscale import Recipe, RunOptions, dequantize_checkpoint, quantize_checkpoint
from blockscale.checkpoint import convert
from blockscale.errors import BusyError
from tests import data

HOLDS = (
    "already holds a checkpoint, or files that the result would replace (got {}); "
    "choose another folder, or replace them with --overwrite"
)


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.llama(), shards=3)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def _refusal(source, out, keeps_shards=False, **options):
    return data.refusal(
        lambda: quantize_checkpoint(source, out, **options), source, out, keeps_shards=keeps_shards
    )


def test_two_runs_into_one_destination(source, out):
    (out / ".blockscale").mkdir(parents=True)
    with open(out / ".blockscale" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = _refusal(source, out)
        assert line == f"{out}: another run is writing here; wait for it, or use another folder"
        with pytest.raises(BusyError):
            quantize_checkpoint(source, out, run=RunOptions(overwrite=True))
        with pytest.raises(BusyError):
            dequantize_checkpoint(data.write(source.parent / "fp8", data.in_fp8(data.llama())), out)
    quantize_checkpoint(source, out)
    assert not (out / ".blockscale").exists()


def test_a_second_run_while_the_first_is_working(source, out, monkeypatch):
    refused = []
    finish = convert.finish_shard

    def during(*arguments):
        finish(*arguments)
        with pytest.raises(BusyError):
            quantize_checkpoint(source, out)
        refused.append(True)

    monkeypatch.setattr(convert, "finish_shard", during)
    quantize_checkpoint(source, out)
    assert len(refused) == 3
    assert data.read(out)


@pytest.mark.parametrize("place", ["source", "source/fp8", ".", "source/../source", "link", "link/fp8"])
def test_a_destination_that_overlaps_the_source(source, tmp_path, place):
    (tmp_path / "link").symlink_to(source)
    before = data.snapshot(tmp_path)
    line = data.refusal(lambda: quantize_checkpoint(source, tmp_path / place), source)
    assert line == f"{tmp_path / place}: source and destination overlap; write to another folder"
    assert data.snapshot(tmp_path) == before
    assert not (source / "fp8").exists()


def test_a_destination_whose_name_begins_like_the_source_is_another_folder(source):
    quantize_checkpoint(source, source.parent / "source-fp8")


def test_a_destination_that_is_a_file(source, out):
    out.write_bytes(b"precious")
    assert _refusal(source, out) == f"{out}: cannot be written to: Not a directory"
    assert _refusal(source, out / "sub") == f"{out / 'sub'}: cannot be written to: Not a directory"
    assert out.read_bytes() == b"precious"


def test_a_destination_that_cannot_be_made(source):
    assert _refusal(source, Path("/proc/blockscale")).startswith("/proc/blockscale: cannot be written to: ")


def test_a_folder_with_another_checkpoint_is_refused_and_left_alone(source, out):
    data.write(out, data.llama(hidden=64), shards=2)
    assert _refusal(source, out) == f"{out}: {HOLDS.format('config.json')}"


@pytest.mark.parametrize("name", ["model-00001-of-00009.safetensors", "config.json", data.INDEX])
def test_a_folder_with_a_part_of_a_checkpoint_is_refused(source, out, name):
    out.mkdir()
    (out / name).write_bytes(b"{}")
    assert _refusal(source, out) == f"{out}: {HOLDS.format(name)}"


def test_other_options_do_not_touch_a_finished_result(source, out):
    quantize_checkpoint(source, out)
    line = _refusal(source, out, recipe=Recipe("ue8m0"))
    assert line == f"{out}: {HOLDS.format('blockscale.json')}"
    (source / "tokenizer.json").write_bytes(b"new")
    assert _refusal(source, out) == f"{out}: {HOLDS.format('blockscale.json')}"


def test_overwrite_replaces_a_finished_result(source, out):
    quantize_checkpoint(source, out)
    first = data.contents(out)
    report = quantize_checkpoint(source, out, run=RunOptions(overwrite=True))
    assert not report.already_complete
    assert data.contents(out) == first
    quantize_checkpoint(source, out, Recipe("ue8m0"), run=RunOptions(overwrite=True))
    quantize_checkpoint(source, source.parent / "fresh", Recipe("ue8m0"))
    assert data.contents(out) == data.contents(source.parent / "fresh")


def test_files_of_others_survive_beside_and_below(source, out):
    others = {
        "README.md": b"mine",
        "other/model.safetensors": b"a model of its own",
        "other/config.json": b"{}",
        ".gitattributes": b"*",
    }
    for name, content in others.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    for overwrite in (False, True):
        quantize_checkpoint(source, out, run=RunOptions(overwrite=overwrite))
        assert others.items() <= data.contents(out).items()


def test_stale_shards_of_a_replaced_model_go(source, out):
    data.write(out, data.llama(hidden=64), shards=5)
    quantize_checkpoint(source, out, run=RunOptions(overwrite=True))
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]


def test_the_replaced_model_is_whole_until_the_commit(source, out, monkeypatch):
    data.write(out, data.llama(hidden=64), shards=5)
    before = data.contents(out)
    finish, seen = convert.finish_shard, []

    def look(*arguments):
        finish(*arguments)
        seen.append(
            {name: raw for name, raw in data.contents(out).items() if not name.startswith(".blockscale/")}
        )

    monkeypatch.setattr(convert, "finish_shard", look)
    quantize_checkpoint(source, out, run=RunOptions(overwrite=True))
    assert seen == [before] * 3


def test_a_failed_run_takes_nothing_along_that_others_put_there_meanwhile(source, out, monkeypatch):
    def fail(*_):
        (out / "notes.txt").write_bytes(b"just written")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(Exception, match="Input/output error"):
        quantize_checkpoint(source, out)
    assert data.contents(out) == {"notes.txt": b"just written"}


def test_a_file_that_the_result_would_replace_is_not_replaced_unasked(source, out):
    out.mkdir()
    (out / "tokenizer.json").write_bytes(b"mine")
    assert _refusal(source, out) == f"{out}: {HOLDS.format('tokenizer.json')}"
    quantize_checkpoint(source, out, run=RunOptions(overwrite=True))
    assert (out / "tokenizer.json").read_bytes() == data.CARRIED["tokenizer.json"]


def test_overwrite_leaves_an_adapter_but_no_shard_of_the_old_checkpoint(source, out):
    names = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(data.llama().tensors)}
    data.write(out, data.llama(), names)
    (out / "adapter_model.safetensors").write_bytes(b"theirs")
    (out / "model-00009-of-00009.safetensors").write_bytes(b"in no index")
    quantize_checkpoint(source, out, run=RunOptions(overwrite=True))
    shards = {path.name for path in out.glob("*.safetensors")}
    assert shards == {"adapter_model.safetensors"} | {
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    }


def test_progress_counts_what_this_run_does(source, out, monkeypatch):
    class Counts:
        def start(self, nbytes, tensors):
            self.total, self.done = [nbytes, tensors], [0, 0]

        def advance(self, nbytes, tensors):
            self.done = [self.done[0] + nbytes, self.done[1] + tensors]

    def fail(*arguments):
        raise KeyboardInterrupt

    whole, rest = Counts(), Counts()
    with monkeypatch.context() as patch:
        patch.setattr(convert, "stage_rest", fail)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, out, run=RunOptions(progress=whole))
    (out / ".blockscale" / "staging" / "model-00002-of-00003.safetensors").unlink()
    assert quantize_checkpoint(source, out, run=RunOptions(progress=rest)).resumed_shards == 2
    assert whole.done == whole.total
    assert rest.done == rest.total
    assert 0 < rest.total[0] < whole.total[0] / 2
