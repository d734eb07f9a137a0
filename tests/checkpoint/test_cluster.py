"""On a real Ray cluster of several nodes: the bytes of a local run, whatever is lost on the way."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from blockscale import dequantize_checkpoint, quantize_checkpoint
from blockscale.checkpoint import cluster as on_cluster
from blockscale.checkpoint.convert import RunOptions
from blockscale.checkpoint.plan import plan_quantize
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.source import open_source
from blockscale.checkpoint.tasks import Job
from blockscale.checkpoint.workspace import open_workspace, record_shard, resolve_target
from blockscale.errors import BlockscaleError, CorruptCheckpointError, NonFiniteError
from tests import data, gate, stores

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent
SHARDS = 8
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
SHARD = "model-{:05d}-of-00008.safetensors"
ON_RAY = RunOptions(cluster="auto")


@pytest.fixture(scope="module")
def cluster():
    """A head that computes nothing and two nodes of one CPU; this process is connected to it."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        # What nodes import: the package, and the filesystems of the tests.
        patch.setenv("PYTHONPATH", str(HERE.parent.parent))
        nodes = Cluster(
            initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False}
        )
        try:
            for _ in range(2):
                nodes.add_node(wait=False, **NODE)
            nodes.wait_for_nodes()
            ray.init(address=nodes.address, log_to_driver=False)
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An FP8 checkpoint in eight shards, each with projections and their scales."""
    model = data.in_fp8(data.llama(layers=2))
    shards = {}
    for names in ([n for n in model.tensors if "_proj" in n], [n for n in model.tensors if "_proj" not in n]):
        owners = sorted({name.removesuffix("_scale_inv") for name in names})
        shards |= {
            name: SHARD.format(owners.index(name.removesuffix("_scale_inv")) % SHARDS + 1) for name in names
        }
    return data.write(tmp_path_factory.mktemp("fp8") / "source", model, shards)


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """Every file that a local run makes of it."""
    target = tmp_path_factory.mktemp("local") / "result"
    dequantize_checkpoint(source, target)
    return data.contents(target)


@pytest.fixture
def barrier(tmp_path):
    folder = tmp_path / "gate"
    folder.mkdir()
    return folder


def _begun(barrier):
    """(shard, node, process) of the readers that have come to the gate."""
    return [tuple(path.name.split("@")) for path in barrier.glob("*@*@*")]


def _journaled(target):
    journal = target / ".blockscale" / "journal.jsonl"
    lines = journal.read_bytes().splitlines() if journal.exists() else []
    return [record["shard"] for record in map(json.loads, lines) if "shard" in record]


def _alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def test_a_node_that_is_killed_in_the_middle(cluster, source, expected, barrier, tmp_path):
    victim = cluster.add_node(**NODE)
    (barrier / "doomed").write_text(victim.node_id)

    def kill():
        gate.wait_for(lambda: any(node == victim.node_id for _, node, _ in _begun(barrier)))
        cluster.remove_node(victim, allow_graceful=False)
        (barrier / "open").touch()

    with ThreadPoolExecutor(1) as killer:
        killed = killer.submit(kill)
        report = gate.dequantize(source, tmp_path / "result", "auto", barrier)
        killed.result()
    assert report.shards == SHARDS
    assert data.contents(tmp_path / "result") == expected
    lost = {shard for shard, node, _ in _begun(barrier) if node == victim.node_id}
    again = {shard for shard, node, _ in _begun(barrier) if node != victim.node_id}
    assert lost
    assert lost <= again


def test_a_driver_that_is_killed_and_run_again(cluster, source, expected, barrier, tmp_path):
    target, first = tmp_path / "result", [SHARD.format(1), SHARD.format(2)]
    for shard in first:
        (barrier / f"pass {shard}").touch()
    arguments = f"Path({str(source)!r}), Path({str(target)!r}), {cluster.address!r}, Path({str(barrier)!r})"
    program = f"from tests import gate; from pathlib import Path; gate.dequantize({arguments})"
    with subprocess.Popen([sys.executable, "-c", program]) as driver:
        try:
            gate.wait_for(lambda: len(_journaled(target)) == len(first) or driver.poll() is not None)
            gate.wait_for(lambda: {shard for shard, _, _ in _begun(barrier)} - {*first})
        finally:
            driver.kill()
    assert sorted(_journaled(target)) == first
    assert all(name.startswith(".blockscale/") for name in data.contents(target))
    (barrier / "open").touch()
    report = gate.dequantize(source, target, "auto", barrier)
    assert report.resumed_shards == len(first)
    assert data.contents(target) == expected
    processes = {shard: {pid for begun, _, pid in _begun(barrier) if begun == shard} for shard in first}
    assert all(len(pids) == 1 for pids in processes.values()), "a finished shard was done again"


def test_ctrl_c_ends_the_tasks(cluster, source, barrier, tmp_path):
    def interrupt():
        gate.wait_for(lambda: _begun(barrier))
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            gate.dequantize(source, tmp_path / "result", "auto", barrier)
    gate.wait_for(lambda: not any(_alive(pid) for _, _, pid in _begun(barrier)))
    assert not (tmp_path / "result").exists()


def test_a_shard_that_kills_its_workers_is_told_in_one_line(cluster, source, barrier, tmp_path, monkeypatch):
    monkeypatch.setattr(on_cluster, "_RETRIES", 0)
    (barrier / "crash").touch()
    with pytest.raises(BlockscaleError) as caught:
        gate.dequantize(source, tmp_path / "result", "auto", barrier)
    line = str(caught.value)
    assert line.startswith("model-0000")
    assert "could not be converted on the cluster: WorkerCrashedError" in line
    assert line.endswith("run the same command again")


@pytest.mark.parametrize(
    ("command", "damage", "kind"),
    [
        (quantize_checkpoint, "model.layers.0.mlp.up_proj.weight", NonFiniteError),
        (dequantize_checkpoint, "model.layers.0.mlp.up_proj.weight_scale_inv", CorruptCheckpointError),
    ],
)
def test_the_error_of_a_task_is_that_of_a_local_run(command, damage, kind, cluster, tmp_path):
    model = data.llama() if command is quantize_checkpoint else data.in_fp8(data.llama())
    tensor = model.tensors[damage].clone()
    tensor[-1, -1] = float("nan")
    folder = data.write(tmp_path / "bad", model.changed({damage: tensor}), SHARDS)
    lines = []
    for place, run in (("local", RunOptions()), ("ray", ON_RAY)):
        with pytest.raises(kind) as caught:
            command(folder, tmp_path / place, run=run)
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert "\n" not in lines[0]
    assert data.contents(tmp_path / "ray").keys() <= {
        name for name in data.contents(tmp_path / "ray") if name.startswith(".blockscale/")
    }


def test_a_remote_source_and_destination(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stores.Store.watch()
    folder = data.write(tmp_path / "source", data.llama(), SHARDS)
    url = f"store://{folder}"
    quantize_checkpoint(url, tmp_path / "local")
    quantize_checkpoint(url, f"store://{tmp_path}/far", run=ON_RAY)
    quantize_checkpoint(url, tmp_path / "near", run=ON_RAY)
    assert data.contents(tmp_path / "far") == data.contents(tmp_path / "local")
    assert data.contents(tmp_path / "near") == data.contents(tmp_path / "local")
    assert data.contents(tmp_path / "cache") == {}


def test_uploads_of_nodes_are_found_though_listings_are_cached(cluster, tmp_path, monkeypatch):
    def third(operation, path):
        if len(stores.Store.names("put")) == 3:
            raise OSError("the line went dead")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, url = data.write(tmp_path / "source", data.llama(), SHARDS), f"store://{tmp_path}/far"
    quantize_checkpoint(folder, tmp_path / "local")
    stores.Store.watch(third)
    with pytest.raises(BlockscaleError, match="the line went dead"):
        quantize_checkpoint(folder, url)
    stores.Store.watch()
    (journal,) = (tmp_path / "cache").glob("blockscale/*/journal.jsonl")
    first = json.loads(journal.read_text().splitlines()[1])["record"]["staged"]
    (tmp_path / "far" / ".blockscale" / first).unlink()
    # Going on lists what is there already, before the nodes add to it.
    assert 1 <= quantize_checkpoint(folder, url, run=ON_RAY).resumed_shards < SHARDS
    assert data.contents(tmp_path / "far") == data.contents(tmp_path / "local")


def test_a_gpu_that_no_node_has_is_refused(cluster, source, tmp_path):
    if ray.cluster_resources().get("GPU"):
        pytest.skip("the nodes have a GPU")
    with pytest.raises(BlockscaleError) as caught:
        dequantize_checkpoint(source, tmp_path / "result", run=RunOptions(cluster="auto", device="cuda"))
    assert str(caught.value) == "device cuda: no node of the cluster has a GPU; use --device cpu"
    assert not (tmp_path / "result").exists()


def test_more_threads_than_any_node_has_are_refused(cluster, source, tmp_path):
    with pytest.raises(BlockscaleError, match=r"--workers 64: .* \(expected at most 1\)"):
        dequantize_checkpoint(source, tmp_path / "result", run=replace(ON_RAY, workers=64))
    assert not (tmp_path / "result").exists()


def _assignment(source, target, **changes):
    job, place = Job(open_source(source)), resolve_target(target)[0]
    return replace(on_cluster.Assignment(job, place, target / ".blockscale" / "attempts", 1), **changes)


def _told(source, assignment):
    shard = plan_quantize(open_source(source), Recipe()).shards[0]
    failure = on_cluster.convert_shard(shard, assignment)
    assert isinstance(failure, on_cluster.Failure)
    return str(failure.error())


def test_a_node_that_does_not_share_the_folders_says_so(tmp_path):
    source = data.write(tmp_path / "source", data.llama(), SHARDS)
    target = tmp_path / "result"
    line = _told(source, _assignment(source, target))
    assert line.startswith(f"{target}/.blockscale/attempts: is not there on every node")
    (target / ".blockscale" / "attempts").mkdir(parents=True)
    elsewhere = replace(open_source(source), root=str(tmp_path / "elsewhere"))
    line = _told(source, _assignment(source, target, job=Job(elsewhere)))
    assert line.startswith(f"{tmp_path}/elsewhere: is not there on every node")
    assert data.contents(target) == {}


def test_two_attempts_at_a_shard_share_no_file(tmp_path):
    source = data.write(tmp_path / "source", data.llama(), SHARDS)
    assignment = _assignment(source, tmp_path / "result")
    assignment.folder.mkdir(parents=True)
    shard = plan_quantize(open_source(source), Recipe()).shards[0]
    first, second = (on_cluster.convert_shard(shard, assignment) for _ in range(2))
    paths = [assignment.folder.parent / record["staged"] for record in (first, second)]
    assert not paths[0].samefile(paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert {**first, "staged": ""} == {**second, "staged": ""}


def test_attempts_that_nobody_accepted_are_removed_by_the_next_run(tmp_path):
    target = tmp_path / "result"
    with open_workspace(target, "plan", [], overwrite=False) as workspace:
        for attempt in ("attempts/node-1/a", "attempts/node-2/a"):
            (workspace.folder / attempt).parent.mkdir(parents=True)
            (workspace.folder / attempt).write_bytes(b"1")
        record_shard(workspace, "a", {"size": 1, "sha256": {}, "staged": "attempts/node-2/a"})
    with open_workspace(target, "plan", [], overwrite=False) as workspace:
        assert workspace.done.keys() == {"a"}
        assert [path.name for path in workspace.attempts.iterdir()] == ["node-2"]


def test_a_node_with_another_version_says_so(tmp_path):
    source = data.write(tmp_path / "source", data.llama(), SHARDS)
    line = _told(source, _assignment(source, tmp_path / "result", version="0.0.0"))
    assert f"node {socket.gethostname()}: other version of blockscale (expected 0.0.0" in line


@pytest.fixture
def unconnected(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:{port}", "--cluster 127.0.0.1:{port}: no Ray cluster can be reached: Connection refused"),
        ("somewhere", "--cluster somewhere: no Ray cluster can be reached: an address is auto or host:port"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_in_one_line(address, told, unconnected, tmp_path):
    source = data.write(tmp_path / "source", data.llama(), SHARDS)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        port = taken.getsockname()[1]
        with pytest.raises(BlockscaleError) as caught:
            quantize_checkpoint(source, tmp_path / "out", run=RunOptions(cluster=address.format(port=port)))
    assert str(caught.value).startswith(told.format(port=port))
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_remedy_is_told(tmp_path, monkeypatch):
    source = data.write(tmp_path / "source", data.llama(), SHARDS)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BlockscaleError, match=r"pip install 'blockscale\[cluster\]'"):
        quantize_checkpoint(source, tmp_path / "out", run=ON_RAY)
    assert not (tmp_path / "out").exists()
