"""Disks that are full or fail, sources that move, Ctrl-C: one line, nothing lost, the next run goes on."""

import contextlib
import errno
import os
import subprocess

import pytest
from safetensors.torch import save_file

from blockscale import RunOptions, quantize_checkpoint
from blockscale.checkpoint import convert, engine, strips, workspace, writer
from tests import data

FULL = "disk is full; free some space and run the same command again: finished shards are kept"


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


@contextlib.contextmanager
def _failing(monkeypatch, module, name, after, error=errno.ENOSPC):
    """`module.name` raises an OSError from its call number `after` on."""
    real, calls = getattr(module, name), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) >= after:
            raise OSError(error, os.strerror(error))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        yield calls


def _count_calls(monkeypatch, source, out, module, name):
    with _failing(monkeypatch, module, name, after=10**9) as calls:
        quantize_checkpoint(source, out)
    return len(calls)


def test_a_disk_that_is_full_at_any_write(source, out, tmp_path, monkeypatch):
    calls = _count_calls(monkeypatch, source, tmp_path / "whole", os, "pwrite")
    resumed, run = set(), RunOptions(workers=1)  # more threads finish shards in an order of their own
    for after in range(1, calls + 1, 2):
        out = tmp_path / str(after)
        with _failing(monkeypatch, os, "pwrite", after), pytest.raises(workspace.BlockscaleError) as caught:
            quantize_checkpoint(source, out, run=run)
        assert str(caught.value).startswith(f"{out}/.blockscale/staging/model-0000")
        assert str(caught.value).endswith(f".safetensors: {FULL}")
        assert all(name.startswith(".blockscale/") for name in data.contents(out))
        resumed.add(quantize_checkpoint(source, out, run=run).resumed_shards)
        assert data.contents(out) == data.contents(tmp_path / "whole")
    assert resumed == {0, 1, 2}, "shards that were finished before the disk was full are kept"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_sync(source, tmp_path, monkeypatch, error):
    calls = _count_calls(monkeypatch, source, tmp_path / "whole", os, "fsync")
    whole = data.contents(tmp_path / "whole")
    for after in range(1, calls + 1):
        out = tmp_path / str(after)
        with (
            _failing(monkeypatch, os, "fsync", after, error),
            pytest.raises(workspace.BlockscaleError) as caught,
        ):
            quantize_checkpoint(source, out)
        line = str(caught.value)
        assert line.startswith(str(out)), line
        assert FULL in line if error == errno.ENOSPC else "cannot be written: Input/output error" in line
        left = {name: raw for name, raw in data.contents(out).items() if not name.startswith(".blockscale/")}
        assert "config.json" not in left or left == whole
        quantize_checkpoint(source, out)
        assert data.contents(out) == whole


def test_an_error_of_the_early_write_back_is_not_lost(source, out, monkeypatch):
    """The kernel reports a failed write-back once: to fdatasync, and then the final fsync succeeds."""
    monkeypatch.setattr(engine, "_FLUSH_BYTES", 0)
    with _failing(monkeypatch, os, "fdatasync", 1, errno.EIO) as calls:
        line = _refusal(source, out)
    assert calls, "the early write-back was tried"
    assert line.startswith(f"{out}/.blockscale/staging/model-0000")
    assert line.endswith("cannot be written: Input/output error")


def test_the_early_write_back_changes_nothing(source, out, tmp_path, monkeypatch):
    quantize_checkpoint(source, tmp_path / "whole")
    monkeypatch.setattr(engine, "_FLUSH_BYTES", 0)
    calls = _count_calls(monkeypatch, source, out, os, "fdatasync")
    assert calls > 3, "there were early write-backs"
    assert data.contents(out) == data.contents(tmp_path / "whole")


