"""Quantize or dequantize a whole checkpoint: plan it, convert what is left to do, commit the result.

The commit writes config.json, the index, the carried files and `blockscale.json`: a manifest with the SHA-256
of every tensor and file, which `verify` compares with. The bytes of a result depend on the plan alone: not
on threads, devices, interruptions or machines.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from blockscale.checkpoint.block_choice import Chosen
from blockscale.checkpoint.block_measure import choose_blocks
from blockscale.checkpoint.commit import commit
from blockscale.checkpoint.engine import convert_shards, default_workers
from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.lanes import usable_device
from blockscale.checkpoint.plan import ConversionPlan, plan_dequantize, plan_quantize
from blockscale.checkpoint.progress import Progress, Silent
from blockscale.checkpoint.recipe import AUTO, Recipe
from blockscale.checkpoint.rounded import CALIBRATION_KEY, ExpertTokens, Rounder, round_weights, with_rounder
from blockscale.checkpoint.scan import scan
from blockscale.checkpoint.source import Source, open_source, resolve
from blockscale.checkpoint.stage import input_scales, stage_rest
from blockscale.checkpoint.strips import nonfinite_of
from blockscale.checkpoint.tasks import Job
from blockscale.checkpoint.verify import verify_shard
from blockscale.checkpoint.workspace import Workspace, finish_shard, open_workspace, recorded_choice
from blockscale.errors import BlockscaleError, CorruptCheckpointError


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
        block_sizes: size -> how many FP8 weights have it, of those that were quantized or dequantized.
        group_formats: the same of formats of fewer than 8 bits.
        block_choice: under the block size "auto", what was chosen for each weight and why.
        calibrated: weights that were taken over from a rounder.
        calibration_tokens: that it rounded them on; 0 where it does not say.
        calibrated_experts: how many of these tokens the experts of each layer were given.
        input_scales: of the layout w4afp8: how many were "calibrated", and how many are 1.0 by "default".
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
    block_sizes: dict[str, int] = field(default_factory=dict)
    block_choice: dict[str, Chosen] | None = None
    calibrated: int = 0
    group_formats: dict[str, int] = field(default_factory=dict)
    calibration_tokens: int = 0
    calibrated_experts: tuple[ExpertTokens, ...] = ()
    input_scales: dict[str, int] = field(default_factory=dict)


def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    on_nonfinite: Literal["error", "keep"] = "error",
    run: RunOptions | None = None,
    rounder: Rounder | None = None,
) -> ConversionReport:
    """Quantize a BF16, F16 or F32 checkpoint to block FP8.

    Args:
        src: folder, Hub repository id or fsspec URL of a safetensors checkpoint.
        dst: folder or fsspec URL for the result.
        recipe: format, layout and which tensors; 128x128 blocks with float32 scales by default.
        on_nonfinite: refuse a weight with NaN or Inf, or keep that tensor (and those fused with it) as it is.
        run: workers, device, overwrite, progress.
        rounder: rounds weights by more than their values; what it leaves out is rounded to the nearest code.

    Raises:
        BlockscaleError: bad input or an unusable destination; nothing under a final name was touched.
    """
    run, recipe = run or RunOptions(), recipe or Recipe()
    if rounder is not None and run.cluster is not None:
        raise BlockscaleError(
            "weights are calibrated on one machine",
            where=f"cluster {run.cluster}",
            remedy="leave out --cluster",
        )
    device = _device(run)
    source = open_source(src, run.revision)
    index = read_index(source)
    plan, keep = plan_quantize(source, recipe, index), dict[str, str]()
    if on_nonfinite == "keep":
        keep = _nonfinite_weights(plan, source, run)
        plan = plan_quantize(source, recipe, index, keep) if keep else plan
    if recipe.block_size == AUTO:
        recorded = recorded_choice(dst, plan.digest())
        choice = recorded or choose_blocks(plan, source, recipe, run.workers, run.progress)
        plan = plan_quantize(source, recipe, index, keep, choice)
    if rounder is not None:
        plan = with_rounder(plan, rounder)
    return run_plan(plan, source, dst, run, Job(source, recipe.scale_fmt, device=device), rounder)


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
    plan: ConversionPlan,
    source: Source,
    dst: str | os.PathLike[str],
    run: RunOptions,
    job: Job,
    rounder: Rounder | None = None,
) -> ConversionReport:
    """Carry out a plan; resumes what an earlier run of the same plan left."""
    _refuse_same_place(source, dst)
    started = time.monotonic()
    choice = None if plan.choice is None else plan.choice.record()
    with open_workspace(dst, plan.digest(), plan.files, overwrite=run.overwrite, choice=choice) as workspace:
        resumed, complete = len(workspace.done), workspace.complete
        if not workspace.committing and not complete:
            if rounder is not None:
                _check_space(plan, workspace)  # before the hours that rounding may take, not only after them
                weights = round_weights(plan, rounder, workspace.rounded, job.scale_fmt, run.progress)
                job = replace(job, rounded=weights)
            _convert(plan, workspace, run, job)
            stage_rest(plan, source, workspace, job.rounded)
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
        block_sizes=plan.decisions.block_sizes,
        block_choice=None if plan.choice is None else plan.choice.tensors,
        group_formats=plan.decisions.group_formats,
        calibrated=0 if job.rounded is None else len(job.rounded.weights),
        calibration_tokens=plan.options.get(CALIBRATION_KEY, {}).get("tokens", 0),
        calibrated_experts=() if job.rounded is None else job.rounded.experts,
        input_scales={} if complete else input_scales(plan, job.rounded),
    )


def _convert(plan: ConversionPlan, workspace: Workspace, run: RunOptions, job: Job) -> None:
    todo = [shard for shard in plan.shards if shard.file not in workspace.done]
    # What an earlier run did is not counted: its bytes would pass for the speed of this one.
    run.progress.start(sum(s.input_bytes for s in todo), sum(len(s.tasks) for s in todo))
    _check_space(plan, workspace)
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


def _nonfinite_weights(plan: ConversionPlan, source: Source, run: RunOptions) -> dict[str, str]:
    """Scan the weights that would be quantized; name -> why it cannot be."""
    found = scan(plan, source, run.workers, nonfinite_of)
    return {entry.name: f"{error.count} NaN or Inf" for entry, error in found if error is not None}


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


def _check_space(plan: ConversionPlan, workspace: Workspace) -> None:
    if not workspace.waits_here:
        return  # shards leave one by one
    todo = (shard for shard in plan.shards if shard.file not in workspace.done)
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
