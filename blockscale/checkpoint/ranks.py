"""Read the shards of DeepSeek's inference folder as if they were a Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from blockscale.checkpoint.deepseek_names import RANK_FILE, huggingface_name, rank_file
from blockscale.checkpoint.index import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointIndex,
    Header,
    TensorEntry,
    read_header,
)
from blockscale.checkpoint.model_config import CONFIG_NAME
from blockscale.checkpoint.remote import WORK_FOLDER
from blockscale.checkpoint.source import Source
from blockscale.errors import BlockscaleError, CorruptCheckpointError


def world_size_of(source: Source) -> int | None:
    """How many ranks a folder was converted for; None if it has no shards for ranks, so is Hugging Face's.

    Raises:
        BlockscaleError: shards for several numbers of ranks, or beside a Hugging Face checkpoint; or a
            conversion is replacing the shards that were there.
    """
    names = source.files()
    worlds = sorted({int(match[2]) for name in names if (match := RANK_FILE.fullmatch(name))})
    if not worlds:
        return None
    other = next((name for name in (INDEX_NAME, SINGLE_NAME) if name in names), None)
    if len(worlds) > 1 or other is not None:
        raise BlockscaleError(
            "holds more than one checkpoint",
            where=source.spec,
            expected="the shards of one number of ranks",
            got=", ".join([*(rank_file(0, world) for world in worlds), *([other] if other else [])]),
            remedy="keep one of them here",
        )
    # While shards are replaced, config.json is away and the journal is there.
    if CONFIG_NAME not in names and source.exists(f"{WORK_FOLDER}/journal.jsonl"):
        raise BlockscaleError(
            "holds a conversion that is not finished",
            where=source.spec,
            remedy="run the same blockscale convert again",
        )
    return worlds[0]


def read_rank_index(source: Source, rank: int, world: int) -> CheckpointIndex:
    """The tensors of one rank's shard under Hugging Face's names, with the shapes that the rank has.

    Raises:
        BlockscaleError: the folder was converted for another number of ranks, or has no shard for this one.
        CorruptCheckpointError: a header that is wrong, or a tensor that has no name of Hugging Face's.
    """
    found, file = world_size_of(source), rank_file(rank, world)
    if found not in (world, None):
        raise BlockscaleError(
            f"was converted for {found} ranks",
            where=source.spec,
            expected=f"{world}, the ranks of this run",
            remedy=f"run it on {found} ranks, or convert it with --mp {world}",
        )
    if not source.exists(file):
        raise BlockscaleError(
            "the shard of this rank is missing",
            where=source.path(file),
            remedy="copy it from where the checkpoint was converted, or convert it again",
        )
    header = read_header(partial(source.read, file), source.size(file), file)
    entries = tuple(_renamed(entry) for entry in header.entries)
    tensors = {entry.name: entry for entry in entries}
    if len(tensors) != len(entries):
        raise CorruptCheckpointError("two tensors of one name", where=source.path(file))
    return CheckpointIndex(tensors, {file: Header(entries, header.metadata, header.file_size)}, None)


def _renamed(entry: TensorEntry) -> TensorEntry:
    return replace(entry, name=huggingface_name(entry.name))