def test_a_rename_that_fails_leaves_the_commit_to_the_next_run(source, out, tmp_path, monkeypatch):
    with (
        _failing(monkeypatch, os, "replace", 4, errno.EACCES),
        pytest.raises(workspace.BlockscaleError) as caught,
    ):
        quantize_checkpoint(source, out)
    assert str(caught.value).endswith(": cannot be written: Permission denied")
    assert not (out / "config.json").exists()
    quantize_checkpoint(source, out)
    quantize_checkpoint(source, tmp_path / "whole")
    assert data.contents(out) == data.contents(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_disk_that_is_too_small(source, small_disk, tmp_path, monkeypatch):
    big = data.write(tmp_path / "big", data.llama(hidden=1024, intermediate=1024))
    out = small_disk / "out"
    line = _refusal(big, out)
    assert line.startswith(f"{out}: not enough disk space (expected 0.01 GB free, got 0.00 GB")
    monkeypatch.setattr(convert, "_check_space", lambda *_: None)
    assert _refusal(big, out) == f"{out}/.blockscale/staging/model.safetensors: {FULL}"


def test_a_source_file_that_shrinks_while_it_is_read(source, out, monkeypatch):
    shard, run_task = source / "model-00003-of-00003.safetensors", engine.run_task

    def shrink(task, *rest):
        os.truncate(shard, 100)
        return run_task(task, *rest)

    monkeypatch.setattr(engine, "run_task", shrink)
    with pytest.raises(workspace.BlockscaleError) as caught:
        quantize_checkpoint(source, out)
    assert str(caught.value) == f"{shard}: file became shorter while it was read; fetch the file again"
    assert not any(not name.startswith(".blockscale/") for name in data.contents(out))


@pytest.mark.parametrize(
    "change", ["rewrite a shard", "touch a shard", "edit the tokenizer", "edit the config"]
)
def test_a_source_that_changes_during_the_run(source, out, monkeypatch, change):
    finish, done = convert.finish_shard, []
    name = {"t": "tokenizer.json", "c": "config.json"}.get(
        change.split()[-1][0], "model-00001-of-00003.safetensors"
    )

    def after(*arguments):
        finish(*arguments)
        if not done and change == "rewrite a shard":
            tensors = {n: t.clone().fill_(0.5) for n, t in _load(source / name).items()}
            save_file(tensors, source / name, {"format": "pt"})
        elif not done and change == "touch a shard":
            os.utime(source / name, ns=(1, 1))
        elif not done:
            (source / name).write_bytes(b"{}")
        done.append(True)

    monkeypatch.setattr(convert, "finish_shard", after)
    with pytest.raises(workspace.BlockscaleError) as caught:
        quantize_checkpoint(source, out)
    assert str(caught.value) == f"{name}: source file changed during the run; run again with --overwrite"
    assert not any(not name.startswith(".blockscale/") for name in data.contents(out))


def _load(path):
    from safetensors.torch import load

    return load(path.read_bytes())


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", "tokenizer.json"])
def test_a_source_file_that_vanishes_during_the_run(source, out, monkeypatch, name):
    finish = convert.finish_shard

    def after(*arguments):
        (source / name).unlink(missing_ok=True)
        finish(*arguments)

    monkeypatch.setattr(convert, "finish_shard", after)
    with pytest.raises(workspace.BlockscaleError) as caught:
        quantize_checkpoint(source, out)
    assert str(source / name) in str(caught.value)
    assert "config.json" not in data.contents(out)


def test_ctrl_c_keeps_finished_shards_and_the_next_run_goes_on(source, out, tmp_path, monkeypatch):
    run_task, ran = engine.run_task, []

    def interrupt(task, *rest):
        ran.append(task)
        if len(ran) == 10:
            raise KeyboardInterrupt
        return run_task(task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "run_task", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, out, run=RunOptions(workers=1))
    assert all(name.startswith(".blockscale/") for name in data.contents(out))
    report = quantize_checkpoint(source, out)
    assert report.resumed_shards == 2
    quantize_checkpoint(source, tmp_path / "whole")
    assert data.contents(out) == data.contents(tmp_path / "whole")


def test_open_files_are_closed_after_success_and_failure(source, out, monkeypatch):
    quantize_checkpoint(source, out)
    before = len(os.listdir("/proc/self/fd"))
    quantize_checkpoint(source, out, run=RunOptions(overwrite=True))
    for name, module in (("pwrite", os), ("fsync", os)):
        for after in (1, 5, 9):
            with _failing(monkeypatch, module, name, after), contextlib.suppress(workspace.BlockscaleError):
                quantize_checkpoint(source, source.parent / f"{name}{after}")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_short_write_is_continued(source, out, tmp_path, monkeypatch):
    quantize_checkpoint(source, tmp_path / "whole")
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(
        writer.os, "pwrite", lambda fd, view, offset: pwrite(fd, view[: len(view) // 2 + 1], offset)
    )

    def read_half(fd, views, offset):
        return preadv(fd, [views[0][: len(views[0]) // 2 + 1]], offset)

    monkeypatch.setattr(strips.os, "preadv", read_half)
    quantize_checkpoint(source, out)
    assert data.contents(out) == data.contents(tmp_path / "whole")
