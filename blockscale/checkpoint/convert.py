"""Quantize or dequantize a whole checkpoint: plan it, convert what is left to do, commit the result.

The commit writes config.json, the index, the carried files and `blockscale.json`: a manifest with the SHA-256
of every tensor and file, which `verify` compares with. The bytes of a result depend on the plan alone: not
on threads, devices, interruptions or machines.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blockscale.checkpoint.commit import commit
from blockscale.checkpoint.engine import convert_shards, default_workers
from blockscale.checkpoint.index import INDEX_NAME, read_index
from blockscale.checkpoint.lanes import usable_device
from blockscale.checkpoint.model_config import CONFIG_NAME
from blockscale.checkpoint.plan import (
    MANIFEST_NAME,
    ConversionPlan,
    ShardPlan,
    plan_dequantize,
    plan_quantize,
)
from blockscale.checkpoint.progress import Progress, Silent
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.source import Source, copy_file, open_source, resolve
from blockscale.checkpoint.strips import nonfinite_of, open_reader
from blockscale.checkpoint.tasks import Job
from blockscale.checkpoint.verify import verify_shard
from blockscale.checkpoint.workspace import (
    Workspace,
    finish_shard,
    open_workspace,
    stage_file,
)
from blockscale.checkpoint.writer import io_errors
from blockscale.errors import BlockscaleError, CorruptCheckpointError
from blockscale.version import __version__


@dataclass(frozen=True)
class RunOptions:
    """How a conversion runs; nothing here changes the bytes of the result.

    Attributes:
        workers: threads on this machine; None means one a core and two more.
        device: "auto", "cpu" or "cuda"; auto takes a GPU that is there; on a cluster
            "cuda" is a GPU for each task.
        overwrite: replace a checkpoint or an unfinished run of another plan at the destination.
        revision: branch, tag or commit of a Hub source.
        cluster: None, or the Ray cluster to spread shards over ("auto" or its address).
        progress: told of totals, bytes read and tensors finished.
        read_back: read every finished shard again and compare it with what was to be written (not on a
            cluster).
    """

    workers: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    overwrite: bool = False
    revision: str | None = None
    cluster: str | None = None
    progress: Progress = field(default_factory=Silent)
    read_back: bool = False


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did; sizes in bytes, time in seconds.

    Attributes:
        resumed_shards: shards that an earlier run had finished.
        already_complete: there was nothing to do.
    """

    source: str
    destination: str
    command: str
    tensors: dict[str, int]
    input_bytes: int
    output_bytes: int
    seconds: float
    shards: int
    resumed_shards: int = 0
    already_complete: bool = False
    warnings: tuple[str, ...] = field(default=())


def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    on_nonfinite: Literal["error", "keep"] = "error",
    run: RunOptions | None = None,
) -> ConversionReport:
    """Quantize a BF16, F16 or F32 checkpoint to block FP8.

    Args:
        src: folder, Hub repository id or fsspec URL of a safetensors checkpoint.
        dst: folder or fsspec URL for the result.
        recipe: format, layout and which tensors; 128x128 blocks with float32 scales by default.
        on_nonfinite: refuse a weight with NaN or Inf, or keep that tensor (and those fused with it) as it is.
        run: workers, device, overwrite, progress.

    Raises:
        BlockscaleError: bad input or an unusable destination; nothing under a final name was touched.
    """
    run, recipe = run or RunOptions(), recipe or Recipe()
    device = _device(run)
    source = open_source(src, run.revision)
    index = read_index(source)
    plan = plan_quantize(source, recipe, index)
    if on_nonfinite == "keep":
        keep = _nonfinite_weights(plan, source, run)
        plan = plan_quantize(source, recipe, index, keep) if keep else plan
    return run_plan(plan, source, dst, run, Job(source, recipe.scale_fmt, device=device))


def dequantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str = "BF16",
    on_missing_scale: Literal["error", "keep"] = "error",
    on_nonfinite: Literal["error", "keep"] = "error",
    run: RunOptions | None = None,
) -> ConversionReport:
    """Dequantize a block FP8 checkpoint (either layout) to `dtype`: BF16, F16 or F32.

    Args:
        src, dst, run: as for `quantize_checkpoint`.
        on_missing_scale: refuse FP8 weights without a scale, or keep them as raw FP8, recorded in
            config.json.
        on_nonfinite: refuse weights with NaN codes, or let the NaN through.

    Raises:
        BlockscaleError: bad input or an unusable destination; nothing under a final name was touched.
    """
    run = run or RunOptions()
    device = _device(run)
    source = open_source(src, run.revision)
    plan = plan_dequantize(source, dtype, on_missing_scale)
    return run_plan(plan, source, dst, run, Job(source, on_nonfinite=on_nonfinite, device=device))


def run_plan(
    plan: ConversionPlan, source: Source, dst: str | os.PathLike[str], run: RunOptions, job: Job
) -> ConversionReport:
    """Carry out a plan; resumes what an earlier run of the same plan left."""
    _refuse_same_place(source, dst)
    started = time.monotonic()
    with open_workspace(dst, plan.digest(), plan.files, overwrite=run.overwrite) as workspace:
        resumed, complete = len(workspace.done), workspace.complete
        if not workspace.committing and not complete:
            _convert(plan, workspace, run, job)
            _stage_rest(plan, source, workspace)
            _check_unchanged(plan, source)
        if not complete:
            commit(workspace, plan.files)
    return ConversionReport(
        source=source.spec,
        destination=os.fspath(dst),
        command=plan.command,
        tensors=plan.counts(),
        input_bytes=plan.input_bytes,
        output_bytes=plan.output_bytes,
        seconds=time.monotonic() - started,
        shards=len(plan.shards),
        resumed_shards=resumed,
        already_complete=complete,
        warnings=plan.decisions.warnings,
    )


