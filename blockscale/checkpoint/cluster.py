"""Convert shards on a Ray cluster: one task a shard, scheduled, retried and moved off lost nodes by Ray.

Nodes share the work by files, not through Ray's object store. With a local destination the folder (and a
local source) must be on a filesystem that every node sees under the same path. With a remote one each task
works in its node's temporary folder (`TMPDIR`: room for a source shard and an output shard a task) and
uploads its shard itself. Credentials of remote filesystems and the Hub's access token must be set up on every
node, and the same version of blockscale installed.

A task writes under a name that no other attempt has, so a task that lives on at a node that Ray has given up
cannot touch what its retry made. The driver alone looks at the result, journals it and commits in the end:
killed, the same command goes on with the shards that are left.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from blockscale.checkpoint import remote
from blockscale.checkpoint.engine import Record, convert_shards
from blockscale.checkpoint.plan import ShardPlan
from blockscale.checkpoint.progress import Progress, Silent
from blockscale.checkpoint.source import Source, reason
from blockscale.checkpoint.tasks import Job
from blockscale.checkpoint.workspace import Workspace, record_shard
from blockscale.checkpoint.writer import sync_folder
from blockscale.errors import BlockscaleError
from blockscale.version import __version__

# How often a shard moves on when its node or worker process dies; more is a task that kills its workers.
_RETRIES = 5
# Threads of a task: enough to overlap reading, arithmetic and writing; more tasks a node do the rest.
_DEFAULT_WORKERS = 4
# Shards submitted per slot of the cluster: one that runs and one that waits to take its place.
_PER_SLOT = 2
_CONNECT_SECONDS = 10
_CANCEL_SECONDS = 10


@dataclass(frozen=True)
class Assignment:
    """What every task of a run is told.

    Attributes:
        job: source and options, without the progress callback.
        target: the destination.
        folder: the shared folder for outputs; not used with a remote destination.
        workers: threads of a task.
        version: of blockscale at the driver.
    """

    job: Job
    target: Source
    folder: Path
    workers: int
    version: str = __version__


@dataclass(frozen=True)
class Failure:
    """A user's error in a task, taken apart: not every exception survives pickling."""

    kind: type[BlockscaleError]
    line: str
    attributes: dict[str, Any]

    @classmethod
    def of(cls, error: BlockscaleError) -> Failure:
        return cls(type(error), str(error), vars(error))

    def error(self) -> BlockscaleError:
        """The error again, as it was raised in the task."""
        error = self.kind.__new__(self.kind, self.line)
        vars(error).update(self.attributes)
        return error


def convert_on_cluster(
    todo: Sequence[ShardPlan],
    workspace: Workspace,
    job: Job,
    address: str,
    workers: int | None,
    progress: Progress,
) -> None:
    """Convert shards on a Ray cluster and journal each one as its result comes in.

    Args:
        todo: what to convert.
        workspace: the open destination.
        job: what all tasks share; with device "cuda" each task asks for a GPU.
        address: "auto" for the cluster this machine belongs to, or `host:port` of its head. A connection that
            the caller has opened with `ray.init` is used instead, and left open.
        workers: threads of a task, and CPUs it asks Ray for; None means 4, or fewer on smaller nodes.
        progress: advances by whole shards.

    Raises:
        BlockscaleError: no Ray, no cluster, a shard that is wrong, or one that kept losing its node.
    """
    ray = _import_ray()
    with _connection(ray, address):
        _check_gpus(ray, job.device)
        cpus = _task_cpus(ray, workers)
        assignment = Assignment(
            Job(job.source, job.scale_fmt, job.on_nonfinite, job.device),
            workspace.target,
            workspace.attempts,
            cpus,
        )
        submit = ray.remote(convert_shard).options(
            num_cpus=cpus,
            num_gpus=int(job.device == "cuda"),
            max_retries=_RETRIES,
            scheduling_strategy="SPREAD",
        )
        shared = ray.put(assignment)
        if workspace.target.is_local:
            workspace.attempts.mkdir(exist_ok=True)
        waiting, running = deque(todo), dict[Any, ShardPlan]()
        try:
            while waiting or running:
                while waiting and len(running) < _PER_SLOT * _slots(ray, cpus):
                    shard = waiting.popleft()
                    running[submit.remote(shard, shared)] = shard
                for result in ray.wait(list(running), num_returns=1)[0]:
                    shard = running.pop(result)
                    _accept(workspace, shard, _outcome(ray, result, shard))
                    progress.advance(shard.input_bytes, len(shard.tasks))
        except BaseException:
            for result in running:
                ray.cancel(result, force=True)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_SECONDS)
            raise


def convert_shard(shard: ShardPlan, assignment: Assignment) -> Record | Failure:
    """The task: convert one shard under a name of its own; returns its record, or a user's error."""
    try:
        _check_node(assignment)
        if assignment.target.is_local:
            return _convert_into_shared(shard, assignment)
        return _convert_and_upload(shard, assignment)
    except BlockscaleError as error:
        return Failure.of(error)
    except OSError as error:
        return Failure.of(
            BlockscaleError(f"{reason(error)} on node {socket.gethostname()}", where=shard.file)
        )


