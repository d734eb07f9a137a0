"""Hub repositories, read through huggingface_hub from a small Hub on loopback."""

import json
import socket
import struct

import pytest
from huggingface_hub import constants

from blockscale import inspect_checkpoint, quantize_checkpoint, verify_checkpoint
from blockscale.checkpoint.convert import RunOptions
from blockscale.checkpoint.hub import HubPath, hub_path
from blockscale.checkpoint.plan import plan_quantize
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError
from tests import data, fake_hub

SHARDS = 3
OTHER_FORMATS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "x.gguf",
    "original/consolidated.00.pth",
)


@pytest.fixture
def hub(monkeypatch):
    with fake_hub.serving() as served:
        _point_to(served.url, monkeypatch)
        yield served


def _point_to(url, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Xet, a protocol of the real Hub, is not served here.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # The token of whoever runs the tests is nobody's business here.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


@pytest.fixture
def source(tmp_path):
    """A checkpoint as the Hub has them, with weights of other formats and awkward names."""
    model = data.llama()
    model.files.update({"notes on it/read me.txt": b"spaces", ".gitattributes": b"*.bin filter=lfs"})
    model.files.update(dict.fromkeys(OTHER_FORMATS, b"\x80\x04junk"))
    return data.write(tmp_path / "source", model, SHARDS)


@pytest.fixture
def expected(source, tmp_path):
    """Shards, config and index that a local run makes of it."""
    quantize_checkpoint(source, tmp_path / "expected")
    return _without_manifest(tmp_path / "expected")


def _without_manifest(folder):
    return {name: content for name, content in data.contents(folder).items() if name != "blockscale.json"}


def _refused(action):
    with pytest.raises(BlockscaleError) as caught:
        action()
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


def test_the_result_is_that_of_a_local_run_and_only_what_is_needed_is_fetched(
    hub, source, expected, tmp_path
):
    hub.push("org/name", data.contents(source))
    quantize_checkpoint("org/name", tmp_path / "out")
    assert _without_manifest(tmp_path / "out") == expected
    fetched = hub.sent("resolve")
    assert not fetched.keys() & {*OTHER_FORMATS, ".gitattributes"}
    assert all(
        fetched[name] == len(content)
        for name, content in data.contents(source).items()
        if name.endswith(".safetensors")
    ), "every shard is fetched once"
    assert verify_checkpoint(tmp_path / "out", "org/name").ok
    assert inspect_checkpoint("org/name").counts == inspect_checkpoint(source).counts


def test_planning_asks_for_headers_by_range(hub, source):
    files = data.contents(source)
    hub.push("org/name", files)
    plan_quantize(open_source("org/name"), Recipe())
    headers = {
        name: 8 + struct.unpack("<Q", content[:8])[0]
        for name, content in files.items()
        if name.endswith(".safetensors")
    }
    assert hub.sent("range") == headers
    assert hub.sent("resolve").keys() == {data.INDEX, "config.json"}


@pytest.mark.parametrize(
    ("spec", "revision"),
    [
        ("org/name@v1.0", None),
        ("org/name@v1.0/", None),
        ("org/name", "v1.0"),
        ("org/name@v1.0", "v1.0"),
        ("hf://org/name@v1.0", None),
        ("org/name@refs/pr/1", None),
        ("hf://org/name@refs/pr/1", None),
        ("org/name@feature/x", None),
        ("hf://org/name@feature%2Fx", None),
        ("org/name@{commit}", None),
        ("hf://org/name@nested/some folder/model", None),
    ],
)
def test_a_revision_is_read_however_it_is_written(spec, revision, hub, source, expected, tmp_path):
    hub.push("org/name", {"config.json": b"{}"})
    files = data.contents(source)
    hub.push("org/name", {f"some folder/model/{name}": content for name, content in files.items()}, "nested")
    for branch in ("v1.0", "refs/pr/1", "feature/x"):
        commit = hub.push("org/name", files, branch)
    quantize_checkpoint(spec.format(commit=commit), tmp_path / "out", run=RunOptions(revision=revision))
    assert _without_manifest(tmp_path / "out") == expected


def test_a_branch_that_moves_does_not_mix_two_models(hub, source, expected, tmp_path):
    hub.push("org/name", data.contents(source))
    other = data.contents(data.write(tmp_path / "other", data.llama(hidden=64), SHARDS))
    hub.after = lambda route, name: hub.push("org/name", other) and None
    quantize_checkpoint("org/name", tmp_path / "out")
    assert _without_manifest(tmp_path / "out") == expected
    assert inspect_checkpoint("org/name").nbytes == inspect_checkpoint(tmp_path / "other").nbytes


def test_a_run_is_not_resumed_with_a_branch_that_has_moved(hub, source, tmp_path):
    files = data.contents(source)
    first = hub.push("org/name", files)
    second, last = (f"model-{shard:05d}-of-{SHARDS:05d}.safetensors" for shard in (2, SHARDS))

    def refuse_the_last(route, name):
        if (route, name) == ("resolve", second):
            hub.refused[last] = (403, "")

    hub.after = refuse_the_last
    line = _refused(lambda: quantize_checkpoint("org/name", tmp_path / "out"))
    assert line.startswith(f"org/name/{last}: cannot be fetched: ")
    hub.after = lambda route, name: None
    hub.refused.clear()
    hub.push("org/name", {**files, "tokenizer.json": b"other"})
    assert "another plan" in _refused(lambda: quantize_checkpoint("org/name", tmp_path / "out"))
    assert quantize_checkpoint(f"org/name@{first}", tmp_path / "out").resumed_shards == SHARDS - 2


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (404, "RepoNotFound", "no such folder, and no such Hub repository"),
        (401, "RepoNotFound", "no such folder, and no such Hub repository"),
        (404, "RevisionNotFound", "the repository has no revision v9"),
        (403, "GatedRepo", "is a gated repository; accept its terms"),
        (401, "", "the Hub refuses access; check the access token"),
        (500, "", "the Hub cannot be reached: Server error"),
    ],
)
def test_a_repository_that_cannot_be_opened_is_told_in_one_line(status, code, told, hub, source):
    hub.push("org/name", data.contents(source))
    hub.refused["info"] = (status, code)
    line = _refused(lambda: open_source("org/name@v9"))
    assert line.startswith("org/name@v9: ")
    assert told in line


