"""Sources and destinations on other filesystems: the same bytes as locally, nothing lost or left over."""

import json
import os
import struct
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from blockscale import (
    dequantize_checkpoint,
    inspect_checkpoint,
    plan_checkpoint,
    quantize_checkpoint,
    verify_checkpoint,
)
from blockscale.checkpoint.convert import RunOptions
from blockscale.checkpoint.plan import plan_quantize
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError, BusyError
from tests import data
from tests.stores import Store

SHARDS = 5
OTHER_FORMATS = ("pytorch_model.bin", "x.gguf", "consolidated.00.pth", "original/consolidated.00.safetensors")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The local cache, and a new record of what stores are asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Store.watch()
    yield tmp_path / "cache"
    Store.watch()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def source(tmp_path):
    """A checkpoint in five shards, with carried files of awkward names and weights of other formats."""
    model = data.llama()
    model.files["notes on it/read me.txt"] = b"spaces"
    folder = data.write(tmp_path / "source", model, SHARDS)
    for name in OTHER_FORMATS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04junk")
    return folder


@pytest.fixture
def expected(source, tmp_path):
    """What a local run makes of it."""
    quantize_checkpoint(source, tmp_path / "expected")
    return _result(tmp_path / "expected")


def _result(folder):
    """Every file of a result; the manifest without the plan, which knows the times of the source's files."""
    files = data.contents(folder)
    files["blockscale.json"] = {k: v for k, v in json.loads(files["blockscale.json"]).items() if k != "plan"}
    return files


def _upload(folder, url):
    fs, root = fsspec.core.url_to_fs(url)
    for name, content in data.contents(folder).items():
        fs.makedirs(os.path.dirname(f"{root}/{name}"), exist_ok=True)
        fs.pipe_file(f"{root}/{name}", content)
    return url


def _download(url, folder):
    fs, root = fsspec.core.url_to_fs(url)
    for path in fs.find(root):
        target = folder / path.removeprefix(root).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(fs.cat_file(path))
    return folder


def _refused(action):
    with pytest.raises(BlockscaleError) as caught:
        action()
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


DEAD = OSError("the line went dead")


def _fail_at(operation, count, error=DEAD):
    """A hook that fails the `count`-th time an operation is done."""
    seen = []

    def before(done, path):
        seen.append(path) if done == operation else None
        if done == operation and len(seen) == count:
            raise error

    return before


@pytest.mark.parametrize("protocol", ["memory", "store"])
@pytest.mark.parametrize(("far_source", "far_target"), [(True, False), (False, True), (True, True)])
def test_the_result_is_that_of_a_local_run(
    protocol, far_source, far_target, source, expected, tmp_path, cache
):
    base = "memory://" if protocol == "memory" else f"store://{tmp_path}"
    src = _upload(source, f"{base}/far/model") if far_source else source
    dst = f"{base}/far/result" if far_target else tmp_path / "result"
    report = quantize_checkpoint(src, dst)
    assert report.shards == SHARDS
    assert _result(_download(dst, tmp_path / "got") if far_target else dst) == expected
    assert data.contents(cache) == {}
    assert quantize_checkpoint(src, dst).already_complete


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_slash_at_the_end_changes_nothing(slash, source, expected, tmp_path):
    quantize_checkpoint(_upload(source, "memory://far/model") + slash, f"memory://far/result{slash}")
    assert _result(_download("memory://far/result", tmp_path / "got")) == expected


def test_planning_reads_headers_and_no_weights(source):
    plan = plan_quantize(open_source(f"store://{source}"), Recipe())
    assert len(plan.shards) == SHARDS
    for file, nbytes in Store.nbytes.items():
        if file.endswith(".safetensors"):
            (length,) = struct.unpack("<Q", Path(file).read_bytes()[:8])
            assert nbytes == 8 + length
    assert Store.names("get") == []


def test_shards_are_staged_two_at_a_time_and_only_what_is_needed_is_fetched(source, tmp_path):
    staging, staged = tmp_path / "result" / ".blockscale" / "staging" / "source", []
    Store.watch(lambda done, path: staged.append(len(list(staging.glob("*")))) if done == "get" else None)
    quantize_checkpoint(f"store://{source}", tmp_path / "result")
    assert max(staged) == 1, "two shards are there while the second one is fetched"
    fetched = [path.removeprefix(f"{source}/") for done, path in Store.asked if done == "get"]
    shards = [f"model-{shard:05d}-of-{SHARDS:05d}.safetensors" for shard in range(1, SHARDS + 1)]
    assert sorted(fetched) == sorted([*shards, *data.CARRIED, "notes on it/read me.txt"])
    assert not any(name in path for name in OTHER_FORMATS for _, path in Store.asked)
    assert not (tmp_path / "result" / ".blockscale").exists()


