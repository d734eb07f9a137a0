"""Stage every file of a result that is not a shard: config, index, manifest, and what is carried along.

The manifest, `blockscale.json`, has the options and the digest of the plan, the SHA-256 of every tensor and
file, and what the values of the weights decided: block sizes, and which weights a rounder has rounded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from blockscale.checkpoint.group_storage import amax_of
from blockscale.checkpoint.index import INDEX_NAME
from blockscale.checkpoint.model_config import CONFIG_NAME
from blockscale.checkpoint.plan import MANIFEST_NAME, ConversionPlan
from blockscale.checkpoint.rounded import CALIBRATED_KEY, EXPERTS_KEY, Rounded
from blockscale.checkpoint.source import Source, copy_file
from blockscale.checkpoint.workspace import CHOICE_KEY, Workspace, stage_file
from blockscale.checkpoint.writer import io_errors
from blockscale.version import __version__

# In the manifest: how many input scales of the layout w4afp8 were calibrated.
INPUT_SCALES_KEY = "input_scales"


def stage_rest(
    plan: ConversionPlan, source: Source, workspace: Workspace, rounded: Rounded | None = None
) -> None:
    """Stage every file that is not a shard; all shards are finished.

    Args:
        plan: of the conversion.
        source: what the carried files are copied from.
        workspace: with the records of all shards.
        rounded: the weights that a rounder has rounded, for the manifest; None without a rounder.
    """
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
    if plan.choice is not None:
        manifest[CHOICE_KEY] = plan.choice.record()
    if counted := input_scales(plan, rounded):
        manifest[INPUT_SCALES_KEY] = counted
    if rounded is not None:
        manifest[CALIBRATED_KEY] = sorted(rounded.weights)
        if rounded.experts:
            manifest[EXPERTS_KEY] = [asdict(each) for each in rounded.experts]
    _stage_json(workspace, MANIFEST_NAME, manifest)


def input_scales(plan: ConversionPlan, rounded: Rounded | None) -> dict[str, int]:
    """How many weights have a "calibrated" input scale, and one of 1.0 by "default"; {} without any."""
    tasks = [task for shard in plan.shards for task in shard.tasks if task.action == "quantize"]
    weights = [task.source.name for task in tasks if task.low and "input_scale" in task.low.storage.more]
    amax = {} if rounded is None else rounded.input_amax
    known = sum(amax_of(name, amax) is not None for name in weights)
    return {"calibrated": known, "default": len(weights) - known} if weights else {}


def _stage_copy(workspace: Workspace, source: Source, name: str) -> str:
    target = workspace.staging / name
    with io_errors(target):
        return copy_file(source, name, target)


def _stage_json(workspace: Workspace, name: str, content: dict[str, Any]) -> str:
    # In ASCII: a file name that is no Unicode could not be written otherwise.
    data = (json.dumps(content, indent=2) + "\n").encode()
    stage_file(workspace, name, data)
    return hashlib.sha256(data).hexdigest()
