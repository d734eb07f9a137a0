"""Read the scale of an FP8 weight, and refuse one that cannot be a scale."""

from __future__ import annotations

import math

import torch

from blockscale.checkpoint.decide import SCALE_DTYPES
from blockscale.checkpoint.group_storage import PACKED, GroupStorage
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.source import Source
from blockscale.errors import CorruptCheckpointError
from blockscale.formats import SAFETENSORS_DTYPES


def read_scale(entry: TensorEntry, source: Source, storage: GroupStorage | None = None) -> torch.Tensor:
    """Read a scale from whatever shard holds it, as float32.

    Args:
        entry: of the scale.
        source: of the checkpoint.
        storage: of a weight of fewer than 8 bits; some have bytes that are E8M0.

    Raises:
        CorruptCheckpointError: a wrong dtype, or a scale that is not a positive finite number.
    """
    as_bytes = storage is not None and entry.dtype == storage.scale_dtype == PACKED
    dtype = SAFETENSORS_DTYPES[entry.dtype] if entry.dtype in SCALE_DTYPES else None
    dtype = torch.float8_e8m0fnu if as_bytes else dtype
    if dtype is None:
        raise CorruptCheckpointError(
            "scale has a wrong dtype", where=entry.name, expected=" | ".join(SCALE_DTYPES), got=entry.dtype
        )
    raw = bytearray(source.read(entry.file, entry.start, entry.nbytes))
    if len(raw) != entry.nbytes:
        raise CorruptCheckpointError(
            "file became shorter while it was read", where=entry.file, remedy="fetch the file again"
        )
    scale = (
        (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype))
        .reshape(entry.shape)
        .float()
    )
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bad.any():
        position = bad.nonzero()[0].tolist()
        raise CorruptCheckpointError(
            f"{int(bad.sum())} scales are not positive finite numbers",
            where=f"{entry.name} in {entry.file}",
            got=f"{scale[tuple(position)].item()} at {position}",
        )
    return scale


def per_expert(scale: torch.Tensor) -> torch.Tensor:
    """A scale grid, of 2-D or fused 3-D weights, as (experts, rows, columns)."""
    return scale.view(math.prod(scale.shape[:-2]), *scale.shape[-2:])