def test_uploaded_shards_do_not_pile_up_here(source, tmp_path, cache):
    staged = []

    def before(done, path):
        if done == "put":
            staged.append(sum(name.endswith(".safetensors") for name in data.contents(cache)))

    Store.watch(before)
    quantize_checkpoint(source, f"store://{tmp_path}/result")
    assert max(staged) <= 3, "one on the way up, two being written"


def test_a_failed_upload_is_taken_up_where_it_failed(source, expected, tmp_path, cache):
    target = tmp_path / "result"
    Store.watch(_fail_at("put", 3))
    line = _refused(lambda: quantize_checkpoint(source, f"store://{target}"))
    assert "cannot be uploaded" in line
    assert "the line went dead" in line
    left = data.contents(target)
    assert all(name.startswith(".blockscale/") for name in left)
    uploaded = len(left.keys() - {".blockscale/run.json"})
    assert 2 <= uploaded < SHARDS
    late = target / ".blockscale" / "of a lost machine"
    late.write_bytes(b"late")
    seen = []
    Store.watch(lambda done, path: seen.append(late.exists()) if done == "put" else None)
    report = quantize_checkpoint(source, f"store://{target}")
    assert report.resumed_shards == uploaded
    assert not any(seen)
    assert len(Store.names("put")) == len(expected) - uploaded
    assert _result(target) == expected
    assert data.contents(cache) == {}


@pytest.mark.parametrize("operation", ["copy", "remove"])
def test_a_commit_that_fails_anywhere_is_finished_by_the_next_run(operation, source, expected, tmp_path):
    # Every file is copied to its name and removed from where it waited; the mark of the run goes last.
    last = len(expected) + (operation == "remove")
    for count in sorted({*range(1, last, 3), last - 1, last}):
        target = tmp_path / f"result{count}"
        Store.watch(_fail_at(operation, count))
        line = _refused(lambda url=f"store://{target}": quantize_checkpoint(source, url))
        assert "cannot be moved into place" in line or "cannot be cleaned up" in line
        visible = {k: v for k, v in data.contents(target).items() if not k.startswith(".blockscale/")}
        visible.pop("blockscale.json", None)
        assert visible.items() <= expected.items()
        assert "config.json" not in visible or visible.keys() | {"blockscale.json"} == expected.keys()
        Store.watch()
        quantize_checkpoint(source, f"store://{target}")
        assert _result(target) == expected


def test_what_is_replaced_stays_whole_until_the_new_one_is(source, tmp_path):
    target = tmp_path / "result"
    quantize_checkpoint(data.write(tmp_path / "other", data.llama(hidden=128), 7), target)
    old = data.contents(target)
    Store.watch(_fail_at("put", 4))
    run = RunOptions(overwrite=True)
    _refused(lambda: quantize_checkpoint(source, f"store://{target}", run=run))
    assert {k: v for k, v in data.contents(target).items() if not k.startswith(".blockscale/")} == old
    Store.watch()
    quantize_checkpoint(source, f"store://{target}", run=run)
    assert verify_checkpoint(target, source).ok
    assert len(list(target.glob("*.safetensors"))) == SHARDS


