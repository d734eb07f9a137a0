"""Look at a checkpoint: what is in it by role and dtype, how it is quantized, what is wrong with it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockscale.checkpoint.decide import FP8, scale_of
from blockscale.checkpoint.families import family_of
from blockscale.checkpoint.group_storage import LowBitWeight
from blockscale.checkpoint.groups import low_bit_weights
from blockscale.checkpoint.index import CheckpointIndex, read_index
from blockscale.checkpoint.model_config import read_config
from blockscale.checkpoint.names import role_of
from blockscale.checkpoint.plan import signatures
from blockscale.checkpoint.problems import Problem, structural_problems
from blockscale.checkpoint.scales import read_scale
from blockscale.checkpoint.source import Source, open_source
from blockscale.errors import CorruptCheckpointError
from blockscale.formats import scaled_weight_name
from blockscale.quantization_config import Quantization
from blockscale.reference import is_power_of_two


@dataclass(frozen=True)
class Count:
    """Tensors, parameters and bytes of one role in one dtype."""

    role: str
    dtype: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        counts: by role and dtype; scales are counted with the role of their weight, as dtype "scale".
        power_of_two_scales: how many of the scale tensors hold powers of two only; None if not looked at.
        scales: scale tensors there are.
        problems: what is wrong, errors first.
    """

    source: str
    model_type: str
    known_model_type: bool
    files: int
    parameters: int
    nbytes: int
    counts: tuple[Count, ...]
    quantization: Quantization | None
    scales: int
    power_of_two_scales: int | None
    problems: tuple[Problem, ...]


def inspect_checkpoint(src: str | os.PathLike[str], *, revision: str | None = None) -> Inspection:
    """Inspect a checkpoint from its headers and (for a local one) its scales; weights are not read.

    Args:
        src: folder, Hub repository id or fsspec URL.
        revision: of a Hub repository.

    Raises:
        BlockscaleError: no checkpoint there, or one whose files contradict their headers.
    """
    source = open_source(src, revision)
    index, config = read_index(source), read_config(source)
    quantization, problems = structural_problems(index, config)
    scales = scale_names(index)
    powers = None
    if source.is_local:
        powers, found = _look_at_scales(source, index, scales, quantization)
        problems += found
    family = family_of(config)
    counts = _count(index, scales, low_bit_weights(signatures(index), quantization))
    return Inspection(
        source=source.spec,
        model_type=str(config.get("model_type")),
        known_model_type=family.known,
        files=len(index.headers),
        parameters=sum(count.parameters for count in counts if count.dtype != "scale"),
        nbytes=index.total_size,
        counts=tuple(counts),
        quantization=quantization,
        scales=len(scales),
        power_of_two_scales=powers,
        problems=tuple(sorted(problems, key=lambda problem: problem.severity)),
    )


def scale_names(index: CheckpointIndex) -> list[str]:
    """Names of the tensors that are scales of FP8 weights."""
    tensors = signatures(index)
    found = (scale_of(name, tensors) for name, (dtype, _) in tensors.items() if dtype == FP8)
    return [name for name in found if name is not None]


def scale_value_problems(scale: Any, name: str, quantization: Quantization | None) -> list[Problem]:
    """What the values of a scale contradict: `scale_fmt: ue8m0` promises powers of two."""
    if quantization is None or quantization.fmt.scale_fmt != "ue8m0" or bool(is_power_of_two(scale).all()):
        return []
    bad = (~is_power_of_two(scale)).nonzero()[0].tolist()
    text = f"config.json says scale_fmt ue8m0 but {scale[tuple(bad)].item()} at {bad} is not a power of two"
    return [Problem("error", name, text)]


def _look_at_scales(
    source: Source, index: CheckpointIndex, scales: list[str], quantization: Quantization | None
) -> tuple[int, list[Problem]]:
    powers, problems = 0, []
    for name in scales:
        try:
            scale = read_scale(index.tensors[name], source)
        except CorruptCheckpointError as error:
            problems.append(Problem("error", name, str(error)))
            continue
        powers += bool(is_power_of_two(scale).all())
        problems += scale_value_problems(scale, name, quantization)
    return powers, problems


def _count(index: CheckpointIndex, scales: list[str], low: Mapping[str, LowBitWeight]) -> list[Count]:
    totals: dict[tuple[str, str], list[int]] = {}
    known = {name: scaled_weight_name(name) for name in scales}
    known |= {name: each.name for each in low.values() for name in each.companions}
    for name, entry in index.tensors.items():
        weight = known.get(name)
        key = role_of(weight or name), "scale" if weight else entry.dtype
        total = totals.setdefault(key, [0, 0, 0])
        total[0] += 1
        total[1] += math.prod(low[name].storage.shape(entry.shape) if name in low else entry.shape)
        total[2] += entry.nbytes
    return [Count(*key, *total) for key, total in sorted(totals.items(), key=lambda item: -item[1][2])]