def _convert(plan: ConversionPlan, workspace: Workspace, run: RunOptions, job: Job) -> None:
    todo = [shard for shard in plan.shards if shard.file not in workspace.done]
    # What an earlier run did is not counted: its bytes would pass for the speed of this one.
    run.progress.start(sum(s.input_bytes for s in todo), sum(len(s.tasks) for s in todo))
    _check_space(todo, workspace)
    if run.cluster is not None:
        if workspace.repository is not None:
            raise BlockscaleError(
                "a cluster cannot write to a Hub repository",
                where=workspace.target.spec,
                remedy="write to a shared folder, then upload it: hf upload",
            )
        from blockscale.checkpoint.cluster import convert_on_cluster

        convert_on_cluster(todo, workspace, job, run.cluster, run.workers, run.progress)
        return

    def finish(file: str, record: dict[str, Any]) -> None:
        if run.read_back:
            verify_shard(workspace.staging / file, record["sha256"])
        finish_shard(workspace, file, record)

    workers = run.workers or default_workers()
    convert_shards(todo, workspace.staging, job, workers, finish, run.progress)


def _stage_rest(plan: ConversionPlan, source: Source, workspace: Workspace) -> None:
    """Stage every file that is not a shard."""
    files = {name: _stage_copy(workspace, source, name) for name in plan.carried}
    records = {shard.file: workspace.done[shard.file] for shard in plan.shards}
    tensors = {
        # Shards for ranks have tensors of the same names.
        f"{file}:{name}" if plan.command == "convert" else name: value
        for file, record in records.items()
        for name, value in record["sha256"].items()
    }
    if plan.index_metadata is not None:
        weight_map = {name: file for file, record in records.items() for name in record["sha256"]}
        metadata = {**plan.index_metadata, "total_size": plan.output_bytes}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        files[INDEX_NAME] = _stage_json(workspace, INDEX_NAME, index)
    files[CONFIG_NAME] = _stage_json(workspace, CONFIG_NAME, plan.config)
    manifest = {
        "format_version": 1,
        "blockscale": __version__,
        "command": plan.command,
        "options": plan.options,
        "plan": plan.digest(),
        "files": files,
        "tensors": dict(sorted(tensors.items())),
    }
    _stage_json(workspace, MANIFEST_NAME, manifest)


def _stage_copy(workspace: Workspace, source: Source, name: str) -> str:
    target = workspace.staging / name
    with io_errors(target):
        return copy_file(source, name, target)


def _stage_json(workspace: Workspace, name: str, content: dict[str, Any]) -> str:
    # In ASCII: a file name that is no Unicode could not be written otherwise.
    data = (json.dumps(content, indent=2) + "\n").encode()
    stage_file(workspace, name, data)
    return hashlib.sha256(data).hexdigest()


def _nonfinite_weights(plan: ConversionPlan, source: Source, run: RunOptions) -> dict[str, str]:
    """Scan the weights that would be quantized; name -> why it cannot be."""
    keep: dict[str, str] = {}
    staging = Path(tempfile.mkdtemp(prefix="blockscale-"))
    try:
        for shard in plan.shards:
            (file,) = shard.source_files
            with source.local_file(file, staging) as path, open_reader(path) as reader:
                entries = [task.source for task in shard.tasks if task.action == "quantize"]
                with ThreadPoolExecutor(run.workers or default_workers()) as pool:
                    found = pool.map(lambda entry: nonfinite_of(entry, reader), entries)
                    for entry, error in zip(entries, found, strict=True):
                        if error is not None:
                            keep[entry.name] = f"{error.count} NaN or Inf"
    finally:
        shutil.rmtree(staging)
    return keep


def _device(run: RunOptions) -> str:
    if run.cluster is not None and run.device == "cuda":
        return run.device  # the GPUs of the nodes count, not one of this machine
    return usable_device(run.device)


def _refuse_same_place(source: Source, dst: str | os.PathLike[str]) -> None:
    if os.fspath(dst).startswith("hf://"):
        return  # a commit leaves the source's files where they are
    target = Source(os.fspath(dst), *resolve(os.fspath(dst)))
    if source.fs.protocol != target.fs.protocol:
        return
    a, b = (os.path.realpath(place.root) if place.is_local else place.root for place in (source, target))
    if a == b or b.startswith(a + "/") or a.startswith(b + "/"):
        raise BlockscaleError(
            "source and destination overlap", where=target.spec, remedy="write to another folder"
        )


def _check_space(todo: Sequence[ShardPlan], workspace: Workspace) -> None:
    if not workspace.waits_here:
        return  # shards leave one by one
    needed = sum(output.nbytes for shard in todo for output in shard.outputs)
    free = shutil.disk_usage(workspace.folder).free
    if needed > free:
        raise BlockscaleError(
            "not enough disk space",
            where=workspace.target.spec if workspace.target.is_local else workspace.folder,
            expected=f"{needed / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB",
        )


def _check_unchanged(plan: ConversionPlan, source: Source) -> None:
    source.refresh()
    for name, planned in plan.fingerprints.items():
        if source.fingerprint(name) != planned:
            raise CorruptCheckpointError(
                "source file changed during the run", where=name, remedy="run again with --overwrite"
            )
