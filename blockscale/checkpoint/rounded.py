"""Weights that somebody else rounds, by more than their values alone: calibrated rounding.

The converter rounds every value to the nearest code. A `Rounder` may do better, for it knows what the weights
are multiplied with. It leaves safetensors files in a folder of the run, of any names and any number,

    <name>              float8_e4m3fn (N, K) or (E, N, K), the shape of the weight
    <name>_scale_inv    float32, its scale grid

or, for a format below 8 bits, as our own layout has it,

    <name>              uint8, its packed codes
    <name>_scale        its scales, BF16 or E8M0

whatever the layout of the result, and the converter takes codes and scales over as they are, strip by strip.
Beside them `experts.json` may tell how many tokens the experts of a mixture were calibrated on, and
`inputs.json` the largest absolute value that each weight was multiplied with: {weight name: amax}.
The folder stays where a run is interrupted and goes away with the commit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from blockscale.checkpoint.decide import FP8
from blockscale.checkpoint.group_storage import group_scale_name, group_storage
from blockscale.checkpoint.index import TensorEntry, parse_object, read_header
from blockscale.checkpoint.plan import MANIFEST_NAME, ConversionPlan
from blockscale.checkpoint.progress import Progress
from blockscale.checkpoint.scales import read_scale
from blockscale.checkpoint.skip_list import Signature
from blockscale.checkpoint.source import Source, open_source
from blockscale.checkpoint.writer import io_errors
from blockscale.errors import CorruptCheckpointError
from blockscale.formats import BlockFP8, ScaleFmt, scale_name
from blockscale.group_spelling import WrittenFormat
from blockscale.reference import is_power_of_two

# In the options of a plan, and in the manifest of a result: the names of the weights.
CALIBRATION_KEY, CALIBRATED_KEY = "calibration", "calibrated"
# In the manifest, too: what `experts.json` says.
EXPERTS_KEY, EXPERTS_NAME = "calibrated_experts", "experts.json"
INPUTS_NAME = "inputs.json"
# What a weight becomes.
QuantizedFormat = BlockFP8 | WrittenFormat
_REMEDY = "remove the file and run the same command again"


class Rounder(Protocol):
    """Rounds weights of a checkpoint before it is converted."""

    def settings(self) -> dict[str, Any]:
        """All that its result depends on beside the checkpoint and the formats, as JSON.

        It is part of the plan: an unfinished run with other settings is not resumed but refused.
        """

    def run(
        self, weights: Mapping[str, QuantizedFormat], scale_fmt: ScaleFmt, folder: Path, progress: Progress
    ) -> None:
        """Write what it rounds of these weights, and skip what is in the folder already.

        Args:
            weights: every weight that is quantized -> its format; a block size is on the axes as stored.
            scale_fmt: of activations, and of FP8 weights.
            folder: for safetensors files, each of which gets its name when it is complete. Names that end in
                anything but `.safetensors` or begin with a dot are its own affair; subfolders are, too.
            progress: to be told of its totals, bytes and tensors.

        Raises:
            BlockscaleError: it cannot; the weights of which it wrote nothing are rounded by the converter,
                but those it writes nobody looks at for NaN or Inf in the source.
        """


@dataclass(frozen=True)
class ExpertTokens:
    """Calibration tokens of the routed experts of a layer; an expert with few of them is rounded plainly.

    Attributes:
        layer: number of the decoder layer.
        experts: how many there are.
        least: tokens of the expert that was given the fewest.
        median: of the tokens of all experts.
        needed: tokens that an expert needs for all of its weights to be calibrated.
        plain: experts that were given fewer: weights of theirs are rounded to the nearest code.
    """

    layer: int
    experts: int
    least: int
    median: float
    needed: int
    plain: tuple[int, ...]


@dataclass(frozen=True)
class RoundedWeight:
    """Where the codes and the scale of a weight lie."""

    codes: TensorEntry
    scale: TensorEntry


@dataclass(frozen=True)
class Rounded:
    """What a rounder has written; all checked but the codes, which are read once.

    Attributes:
        folder: of the files.
        weights: name -> codes and scale.
        experts: of every layer that has some and of which the rounder tells.
        input_amax: weight -> the largest absolute value of its input, of those of which the rounder tells.
    """

    folder: Source
    weights: Mapping[str, RoundedWeight]
    experts: tuple[ExpertTokens, ...] = ()
    input_amax: Mapping[str, float] = field(default_factory=dict)

    def path(self, entry: TensorEntry) -> Path:
        """The file that holds an entry."""
        return Path(self.folder.path(entry.file))

    def refusal(
        self, what: str, entry: TensorEntry, expected: object = None, got: object = None
    ) -> CorruptCheckpointError:
        """The error about an entry that cannot be taken over."""
        return CorruptCheckpointError(
            what,
            where=f"{entry.name} in {self.path(entry)}",
            expected=expected,
            got=got,
            remedy=_REMEDY,
        )


def with_rounder(plan: ConversionPlan, rounder: Rounder) -> ConversionPlan:
    """The plan, with the settings of a rounder among its options and so in its digest."""
    return replace(plan, options={**plan.options, CALIBRATION_KEY: rounder.settings()})


def round_weights(
    plan: ConversionPlan, rounder: Rounder, folder: Path, scale_fmt: ScaleFmt, progress: Progress
) -> Rounded:
    """Let a rounder round the weights of a plan.

    Args:
        plan: says which weights become what.
        rounder: writes into the folder.
        folder: made if need be; what earlier runs of the same plan have finished is in it.
        scale_fmt: of activations, and of FP8 weights.
        progress: for the rounder.

    Raises:
        CorruptCheckpointError: something in the folder is not what the plan asks for.
    """
    tasks = {
        task.source.name: task for shard in plan.shards for task in shard.tasks if task.action == "quantize"
    }
    formats = {name: task.group or BlockFP8(task.block_size, scale_fmt) for name, task in tasks.items()}
    folder.mkdir(parents=True, exist_ok=True)
    rounder.run(formats, scale_fmt, folder, progress)
    shapes = {name: task.source.shape for name, task in tasks.items()}
    return read_rounded(folder, formats, shapes)


def read_rounded(
    folder: Path, formats: Mapping[str, QuantizedFormat], shapes: Mapping[str, tuple[int, ...]]
) -> Rounded:
    """Find and check what lies in a rounder's folder.

    Args:
        folder: of the files.
        formats: name -> format that its codes and scale must have.
        shapes: name -> shape of the weight.

    Raises:
        CorruptCheckpointError: a file that is no safetensors file, a tensor that nobody asked for or that is
            there twice, a wrong dtype, shape or grid, no scale, or a scale of wrong values.
    """
    rounded = Rounded(open_source(folder), {})
    entries = _entries(rounded)
    scales = {scale_of_rounded(name, fmt): name for name, fmt in formats.items()}
    weights = {}
    for name, entry in entries.items():
        if name in formats:
            scale = entries.get(scale_of_rounded(name, formats[name]))
            weights[name] = _checked(rounded, entry, scale, formats[name], shapes[name])
        elif scales.get(name) not in entries:
            raise rounded.refusal("is not of a rounded weight", entry, "quantized weights, and scales")
    return replace(rounded, weights=weights, experts=read_experts(folder), input_amax=read_inputs(folder))


def scale_of_rounded(name: str, fmt: QuantizedFormat) -> str:
    """Name of the scale of a rounded weight in a rounder's folder."""
    return scale_name(name) if isinstance(fmt, BlockFP8) else group_scale_name(name)


