"""`budget:SIZE`: the recipe that fits into a size, by shapes alone; only headers or config.json are read.

Routed experts, and where that is not enough other weights, get FP8, INT4 or INT3 in groups of 128. Which of
them is again a choice of least cost under a size (`assign.py`), with a model of the cost in place of
measurements: rounding noise of a format adds to the noise of the outputs of a layer,

    cost(unit, format) = use * place * matrices * noise(format)

noise: relative squared error of a format on Gaussian values.
use: 1 / top_k of routed experts, as the noise of so many independent experts is averaged; else 1.
place: 1 in the middle of the model to 2 in its first and last layer, where less is made up for.

So what is large and used by few goes first: experts of layers in the middle. `search` measures instead, where
the model can be run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blockscale.checkpoint.precision import parse_precision
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.sizing import read_shapes
from blockscale.search.assign import Option, assign
from blockscale.search.goals import Goal, smallest_bytes, target_bytes
from blockscale.search.recipes import compact
from blockscale.search.space import Space, space_of
from blockscale.search.units import Unit

# On Gaussian values, (|x - x'| / |x|)^2.
NOISE = {"fp8": 0.0264**2, "int4:g128": 0.1176**2, "int3:g128": 0.2744**2}
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")


def budget_recipe(
    src: str | os.PathLike[str] | dict[str, Any],
    size: str,
    base: Recipe | None = None,
    revision: str | None = None,
) -> Recipe:
    """The recipe of a checkpoint for a size.

    Args:
        src: checkpoint folder, Hub id or URL, of which headers are read, or a config.json, as path or parsed.
        size: of all tensors of the result: `"340GB"`, or `"0.25x"` of the source.
        base: scale format and block size; the layout becomes "blockscale".
        revision: of a Hub repository.

    Raises:
        BlockscaleError: no checkpoint, one that is quantized, or a size that these formats cannot have.
    """
    config, tensors, label, _ = read_shapes(src, revision)
    space = space_of(label, config, tensors, replace(base or Recipe(), layout="blockscale"), tuple(NOISE))
    rest = space.source_bytes - sum(unit.source_bytes for unit in space.units)
    options = _options(space, config)
    limit = target_bytes(Goal(size), space.source_bytes, smallest_bytes(options, rest))
    assert limit is not None
    found = assign(options, limit - rest)
    names = [candidate.name for candidate in space.candidates]
    precision = compact(space.units, [names[number] for number in found.chosen])
    return replace(space.base, precision=parse_precision(precision))


def _options(space: Space, config: Mapping[str, Any]) -> list[list[Option]]:
    """By unit, in the order of the candidates."""
    layers = max((_layer(unit) or 0 for unit in space.units), default=0)
    top_k = next((int(config[key]) for key in _TOP_K if config.get(key)), 1)
    return [
        [
            Option(nbytes, _weight(unit, layers, top_k) * NOISE[candidate.name])
            for candidate, nbytes in zip(space.candidates, sizes, strict=True)
        ]
        for unit, sizes in zip(space.units, space.nbytes, strict=True)
    ]


def _weight(unit: Unit, layers: int, top_k: int) -> float:
    """use * place * matrices."""
    layer = _layer(unit)
    place = 2.0 if layer is None or not layers else 1 + abs(2 * layer / layers - 1)
    if unit.role == "experts":
        return (
            place
            * len({name.rpartition("experts.")[2].lstrip("0123456789.") for name in unit.tensors})
            / top_k
        )
    return place * len(unit.tensors)


def _layer(unit: Unit) -> int | None:
    """Number of the decoder layer, if the unit is in one."""
    found = re.search(r"\.(\d+)\.", unit.name)
    return int(found[1]) if found else None
