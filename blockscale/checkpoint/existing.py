"""What lies at a destination already: the finished result, another checkpoint, files that would be lost."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any

from blockscale.checkpoint.index import INDEX_NAME, parse_object
from blockscale.checkpoint.model_config import CONFIG_NAME
from blockscale.checkpoint.plan import MANIFEST_NAME
from blockscale.checkpoint.source import Source
from blockscale.errors import BlockscaleError, CorruptCheckpointError

# Names that checkpoints give their shards; adapters and the like have others, and may lie beside them.
_SHARD = re.compile(r"model[\w.-]*\.safetensors(\.index\.json)?")


def refuse_occupied(
    target: Source, digest: str, files: Collection[str], given: Collection[str], *, overwrite: bool
) -> bool:
    """Whether the destination already holds the result of the plan with this digest.

    Args:
        target: the destination; it need not exist.
        digest: of the plan.
        files: names of all files of the result.
        given: files that may be there anyway.
        overwrite: so may everything else.

    Raises:
        BlockscaleError: it holds another checkpoint, or files that the result would replace.
    """
    if not target.is_local:
        target.refresh()
    if not target.fs.exists(target.root):
        return False
    names = [name for name in target.files() if name not in given]
    present = [name for name in names if name in files or _SHARD.fullmatch(name)]
    if overwrite or not present:
        return False
    telling = {MANIFEST_NAME, CONFIG_NAME, INDEX_NAME}
    finished = {MANIFEST_NAME, CONFIG_NAME} <= set(present)
    if finished and _read_object(target, MANIFEST_NAME).get("plan") == digest:
        return True
    raise BlockscaleError(
        "already holds a checkpoint, or files that the result would replace",
        where=target.spec,
        got=min(present, key=lambda name: (name not in telling, name)),
        remedy="choose another folder, or replace them with --overwrite",
    )


def stale_files(target: Source, files: Collection[str]) -> list[str]:
    """Files of a replaced model without a successor: its shards, and unchanged files that it carried along.

    A tokenizer or chat template that stayed behind would pass for the new model's.
    """
    carried = _read_object(target, MANIFEST_NAME).get("files")
    carried = carried if isinstance(carried, dict) else {}
    weight_map = _read_object(target, INDEX_NAME).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return [
        name
        for name in target.files()
        if name not in files
        and (
            _SHARD.fullmatch(name)
            or name in shards
            or (name in carried and hashlib.sha256(target.read(name)).hexdigest() == carried[name])
        )
    ]


def _read_object(target: Source, name: str) -> dict[str, Any]:
    """A JSON file of an old checkpoint; empty if it is not there or broken."""
    try:
        return parse_object(target.read(name), name) if target.exists(name) else {}
    except CorruptCheckpointError:
        return {}
