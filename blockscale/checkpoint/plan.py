"""The full plan of a conversion: every output file, every tensor in it, and the digest that resume compares.

A plan is made from headers and config.json alone. Output shards of quantizing and dequantizing mirror the
source's shards, so a shard is a unit of work that needs no other (but for scales found across shards), on one
machine or many.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from blockscale.checkpoint.block_choice import BlockChoice
from blockscale.checkpoint.decide import FP8, Decisions, Signature, decide_dequantize, decide_quantize
from blockscale.checkpoint.families import Family, family_of
from blockscale.checkpoint.group_storage import LowBitWeight, group_storage
from blockscale.checkpoint.index import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointIndex,
    Header,
    TensorEntry,
    read_index,
)
from blockscale.checkpoint.model_config import (
    CONFIG_NAME,
    read_config,
    with_kept_fp8,
    without_quantization,
)
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.source import Source
from blockscale.errors import BlockscaleError, CorruptCheckpointError
from blockscale.formats import HIGH_PRECISION, scale_name, scale_shape, tensor_nbytes
from blockscale.group_spelling import WrittenFormat
from blockscale.quantization_config import parse_quantization_config
from blockscale.version import __version__

MANIFEST_NAME = "blockscale.json"
Command = Literal["quantize", "dequantize", "convert"]
# Weights in other formats: they are another copy of the model, not a part of it.
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".pkl"),
    *(".onnx", ".onnx_data", ".ot", ".tflite"),
)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Window:
    """The part of a tensor that an output is made of: rows, and of a matrix also columns (None: all)."""

    rows: range
    columns: range | None = None


@dataclass(frozen=True)
class Task:
    """The work on one source tensor.

    Attributes:
        action: "quantize" and "requantize" (FP8 to FP8, on another grid) give codes and scale, "dequantize"
            and "copy" give one tensor.
        source: what is read.
        outputs: what is written, codes before scale before what else belongs to a weight.
        scale: the scale that is read along when dequantizing or requantizing.
        block_size: (rows, columns) that share a scale of FP8, on the axes as stored.
        low: the weight of fewer than 8 bits that is written or read.
        window: the part that is copied or requantized, if not all.
    """

    action: Literal["quantize", "dequantize", "requantize", "copy"]
    source: TensorEntry
    outputs: tuple[OutputTensor, ...]
    scale: TensorEntry | None = None
    block_size: tuple[int, int] = (0, 0)
    low: LowBitWeight | None = None
    window: Window | None = None

    @property
    def group(self) -> WrittenFormat | None:
        """The format of fewer than 8 bits that is written or read."""
        return None if self.low is None else self.low.fmt

    @property
    def input_bytes(self) -> int:
        """Bytes of the source that the outputs are made of; scales do not count."""
        return self.source.nbytes if self.window is None else self.outputs[0].nbytes


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its name, its tasks, its header metadata."""

    file: str
    tasks: tuple[Task, ...]
    metadata: dict[str, str]

    @property
    def source_files(self) -> tuple[str, ...]:
        """The files that the tasks read; scales that are read along may be in others."""
        return tuple(dict.fromkeys(task.source.file for task in self.tasks))

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        return tuple(output for task in self.tasks for output in task.outputs)

    @property
    def input_bytes(self) -> int:
        return sum(task.input_bytes for task in self.tasks)