def read_experts(folder: Path) -> tuple[ExpertTokens, ...]:
    """What a rounder tells of experts, by layers; nothing where there is no `experts.json`.

    Raises:
        CorruptCheckpointError: it is not what `add_experts` writes.
    """
    file = folder / EXPERTS_NAME
    if not file.exists():
        return ()
    try:
        return tuple(
            ExpertTokens(**{**each, "plain": tuple(each["plain"])}) for each in json.loads(file.read_bytes())
        )
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptCheckpointError("cannot be used", where=file, got=str(error), remedy=_REMEDY) from error


def read_inputs(folder: Path) -> dict[str, float]:
    """What a rounder tells of inputs: weight -> amax; nothing where there is no `inputs.json`.

    Raises:
        CorruptCheckpointError: it is no object of finite numbers that are not negative.
    """
    file = folder / INPUTS_NAME
    if not file.exists():
        return {}
    try:
        found = {str(name): float(amax) for name, amax in json.loads(file.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError("cannot be used", where=file, got=str(error), remedy=_REMEDY) from error
    for name, amax in found.items():
        if not (math.isfinite(amax) and amax >= 0):
            raise CorruptCheckpointError(
                "cannot be used", where=file, got=f"{amax} of {name}", remedy=_REMEDY
            )
    return found


def add_inputs(folder: Path, found: Mapping[str, float]) -> None:
    """Tell of the inputs of more weights: name -> amax."""
    if found:
        _write_whole(folder / INPUTS_NAME, read_inputs(folder) | dict(found))


def add_experts(folder: Path, found: ExpertTokens) -> None:
    """Tell of the experts of one more layer, in place of what was told of it before."""
    others = [each for each in read_experts(folder) if each.layer != found.layer]
    records = [asdict(each) for each in sorted([*others, found], key=lambda each: each.layer)]
    _write_whole(folder / EXPERTS_NAME, records)


def _write_whole(file: Path, content: object) -> None:
    """All of it as JSON, or the file as it was."""
    unfinished = file.with_name(f".{file.name}.part")
    with io_errors(file):
        unfinished.write_text(json.dumps(content))
        unfinished.replace(file)


def calibrated_names(source: Source) -> frozenset[str]:
    """The weights that a rounder has rounded, as the manifest says; none where there is no manifest."""
    if not source.exists(MANIFEST_NAME):
        return frozenset()
    names: Any = ()
    with suppress(CorruptCheckpointError):  # `verify` tells
        names = parse_object(source.read(MANIFEST_NAME), MANIFEST_NAME).get(CALIBRATED_KEY, ())
    return (
        frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()
    )


def _entries(rounded: Rounded) -> dict[str, TensorEntry]:
    """Name -> entry of everything in the files of a folder."""
    entries: dict[str, TensorEntry] = {}
    for file, size in rounded.folder.files().items():
        if "/" in file or not file.endswith(".safetensors"):
            continue
        try:
            header = read_header(partial(rounded.folder.read, file), size, file)
        except CorruptCheckpointError as error:
            got, where = str(error).partition("; ")[0], rounded.folder.path(file)
            raise CorruptCheckpointError("cannot be used", where=where, got=got, remedy=_REMEDY) from error
        for entry in header.entries:
            if entry.name in entries:
                raise rounded.refusal("is in two files", entry, got=f"also in {entries[entry.name].file}")
            entries[entry.name] = entry
    return entries


def _checked(
    rounded: Rounded,
    codes: TensorEntry,
    scale: TensorEntry | None,
    fmt: QuantizedFormat,
    shape: tuple[int, ...],
) -> RoundedWeight:
    stored, grid = _stored(fmt, shape)
    if (codes.dtype, codes.shape) != stored:
        raise rounded.refusal(
            "rounded weight is not the one of the plan", codes, _spelled(stored), _spelled_entry(codes)
        )
    if scale is None:
        raise rounded.refusal("rounded weight without a scale", codes, scale_of_rounded(codes.name, fmt))
    if (scale.dtype, scale.shape) != grid:
        raise rounded.refusal(
            "scale of a rounded weight does not fit its blocks", scale, _spelled(grid), _spelled_entry(scale)
        )
    values = read_scale(scale, rounded.folder)
    if fmt.scale_fmt == "ue8m0":
        bad = ~is_power_of_two(values)
        if bad.any():
            first = bad.nonzero()[0].tolist()
            got = f"{values[tuple(first)].item()} at {first}"
            raise rounded.refusal(
                "scale of a rounded weight is no power of two", scale, "scale_fmt ue8m0", got
            )
    return RoundedWeight(codes, scale)


def _stored(fmt: QuantizedFormat, shape: tuple[int, ...]) -> tuple[Signature, Signature]:
    """Dtype and shape of codes and scale of a weight of this shape."""
    if isinstance(fmt, BlockFP8):
        return (FP8, shape), ("F32", fmt.scale_shape(shape))
    return group_storage("blockscale", fmt).signatures(shape)


def _spelled(signature: Signature) -> str:
    return f"{signature[0]} {list(signature[1])}"


def _spelled_entry(entry: TensorEntry) -> str:
    return _spelled((entry.dtype, entry.shape))
