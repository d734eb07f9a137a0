"""Which parameters of a model of transformers become FP8, and which tensors of a checkpoint they are made of.

Names on disk are not those of the model: transformers renames tensors as it reads them, and merges those of
single experts, (N, K) each, into (E, N, K), gate over up. The tables by which it does are asked here before
anything is read, since scales and blocks have to follow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from blockscale.checkpoint.decide import Signature, check_grid
from blockscale.checkpoint.group_storage import LowBitWeight, check_companions
from blockscale.checkpoint.index import read_header
from blockscale.errors import BlockscaleError, MissingScaleError
from blockscale.formats import BlockFP8, Layout, scale_name
from blockscale.group_spelling import WrittenFormat
from blockscale.huggingface.linear import Compute
from blockscale.huggingface.modules import quantized_layer
from blockscale.huggingface.stored import Stored
from blockscale.quantization_config import Quantization


@dataclass(frozen=True)
class Target:
    """A parameter that becomes FP8.

    Attributes:
        name: full name in the model.
        sources: tensors of the checkpoint that it is made of.
        parts: how many matrices with blocks of their own lie in it one below the other.
    """

    name: str
    sources: tuple[str, ...]
    parts: int

    @property
    def path(self) -> str:
        """The module."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """The parameter in the module."""
        return self.name.rpartition(".")[2]


def read_signatures(files: Sequence[str] | None) -> dict[str, Signature]:
    """Name -> (safetensors dtype, shape) of the tensors in local safetensors files.

    Raises:
        BlockscaleError: no files (a state dict was passed), another format, or a damaged header.
    """
    tensors: dict[str, Signature] = {}
    for file in files or ("a state dict",):
        if not file.endswith(".safetensors"):
            raise BlockscaleError("cannot be quantized as it is read", expected="safetensors files", got=file)
        with Path(file).open("rb") as stream:
            header = read_header(partial(_read, stream), Path(file).stat().st_size, file)
        tensors |= {entry.name: (entry.dtype, entry.shape) for entry in header.entries}
    return tensors


def find_targets(
    model: nn.Module, tensors: Mapping[str, Signature], chosen: Collection[str]
) -> tuple[Target, ...]:
    """The parameters that `chosen` tensors of the checkpoint make up; those not in the model are left out.

    Raises:
        BlockscaleError: a parameter is made of chosen and other tensors, or so that blocks cannot follow.
    """
    sources: dict[str, list[str]] = {}
    made_by: dict[str, Any] = {}
    for name, target, converter in made_of(model, tensors, dict(model.named_parameters())):
        sources.setdefault(target, []).append(name)
        made_by[target] = converter
    targets = []
    for target, names in sources.items():
        if any(name in chosen for name in names):
            _check_alike(target, names, tensors, chosen)
            targets.append(Target(target, tuple(names), _parts(target, names[0], made_by[target])))
    return tuple(targets)


def made_of(
    model: nn.Module, tensors: Collection[str], known: Mapping[str, object]
) -> Iterator[tuple[str, str, WeightConverter | None]]:
    """Tensors of a checkpoint, in their natural order, with what of a model they become.

    Args:
        model: of transformers.
        tensors: names in the checkpoint.
        known: of names in the model; tensors that become none of them are left out.

    Yields:
        (tensor, name in the model, what makes it of several tensors; None for one that is only renamed)
    """
    mapping = get_model_conversion_mapping(model)
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    renamings = [each for each in mapping if not isinstance(each, WeightConverter)]
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None  # what is named as in the model stays so
        if target in known:
            yield name, target, of_pattern[pattern] if pattern is not None else None


def check_stored(
    targets: Sequence[Target],
    tensors: Mapping[str, Signature],
    quantization: Quantization,
    low: Iterable[LowBitWeight],
) -> None:
    """Refuse quantized weights without a scale, or with one that is not what the config says.

    Args:
        targets: parameters.
        tensors: of the checkpoint.
        quantization: how they are stored.
        low: those of fewer than 8 bits.

    Raises:
        BlockscaleError: as said; MissingScaleError for the former.
    """
    groups = {each.name: each for each in low}
    for each in groups.values():
        check_companions(each, tensors)
    names = [name for target in targets for name in target.sources if name not in groups]
    scales = {name: scale_name(name, quantization.layout) for name in names}
    missing = [name for name in names if scales[name] not in tensors]
    if missing:
        raise MissingScaleError(
            f"{len(missing)} of {len(names)} FP8 weights have no scale",
            expected=f"{scales[missing[0]]} beside {missing[0]}",
            remedy="fetch the missing shard",
        )
    for name, scale in scales.items():
        check_grid(name, tensors[name][1], scale, tensors[scale], quantization.fmt.block_size)


def replace_layers(
    model: nn.Module,
    targets: Sequence[Target],
    fmt: BlockFP8,
    compute: Compute,
    groups: Mapping[str, WrittenFormat],
    layout: Layout,
) -> None:
    """Put a layer of `modules` in the place of every module that has a target.

    Args:
        model: of transformers.
        targets: parameters that are quantized.
        fmt: of FP8 weights.
        compute: see `BlockscaleConfig`.
        groups: weights of the checkpoint that have, or get, fewer than 8 bits -> their format.
        layout: of the checkpoint, our own for what is quantized as it is read.

    Raises:
        BlockscaleError: a target is no weight of a linear layer, nor of experts that `QuantizedExperts`
            computes; or it is made of tensors in several formats.
    """
    stored: dict[str, dict[str, Stored]] = {}
    first: dict[str, str] = {}
    for target in targets:
        group = groups.get(target.sources[0])
        odd = next((name for name in target.sources if groups.get(name) != group), None)
        if odd is not None:
            where = f"one format for all of {target.name}"
            raise BlockscaleError("has another format than the others", where=odd, expected=where)
        stored.setdefault(target.path, {})[target.leaf] = Stored(target.parts, group, layout)
        first.setdefault(target.path, target.sources[0])
    made = {
        path: quantized_layer(model.get_submodule(path), fmt, compute, each, first[path])
        for path, each in stored.items()
    }
    for path, layer in made.items():
        model.set_submodule(path, layer)


def _read(stream: Any, start: int, length: int) -> bytes:
    stream.seek(start)
    return stream.read(length)


def _check_alike(
    target: str, names: list[str], tensors: Mapping[str, Signature], chosen: Collection[str]
) -> None:
    odd = next((name for name in names if name not in chosen), None)
    if odd is not None:
        other = next(name for name in names if name in chosen)
        raise BlockscaleError(
            f"has another precision than {other}, and transformers makes one parameter of both",
            where=odd,
            expected=f"one precision for all of {target}",
            got=tensors[odd][0],
            remedy="include or exclude them together",
        )


def _parts(target: str, source: str, converter: WeightConverter | None) -> int:
    if converter is None:
        return 1
    plain = all(
        (isinstance(each, MergeModulelist) and each.dim == 0)
        or (isinstance(each, Concatenate) and each.dim == 1)
        for each in converter.operations
    )
    if not plain or not isinstance(converter.operations[0], MergeModulelist):
        raise BlockscaleError(
            f"transformers makes {target} of it in a way that blocks cannot follow",
            where=source,
            expected="a weight read as it is, or experts merged into one",
            got=", ".join(map(repr, converter.operations)),
            remedy="leave it out of what is quantized, or dequantize the checkpoint",
        )
    return len(converter.source_patterns)