@dataclass(frozen=True)
class ConversionPlan:
    """Everything a conversion will do.

    Attributes:
        command: "quantize", "dequantize" or "convert" (into shards for ranks).
        options: what decides the bytes of the result (not workers, not device).
        shards: output files in order.
        config: config.json of the result.
        index_metadata: metadata of the result's index, or None for one file without an index.
        carried: files copied byte for byte.
        decisions: tensor by tensor, with reasons.
        fingerprints: source file -> size and time or etag, to notice a source that changes.
        choice: the block sizes that were chosen by values, and why.
    """

    command: Command
    options: dict[str, Any]
    shards: tuple[ShardPlan, ...]
    config: dict[str, Any]
    index_metadata: dict[str, Any] | None
    carried: tuple[str, ...]
    decisions: Decisions
    fingerprints: dict[str, list[Any]]
    choice: BlockChoice | None = None

    @property
    def input_bytes(self) -> int:
        return sum(shard.input_bytes for shard in self.shards)

    @property
    def output_bytes(self) -> int:
        return sum(output.nbytes for shard in self.shards for output in shard.outputs)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of the result, config.json last."""
        index = () if self.index_metadata is None else (INDEX_NAME,)
        shards = (shard.file for shard in self.shards)
        return (*shards, *self.carried, *index, MANIFEST_NAME, CONFIG_NAME)

    def counts(self) -> dict[str, int]:
        """Tensors per action."""
        actions = [decision.action for decision in self.decisions.by_name.values()]
        return {action: actions.count(action) for action in sorted(set(actions))}

    def digest(self) -> str:
        """SHA-256 of all that decides the result: version, options, source files, output tensors."""
        outputs = [[s.file, [[o.name, o.dtype, o.shape] for o in s.outputs]] for s in self.shards]
        content = [
            __version__,
            self.command,
            self.options,
            self.fingerprints,
            outputs,
            self.config,
            self.carried,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def signatures(index: CheckpointIndex) -> dict[str, Signature]:
    """Name -> (dtype, shape) of every tensor."""
    return {name: (entry.dtype, entry.shape) for name, entry in index.tensors.items()}


def plan_quantize(
    source: Source,
    recipe: Recipe,
    index: CheckpointIndex | None = None,
    keep: Mapping[str, str] | None = None,
    choice: BlockChoice | None = None,
) -> ConversionPlan:
    """Plan BF16 (F16, F32) -> block FP8 and formats in groups.

    `keep` names further tensors to leave alone, with the reason; `choice` has the block sizes under "auto".
    """
    index = index or read_index(source)
    config = read_config(source)
    chosen = None if choice is None else choice.sizes
    decisions = decide_quantize(signatures(index), config, recipe, keep, chosen)
    family = family_of(config)

    def task(entry: TensorEntry) -> Task | None:
        decision = decisions.by_name[entry.name]
        if decision.action == "copy":
            return _copy(entry)
        made = _group_task(entry, decisions) if decision.group else _block_task(entry, decisions, family)
        for output in made.outputs:
            if output.name in index.tensors and output.name != entry.name:
                raise CorruptCheckpointError("name is taken by a tensor of the source", where=output.name)
        return made

    assert decisions.quantization is not None
    result = {**without_quantization(config), "quantization_config": decisions.quantization.config()}
    options = {
        "scale_fmt": recipe.scale_fmt,
        "block_size": recipe.block_size,
        "layout": recipe.layout,
        "include": list(recipe.include),
        "exclude": list(recipe.exclude),
        "precision": recipe.precision.spelled(),
        "kept": dict(sorted((keep or {}).items())),
    }
    shards = _mirrored(index, task)
    plan = assemble("quantize", options, source, shards, result, index.index_metadata, decisions)
    return replace(plan, choice=choice)


def plan_dequantize(
    source: Source, dtype: str = "BF16", on_missing_scale: Literal["error", "keep"] = "error"
) -> ConversionPlan:
    """Plan a quantized checkpoint -> `dtype` (BF16, F16 or F32, as safetensors spells them)."""
    if dtype not in HIGH_PRECISION:
        raise BlockscaleError("unknown dtype", expected=" | ".join(HIGH_PRECISION), got=repr(dtype))
    index = read_index(source)
    config = read_config(source)
    quantization = parse_quantization_config(config)
    decisions = decide_dequantize(signatures(index), config, quantization, on_missing_scale=on_missing_scale)
    family = family_of(config)

    def task(entry: TensorEntry) -> Task | None:
        decision = decisions.by_name[entry.name]
        if decision.action == "drop":
            return None
        if decision.scale is None:
            return _copy(entry)
        scale = index.tensors[decision.scale]
        if decision.low is not None:
            low = decision.low
            output = OutputTensor(low.name, dtype, low.storage.shape(entry.shape))
            return Task("dequantize", entry, (output,), scale, low=low)
        output = OutputTensor(entry.name, dtype, entry.shape)
        stored = decisions.stored_block_size(entry.name, entry.shape, family)
        return Task("dequantize", entry, (output,), scale, block_size=stored)

    result = without_quantization(config)
    torch_name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    for key in ("dtype", "torch_dtype"):
        if key in result:
            result[key] = torch_name
    result = with_kept_fp8(result, decisions.skip)
    options = {"dtype": dtype, "on_missing_scale": on_missing_scale}
    shards = _mirrored(index, task)
    return assemble("dequantize", options, source, shards, result, index.index_metadata, decisions)


def _block_task(entry: TensorEntry, decisions: Decisions, family: Family) -> Task:
    assert decisions.quantization is not None
    block = decisions.stored_block_size(entry.name, entry.shape, family)
    codes = OutputTensor(entry.name, FP8, entry.shape)
    name = scale_name(entry.name, decisions.quantization.layout)
    scale = OutputTensor(name, "F32", scale_shape(entry.shape, block))
    return Task("quantize", entry, (codes, scale), block_size=block)


def _group_task(entry: TensorEntry, decisions: Decisions) -> Task:
    group, quantization = decisions.by_name[entry.name].group, decisions.quantization
    assert group is not None
    assert quantization is not None
    low = LowBitWeight(entry.name, group_storage(quantization.layout, group))
    codes, scale = low.storage.signatures(entry.shape)
    more = low.storage.more_signatures(entry.name)
    stored = {low.codes: codes, low.scale: scale, **more}
    return Task("quantize", entry, tuple(OutputTensor(name, *each) for name, each in stored.items()), low=low)


def _copy(entry: TensorEntry) -> Task:
    return Task("copy", entry, (OutputTensor(entry.name, entry.dtype, entry.shape),))


def _mirrored(index: CheckpointIndex, task: Callable[[TensorEntry], Task | None]) -> tuple[ShardPlan, ...]:
    """An output shard for each of the source, of the tasks that `task` makes of its tensors."""
    shards = []
    for file, header in index.headers.items():
        tasks = tuple(made for entry in header.entries if (made := task(entry)) is not None)
        name = SINGLE_NAME if index.index_metadata is None else file
        if tasks:
            shards.append(ShardPlan(name, tasks, _shard_metadata(header)))
    return tuple(shards)


def assemble(
    command: Command,
    options: dict[str, Any],
    source: Source,
    shards: tuple[ShardPlan, ...],
    config: dict[str, Any],
    index_metadata: dict[str, Any] | None,
    decisions: Decisions,
) -> ConversionPlan:
    """The plan of these shards, with what the source has beside its weights; arguments as its attributes."""
    files = source.files()
    carried = tuple(name for name in files if is_carried(name))
    used = {CONFIG_NAME, *carried}.union(*(shard.source_files for shard in shards))
    fingerprints = {name: source.fingerprint(name) for name in sorted(used)}
    return ConversionPlan(command, options, shards, config, index_metadata, carried, decisions, fingerprints)


def _shard_metadata(header: Header) -> dict[str, str]:
    # transformers refuses a file whose metadata lacks the format.
    return {"format": "pt", **header.metadata}


def is_carried(name: str) -> bool:
    """Whether a file of a checkpoint is copied along: all but weights, indexes and what is written."""
    weights = name.endswith(_WEIGHT_SUFFIXES) or name.endswith(".index.json")
    return not weights and name not in (CONFIG_NAME, MANIFEST_NAME)