def test_two_machines_do_not_write_to_one_place(source, expected, tmp_path, monkeypatch):
    url = f"store://{tmp_path}/result"
    Store.watch(_fail_at("put", 3))
    _refused(lambda: quantize_checkpoint(source, url))
    Store.watch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache of another machine"))
    with pytest.raises(BusyError, match="another machine"):
        quantize_checkpoint(source, url)
    Store.watch(_fail_at("put", 4))
    _refused(lambda: quantize_checkpoint(source, url, run=RunOptions(overwrite=True)))
    Store.watch()
    uploaded = len(list((tmp_path / "result" / ".blockscale").iterdir())) - 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BusyError, match="another machine"):
        quantize_checkpoint(source, url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache of another machine"))
    assert quantize_checkpoint(source, url).resumed_shards == uploaded >= 3
    assert _result(tmp_path / "result") == expected


def test_scales_in_other_shards_are_read_by_range(tmp_path):
    model = data.in_fp8(data.llama())
    names = [name for name in model.tensors if not name.endswith("_scale_inv")]
    shards = {name: f"weights-{place % 3}.safetensors" for place, name in enumerate(names)}
    shards |= {name: "scales.safetensors" for name in model.tensors if name.endswith("_scale_inv")}
    folder = data.write(tmp_path / "fp8", model, shards)
    dequantize_checkpoint(folder, tmp_path / "expected")
    Store.watch()
    dequantize_checkpoint(f"store://{folder}", f"store://{tmp_path}/result")
    assert _result(tmp_path / "result") == _result(tmp_path / "expected")
    assert "scales.safetensors" not in Store.names("get")


def test_inspect_plan_and_verify(source, tmp_path):
    src, dst = _upload(source, "memory://far/model"), "memory://far/result"
    quantize_checkpoint(src, dst)
    local, far = inspect_checkpoint(source), inspect_checkpoint(src)
    assert (far.counts, far.nbytes, far.problems) == (local.counts, local.nbytes, local.problems)
    assert plan_checkpoint(src).after == plan_checkpoint(source).after
    found = verify_checkpoint(dst, src)
    assert found.ok
    assert found.checksums == found.tensors > found.compared > 0
    fs, root = fsspec.core.url_to_fs(dst)
    shard = next(path for path in fs.find(root) if path.endswith(".safetensors"))
    content = bytearray(fs.cat_file(shard))
    content[-1] ^= 1
    fs.pipe_file(shard, bytes(content))
    assert not verify_checkpoint(dst).ok


def test_a_source_that_changes_during_the_run_is_noticed(source, tmp_path):
    def before(done, path):
        if done == "get" and path.endswith("tokenizer.json"):
            os.utime(source / f"model-00001-of-{SHARDS:05d}.safetensors", (1, 1))

    Store.watch(before)
    assert "changed during the run" in _refused(
        lambda: quantize_checkpoint(f"store://{source}", tmp_path / "result")
    )


@pytest.mark.parametrize("count", [1, 3, SHARDS + 1])
def test_a_fetch_that_fails_is_told_and_taken_up_again(count, source, expected, tmp_path):
    Store.watch(_fail_at("get", count, RuntimeError("the line went dead\nand more")))
    target = tmp_path / "result"
    line = _refused(lambda: quantize_checkpoint(f"store://{source}", target))
    assert line.startswith(f"store://{source}/")
    assert line.endswith("cannot be fetched: RuntimeError: the line went dead")
    assert all(name.startswith(".blockscale/") for name in data.contents(target))
    Store.watch()
    assert quantize_checkpoint(f"store://{source}", target).resumed_shards >= min(count - 2, SHARDS)
    assert _result(target) == expected


@pytest.mark.parametrize(
    ("operation", "told"), [("get", "was fetched incompletely"), ("put", "was uploaded inc")]
)
def test_a_copy_that_is_cut_short_is_noticed(operation, told, source, tmp_path, monkeypatch):
    whole = getattr(Store, f"{operation}_file")

    def cut(self, path1, path2, **options):
        whole(self, path1, path2, **options)
        os.truncate(path2, os.path.getsize(path2) // 2)

    monkeypatch.setattr(Store, f"{operation}_file", cut)
    assert told in _refused(lambda: quantize_checkpoint(f"store://{source}", f"store://{tmp_path}/result"))


@pytest.mark.parametrize(
    ("src", "dst", "told"),
    [
        (
            "memory://nowhere/model",
            "{tmp}/out",
            "memory://nowhere/model: cannot be opened: no such file or folder",
        ),
        ("memory://far/model/config.json", "{tmp}/out", "is a file"),
        (
            "nosuch://far/model",
            "{tmp}/out",
            "nosuch://far/model: cannot be opened: Protocol not known: nosuch",
        ),
        ("plugin://far/model", "{tmp}/out", "Install plugin-fs to use plugin"),
        ("{source}", "plugin://far/model", "Install plugin-fs to use plugin"),
        ("memory://far/model", "memory://far/model", "overlap"),
        ("memory://far/model", "memory://far/model/sub", "overlap"),
    ],
)
def test_what_cannot_be_opened_is_told_in_one_line(src, dst, told, source, tmp_path, monkeypatch):
    missing = {"class": "no_such_package.FileSystem", "err": "Install plugin-fs to use plugin"}
    monkeypatch.setitem(known_implementations, "plugin", missing)
    _upload(source, "memory://far/model")
    src, dst = src.format(source=source), dst.format(tmp=tmp_path)
    assert told in _refused(lambda: quantize_checkpoint(src, dst))
    assert not (tmp_path / "out").exists()


def test_a_revision_of_what_has_none_is_refused(source, tmp_path):
    run = RunOptions(revision="main")
    for src in (source, f"store://{source}"):
        assert "only a Hub repository has revisions" in _refused(
            lambda src=src: quantize_checkpoint(src, tmp_path / "out", run=run)
        )