def _convert_into_shared(shard: ShardPlan, assignment: Assignment) -> Record:
    folder = assignment.folder / f"{socket.gethostname()}-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        record = _convert(shard, folder, assignment)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {**record, "staged": f"{folder.parent.name}/{folder.name}/{shard.file}"}


def _convert_and_upload(shard: ShardPlan, assignment: Assignment) -> Record:
    with tempfile.TemporaryDirectory(prefix="blockscale-") as folder:
        record = _convert(shard, Path(folder), assignment)
        return {**record, "staged": remote.upload(assignment.target, Path(folder) / shard.file)}


def _convert(shard: ShardPlan, folder: Path, assignment: Assignment) -> Record:
    records: dict[str, Record] = {}
    convert_shards([shard], folder, assignment.job, assignment.workers, records.__setitem__, Silent())
    return records[shard.file]


def _check_node(assignment: Assignment) -> None:
    """Refuse a node that sees other files or runs other code than the driver."""
    node = f"node {socket.gethostname()}"
    if assignment.version != __version__:
        raise BlockscaleError(
            "other version of blockscale", where=node, expected=assignment.version, got=__version__
        )
    source = assignment.job.source
    folders = [source.root] if source.is_local else []
    folders += [str(assignment.folder)] if assignment.target.is_local else []
    for folder in folders:
        if not os.path.isdir(folder):
            raise BlockscaleError(
                "is not there on every node of the cluster",
                where=folder,
                got=f"no such folder on {node}",
                remedy="use a shared filesystem, or a remote one (an fsspec URL)",
            )


def _accept(workspace: Workspace, shard: ShardPlan, record: Record) -> None:
    """Journal a shard whose task has ended; its bytes are synced or uploaded by then."""
    if workspace.target.is_local:
        staged = workspace.folder / record["staged"]
        if not staged.is_file() or staged.stat().st_size != record["size"]:
            raise BlockscaleError(
                "was written by a node, but is not here",
                where=staged,
                expected=f"{record['size']} bytes",
                remedy="the destination must be on a filesystem that all nodes and this machine share",
            )
        sync_folder(workspace.attempts)
    record_shard(workspace, shard.file, record)


def _outcome(ray: Any, result: Any, shard: ShardPlan) -> Record:
    try:
        outcome: Record | Failure = ray.get(result)
    except ray.exceptions.RayTaskError as error:
        if "No module named 'blockscale'" not in str(error):
            raise  # what a task did not expect is a defect: the traceback tells where
        raise BlockscaleError(
            "is not installed on every node of the cluster",
            where="blockscale",
            remedy=f"there: pip install 'blockscale[cluster]=={__version__}'",
        ) from error
    except ray.exceptions.RayError as error:
        raise BlockscaleError(
            f"could not be converted on the cluster: {type(error).__name__}: {reason(error)}",
            where=shard.file,
            remedy="finished shards are kept: run the same command again",
        ) from error
    if isinstance(outcome, Failure):
        raise outcome.error()
    return outcome


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise BlockscaleError(
            "a cluster needs the package ray", remedy="pip install 'blockscale[cluster]'"
        ) from error
    return ray


@contextmanager
def _connection(ray: Any, address: str) -> Iterator[None]:
    """Connect to a cluster for the time of the run, unless the caller is connected."""
    if ray.is_initialized():
        yield
        return
    try:
        _probe(address)
        ray.init(address=address, logging_level=ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise BlockscaleError(
            f"no Ray cluster can be reached: {reason(error)}",
            where=f"--cluster {address}",
            remedy="start one with: ray start --head",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Fail at once where nobody listens: Ray itself goes on trying for minutes."""
    if address == "auto":
        return
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname is None or place.port is None:
        raise ValueError("an address is auto or host:port")
    socket.create_connection((place.hostname, place.port), timeout=_CONNECT_SECONDS).close()


def _task_cpus(ray: Any, workers: int | None) -> int:
    # A cluster that scales from zero has no node to measure yet.
    most = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    if workers is None:
        return max(1, min(_DEFAULT_WORKERS, most))
    if workers > most > 0:
        raise BlockscaleError(
            "no node of the cluster has that many CPUs",
            where=f"--workers {workers}",
            expected=f"at most {most}",
        )
    return workers


def _check_gpus(ray: Any, device: str) -> None:
    """Refuse tasks that ask for a GPU where they would wait for one without end."""
    if device == "cuda" and not ray.cluster_resources().get("GPU"):
        raise BlockscaleError(
            "no node of the cluster has a GPU", where="device cuda", remedy="use --device cpu"
        )


def _slots(ray: Any, cpus: int) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 0) / cpus))