def test_no_such_repository_revision_or_folder(hub, source):
    hub.push("org/name", data.contents(source))
    assert "no such Hub repository" in _refused(lambda: open_source("org/nobody"))
    assert "no revision v9" in _refused(lambda: open_source("org/name@v9"))
    assert "no such file or folder" in _refused(lambda: open_source("hf://org/name/nowhere"))
    assert "expected main, got v9" in _refused(lambda: open_source("org/name@main", "v9"))


def test_offline_and_out_of_reach(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        _point_to(f"http://127.0.0.1:{taken.getsockname()[1]}", monkeypatch)
        assert "the Hub cannot be reached" in _refused(lambda: open_source("org/name"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in _refused(lambda: open_source("org/name"))


@pytest.mark.parametrize(
    ("text", "repo", "revision", "folder"),
    [
        ("org/name", "org/name", None, ""),
        ("Org-1/na.me_2", "Org-1/na.me_2", None, ""),
        ("org/name@main/", "org/name", "main", ""),
        ("org/name@refs/pr/12", "org/name", "refs/pr/12", ""),
        ("hf://org/name/a/b/", "org/name", None, "a/b"),
        ("hf://org/name@refs/pr/12/a", "org/name", "refs/pr/12", "a"),
        ("hf://org/name@v1/a/b", "org/name", "v1", "a/b"),
    ],
)
def test_how_repositories_are_written(text, repo, revision, folder):
    assert hub_path(text) == HubPath(text, repo, revision, folder)


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "./org/name",
        "../org/name",
        "/org/name",
        "a/b/c",
        "s3://org/name",
        "hf://buckets/org/name",
        "a b/c",
    ],
)
def test_what_is_no_repository(text):
    assert hub_path(text) is None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _plan_free(files):
    """Without the plan in the manifest, which knows the times of the source's files."""
    manifest = json.loads(files["blockscale.json"])
    manifest.pop("plan")
    return {**files, "blockscale.json": manifest}


NEW = {".gitattributes": b"given", "README.md": b"given"}


@pytest.mark.parametrize(
    ("spec", "prefix"), [("hf://org/out", ""), ("hf://org/out@fp8/some folder", "some folder/")]
)
def test_a_result_on_the_hub_is_one_commit(spec, prefix, hub, source, cache, tmp_path):
    quantize_checkpoint(source, tmp_path / "local")
    hub.push("org/out", NEW, "fp8")
    hub.push("org/out", NEW)
    branch = "fp8" if "@" in spec else "main"
    quantize_checkpoint(source, spec)
    files = hub.commits[hub.refs["org/out", branch]]
    local = data.contents(tmp_path / "local")
    assert files.items() >= NEW.items()
    got = {name.removeprefix(prefix): files[name] for name in files if name.startswith(prefix)}
    assert _plan_free({name: got[name] for name in local}) == _plan_free(local)
    assert len(files) == len(local) + len(NEW)
    assert len(hub.commits) == 2, "the empty one and the result"
    assert data.contents(cache) == {}
    assert quantize_checkpoint(source, spec).already_complete
    assert verify_checkpoint(spec, source).ok


def test_an_upload_that_fails_is_taken_up_where_it_failed(hub, source, cache):
    head = hub.push("org/out", NEW)
    hub.refused["commit"] = (403, "")
    line = _refused(lambda: quantize_checkpoint(source, "hf://org/out"))
    assert line == "hf://org/out: the Hub refuses access; check the access token: hf auth login"
    assert hub.refs["org/out", "main"] == head
    uploaded = len(hub.sent("put"))
    assert uploaded == SHARDS
    hub.refused.clear()
    assert quantize_checkpoint(source, "hf://org/out").resumed_shards == SHARDS
    assert len([route for route, _, _ in hub.asked if route == "put"]) == uploaded, "nothing is sent twice"
    assert verify_checkpoint("hf://org/out", source).ok


def test_a_branch_that_moves_during_the_run_is_not_written_over(hub, source, cache):
    hub.push("org/out", NEW)
    moved = []

    def move(route, name):
        if route == "preupload" and not moved:
            moved.append(hub.push("org/out", {**NEW, "theirs.txt": b"theirs"}))

    hub.after = move
    line = _refused(lambda: quantize_checkpoint(source, "hf://org/out"))
    assert line == "hf://org/out: the branch has moved since the run began; look at it, then run again"
    assert [hub.refs["org/out", "main"]] == moved
    quantize_checkpoint(source, "hf://org/out")
    assert hub.commits[hub.refs["org/out", "main"]]["theirs.txt"] == b"theirs"


def test_a_checkpoint_on_the_hub_is_replaced_only_on_request(hub, source, cache, tmp_path):
    other = data.contents(data.write(tmp_path / "other", data.llama(hidden=64), 7))
    adapter = {"adapter_model.safetensors": b"theirs"}
    head = hub.push("org/out", {**NEW, **other, **adapter})
    line = _refused(lambda: quantize_checkpoint(source, "hf://org/out"))
    assert "already holds a checkpoint" in line
    assert hub.refs["org/out", "main"] == head
    quantize_checkpoint(source, "hf://org/out", run=RunOptions(overwrite=True))
    files = hub.commits[hub.refs["org/out", "main"]]
    assert files.keys() >= {*NEW, *adapter}
    assert sum(name.startswith("model-") for name in files) == SHARDS
    assert verify_checkpoint("hf://org/out", source).problems == ()


def test_a_destination_on_the_hub_that_is_not_there(hub, source, cache):
    line = _refused(lambda: quantize_checkpoint(source, "hf://org/out"))
    assert line == (
        "hf://org/out: no such Hub repository; check the spelling; if it is private: hf auth login; "
        "or make it: hf repo create org/out --private"
    )
    hub.push("org/out", NEW)
    assert "no revision fp8" in _refused(lambda: quantize_checkpoint(source, "hf://org/out@fp8"))
    line = _refused(lambda: quantize_checkpoint(source, "hf://org/out", run=RunOptions(cluster="auto")))
    assert "a cluster cannot write to a Hub repository" in line
    assert data.contents(cache) == {}


def test_a_model_card_that_the_hub_does_not_take(hub, source, cache):
    head = hub.push("org/out", NEW)
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    hub.refused["validate-yaml"] = (400, "")
    line = _refused(lambda: quantize_checkpoint(source, "hf://org/out"))
    assert line.startswith("hf://org/out: the Hub does not take this: ")
    assert "README.md" in line
    assert hub.refs["org/out", "main"] == head
