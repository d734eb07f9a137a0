"""What a search chooses in, read off a checkpoint's headers, and the model that it is measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from blockscale.checkpoint.decide import Signature, decide_quantize
from blockscale.checkpoint.families import family_of
from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.model_config import read_config
from blockscale.checkpoint.plan import signatures
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.source import open_source
from blockscale.evaluate.loading import Loading, load_transformers
from blockscale.evaluate.sensitivity import Change, Exact
from blockscale.formats import spell_block_size, tensor_nbytes
from blockscale.search.candidates import BF16, Candidate, candidates
from blockscale.search.costs import Cost, costs, make_modules, measure
from blockscale.search.units import Unit, find_units, modules_of


@dataclass(frozen=True)
class Space:
    """The units of a checkpoint and the formats that each may have.

    Attributes:
        model: as it was named.
        revision: of a Hub repository.
        base: what the recipe says besides precision.
        tensors: name -> (dtype, shape), of the whole checkpoint.
        units: weights that have one format each.
        candidates: the formats besides "bf16".
        nbytes: by unit, of each candidate.
        warnings: what the user should know.
    """

    model: str
    revision: str | None
    base: Recipe
    tensors: Mapping[str, Signature]
    units: tuple[Unit, ...]
    candidates: tuple[Candidate, ...]
    nbytes: tuple[tuple[int, ...], ...]
    warnings: tuple[str, ...]

    @property
    def source_bytes(self) -> int:
        """Of all tensors of the checkpoint."""
        return sum(tensor_nbytes(*signature) for signature in self.tensors.values())

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the options of a unit, "bf16" first."""
        return (BF16, *(candidate.name for candidate in self.candidates))

    def recipe(self, precision: Mapping[str, str]) -> dict[str, Any]:
        """A recipe file's content; the block size only where it is not that of `Recipe()`."""
        block = self.base.fmt.block_size
        return {
            "layout": self.base.layout,
            "scale_fmt": self.base.scale_fmt,
            **({} if block == Recipe().block_size else {"block_size": spell_block_size(block)}),
            "precision": dict(precision),
        }


def open_space(
    model: str, base: Recipe | None = None, formats: tuple[str, ...] = (), revision: str | None = None
) -> Space:
    """What can be chosen in a checkpoint; only headers and config.json are read.

    Args:
        model: folder, Hub repository or URL of a checkpoint that is not quantized.
        base: layout, block size of "fp8", scale format; `Recipe()` by default.
        formats: names of candidates; empty for all that the layout can mix.
        revision: of a Hub repository.

    Raises:
        BlockscaleError: no checkpoint, one that is quantized, or formats that are unknown or cannot be mixed.
    """
    source = open_source(model, revision)
    config, tensors = read_config(source), signatures(read_index(source))
    return replace(space_of(model, config, tensors, base or Recipe(), formats), revision=revision)


def space_of(
    model: str,
    config: dict[str, Any],
    tensors: Mapping[str, Signature],
    base: Recipe,
    formats: tuple[str, ...] = (),
) -> Space:
    """As `open_space`, of what a checkpoint's config.json and headers say."""
    known = candidates(formats, base.layout, base.fmt.block_size, base.scale_fmt)
    decisions = decide_quantize(tensors, config, base)
    names = [name for name, each in decisions.by_name.items() if each.action == "quantize"]
    units, family = find_units(names, tensors), family_of(config)
    nbytes = tuple(tuple(unit.nbytes(candidate, family) for candidate in known) for unit in units)
    return Space(model, None, base, tensors, units, known, nbytes, decisions.warnings)


class Bench:
    """A model of transformers on some tokens, to measure units and assignments on."""

    def __init__(self, space: Space, ids: torch.Tensor, loading: Loading) -> None:
        """Load the model and run it once.

        Raises:
            BlockscaleError: a model that transformers cannot run, or whose weights blocks cannot follow.
        """
        loading = loading.resolved()
        model = load_transformers(open_source(space.model, space.revision), loading).to(loading.device)
        self._space, self._parts = space, modules_of(space.units, model, space.tensors)
        self._exact = Exact(model, ids)

    @torch.inference_mode()
    def costs(self, on_format: Callable[[int], None]) -> list[list[Cost]]:
        """By unit, of each candidate; `on_format` is told how many measurements there are."""
        space = self._space
        total = sum(map(bool, self._parts)) * len(space.candidates)
        return [
            costs(
                space.candidates,
                nbytes,
                measure(self._exact, space.candidates, parts, lambda: on_format(total)),
            )
            for nbytes, parts in zip(space.nbytes, self._parts, strict=True)
        ]

    @torch.inference_mode()
    def joint(self, chosen: Sequence[int]) -> Change:
        """Units in the formats of these numbers in `Space.formats`, all of them together."""
        modules: dict[str, torch.nn.Module] = {}
        for number, parts in zip(chosen, self._parts, strict=True):
            if number:
                modules |= make_modules(self._exact.model, self._space.candidates[number - 1], parts)
        return self._exact.changed_by(modules)
