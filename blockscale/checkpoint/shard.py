"""Divide a Hugging Face checkpoint into the shards that DeepSeek's inference code reads, one for each rank.

Bytes are cut, not computed: put together again, the shards are the checkpoint. Rank r of W has the rows (or
columns) [r N/W, (r+1) N/W) of a weight, and of its scale those that cover them. That is right only where no
block of a rank's own grid lies across two blocks of the whole. Where a cut goes through blocks (10944 rows
over 2 ranks are 42.75 blocks each), codes and scale cut apart would be silently wrong: it is refused or, on
request, the weight is dequantized in float32, cut, and every rank's part quantized on a grid of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from blockscale.checkpoint.config_fields import ConfigFields
from blockscale.checkpoint.convert import ConversionReport, RunOptions, run_plan
from blockscale.checkpoint.decide import FP8, Decision, Decisions, check_grid, scale_of
from blockscale.checkpoint.deepseek_names import Place, place_of, rank_file
from blockscale.checkpoint.index import TensorEntry, read_index
from blockscale.checkpoint.model_config import read_config
from blockscale.checkpoint.plan import ConversionPlan, OutputTensor, ShardPlan, Task, Window, assemble
from blockscale.checkpoint.source import Source, open_source
from blockscale.checkpoint.tasks import Job
from blockscale.errors import BlockscaleError, CorruptCheckpointError, MissingScaleError
from blockscale.formats import (
    HIGH_PRECISION,
    BlockFP8,
    blocks_over,
    cuts_through,
    scale_name,
    scale_shape,
    scaled_weight_name,
    spell_block_size,
)
from blockscale.group_spelling import spell_group_format
from blockscale.quantization_config import parse_quantization_config

OnRaggedSplit = Literal["refuse", "requantize"]
_MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")


def shard_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    world: int,
    *,
    mtp: bool = True,
    on_ragged_split: OnRaggedSplit = "refuse",
    run: RunOptions | None = None,
) -> ConversionReport:
    """Write `model{rank}-mp{world}.safetensors` for every rank, and what the source has beside its weights.

    Every shard is read back before it counts as finished.

    Args:
        src: local folder of a DeepSeek-V2 or V3 checkpoint: BF16, F16, F32 or block FP8.
        dst: folder or fsspec URL for the result.
        world: ranks; divides heads, routed experts, vocabulary and the widths of dense and shared layers.
        mtp: keep the multi-token prediction layer.
        on_ragged_split: what becomes of FP8 weights whose division cuts through blocks.
        run: workers, overwrite, progress; the rest has no meaning here.

    Raises:
        BlockscaleError: a checkpoint that is damaged, of another architecture or that does not divide, or an
            unusable destination; nothing under a final name was touched.
    """
    run, source = run or RunOptions(), open_source(src)
    plan = plan_shards(source, world, mtp=mtp, on_ragged_split=on_ragged_split)
    quantization = parse_quantization_config(plan.config)
    job = Job(source, quantization.fmt.scale_fmt if quantization is not None else "float32")
    return run_plan(plan, source, dst, replace(run, read_back=True), job)


def plan_shards(
    source: Source, world: int, *, mtp: bool = True, on_ragged_split: OnRaggedSplit = "refuse"
) -> ConversionPlan:
    """Plan the shards; arguments and errors are those of `shard_checkpoint`."""
    if not source.is_local:
        remedy = "fetch it first, say with hf download"
        raise BlockscaleError("cannot be divided: no local folder", where=source.spec, remedy=remedy)
    if world < 1:
        raise BlockscaleError("bad number of ranks", expected="at least 1", got=world)
    tensors, config = read_index(source).tensors, read_config(source)
    quantization, fields = parse_quantization_config(config), ConfigFields(config)
    if quantization is not None and quantization.groups:
        raise BlockscaleError(
            "cannot be divided: DeepSeek's inference code has one block size",
            where=source.spec,
            got=", ".join(map(spell_block_size, quantization.block_sizes)),
            remedy="run blockscale dequantize, then quantize with one",
        )
    if quantization is not None and quantization.low:
        raise BlockscaleError(
            "cannot be divided: DeepSeek's inference code knows FP8 and BF16",
            where=source.spec,
            got=", ".join(spell_group_format(each.fmt) for each in quantization.low),
            remedy="run blockscale dequantize, then quantize",
        )
    model = _Model(world, fields, tensors, quantization.fmt if quantization is not None else None)
    _check_scales(model)
    places = {name: place_of(name) for name in tensors}
    layers = fields.size("num_hidden_layers")
    extra = {name: index for name, place in places.items() if (index := place.layer or 0) >= layers}
    work = {
        name: tuple(_tasks(tensors[name], place, model))
        for name, place in places.items()
        if scaled_weight_name(name) is None and (mtp or name not in extra)
    }
    ragged = [name for name, made in work.items() if made[0][1].action == "requantize"]
    if ragged and on_ragged_split == "refuse":
        raise _ragged_error(ragged, model)
    decisions = {name: Decision("copy", "cut") for name in tensors}
    decisions |= {name: Decision("requantize", "its blocks are cut through") for name in ragged}
    decisions |= {name: Decision("drop", "multi-token prediction") for name in extra if not mtp}
    told = (*_ragged_warning(ragged, world), *_mtp_warning(sorted({*extra.values()}), mtp))
    options = {"mp": world, "mtp": mtp, "on_ragged_split": on_ragged_split}
    if not mtp:
        config |= {key: 0 for key in _MTP_KEYS if config.get(key)}
    shards = _shards(work.values(), world)
    return assemble("convert", options, source, shards, config, None, Decisions(decisions, warnings=told))


@dataclass(frozen=True)
class _Model:
    """What is divided: over so many ranks, by this config, all tensors, and the format of those in FP8."""

    world: int
    config: ConfigFields
    tensors: Mapping[str, TensorEntry]
    fmt: BlockFP8 | None


def _shards(work: Iterable[Iterable[tuple[int, Task]]], world: int) -> tuple[ShardPlan, ...]:
    """The tasks of each rank, in the order of the source."""
    tasks: list[list[Task]] = [[] for _ in range(world)]
    for rank, task in chain.from_iterable(work):
        tasks[rank].append(task)
    return tuple(
        ShardPlan(rank_file(rank, world), tuple(own), {"format": "pt"}) for rank, own in enumerate(tasks)
    )


def _check_scales(model: _Model) -> None:
    """Every FP8 weight has its scale, and every scale its FP8 weight."""
    fp8 = [name for name, entry in model.tensors.items() if entry.dtype == FP8]
    if fp8 and model.fmt is None:
        expected = "its block size in quantization_config"
        raise BlockscaleError("FP8 weight of unknown format", where=fp8[0], expected=expected, got="none")
    scales = {name: scale_of(name, model.tensors) for name in fp8}
    missing = [name for name, scale in scales.items() if scale is None]
    if missing:
        raise MissingScaleError(
            f"{len(missing)} of {len(fp8)} FP8 weights have no scale",
            where=missing[0],
            expected=scale_name(missing[0]),
            remedy="fetch the missing shard, or quantize the original checkpoint again",
        )
    used = set(scales.values())
    stray = [name for name in model.tensors if scaled_weight_name(name) is not None and name not in used]
    if stray:
        expected = f"{scaled_weight_name(stray[0])} in {FP8}"
        raise CorruptCheckpointError("scale without its weight", where=stray[0], expected=expected)
    for name, scale in scales.items():
        assert scale is not None
        assert model.fmt is not None
        found = model.tensors[scale].dtype, model.tensors[scale].shape
        check_grid(name, model.tensors[name].shape, scale, found, model.fmt.block_size)


def _tasks(entry: TensorEntry, place: Place, model: _Model) -> Iterator[tuple[int, Task]]:
    """What to do with a tensor that is no scale, for each rank that gets a part of it."""
    if entry.dtype not in (FP8, *HIGH_PRECISION):
        expected = " | ".join((FP8, *HIGH_PRECISION))
        raise BlockscaleError("dtype cannot be divided", where=entry.name, expected=expected, got=entry.dtype)
    parts = _parts(entry, place, model)
    stored = scale_of(entry.name, model.tensors) if entry.dtype == FP8 else None
    if stored is None:
        for rank, part in parts.items():
            yield rank, _copy(entry, place.name, part)
        return
    assert model.fmt is not None
    scale, name, block = model.tensors[stored], place_of(stored).name, model.fmt.block_size
    ragged = any(_cuts_through(part, block) for part in parts.values())
    for rank, part in parts.items():
        codes = _copy(entry, place.name, part)
        if ragged:
            grid = OutputTensor(name, "F32", scale_shape(codes.outputs[0].shape, block))
            yield rank, Task("requantize", entry, (*codes.outputs, grid), scale, block, window=part)
        else:
            yield rank, codes
            yield rank, _copy(scale, name, _on_grid(part, block))


def _parts(entry: TensorEntry, place: Place, model: _Model) -> dict[int, Window | None]:
    """Rank -> its part of a tensor, None for all of it; ranks that get nothing are left out."""
    world, name, what = model.world, entry.name, f"cannot be divided over {model.world} ranks"
    if place.unit is not None:
        key = {"heads": "num_attention_heads", "experts": "n_routed_experts"}[place.unit]
        units = model.config.heads if place.unit == "heads" else model.config.experts(key)
        if place.expert is not None and place.expert >= units:
            expected = f"one of the {units} experts of config.json"
            raise CorruptCheckpointError("is of an unknown expert", where=name, expected=expected)
        if units % world:
            remedy = f"choose a number of ranks that divides {key}"
            raise BlockscaleError(what, where=name, expected=f"whole {place.unit}", got=units, remedy=remedy)
        if place.expert is not None:
            return {place.expert // (units // world): None}
    if place.dim is None or world == 1:
        return dict.fromkeys(range(world))
    size = entry.shape[place.dim] if place.dim < len(entry.shape) else 0
    if size == 0 or size % world:
        expected, got = f"a multiple of {world} in dimension {place.dim}", f"shape {list(entry.shape)}"
        remedy = "choose a number of ranks that divides it"
        raise BlockscaleError(what, where=name, expected=expected, got=got, remedy=remedy)
    shares = [range(rank * size // world, (rank + 1) * size // world) for rank in range(world)]
    if place.dim == 0:
        return {rank: Window(share) for rank, share in enumerate(shares)}
    return {rank: Window(range(entry.shape[0]), share) for rank, share in enumerate(shares)}


def _copy(entry: TensorEntry, name: str, part: Window | None) -> Task:
    shape = entry.shape
    if part is not None:
        shape = (len(part.rows), *shape[1:]) if part.columns is None else (len(part.rows), len(part.columns))
    return Task("copy", entry, (OutputTensor(name, entry.dtype, shape),), window=part)


def _cuts_through(part: Window | None, block: tuple[int, int]) -> bool:
    """Whether the scales of a part cannot be cut out of those of the whole."""
    if part is None:
        return False
    sides = [(part.rows, block[0]), *([(part.columns, block[1])] if part.columns is not None else [])]
    return any(cuts_through(run, side) for run, side in sides)


def _on_grid(part: Window | None, block: tuple[int, int]) -> Window | None:
    """The part of the scale that covers a part of the weight."""
    if part is None:
        return None
    columns = None if part.columns is None else blocks_over(part.columns, block[1])
    return Window(blocks_over(part.rows, block[0]), columns)


def _ragged_error(ragged: list[str], model: _Model) -> BlockscaleError:
    assert model.fmt is not None
    entry, dim = model.tensors[ragged[0]], place_of(ragged[0]).dim or 0
    size, block = entry.shape[dim], model.fmt.block_size[dim]
    kind, more = ("rows", "columns")[dim], f"; {len(ragged) - 1} more like it" if len(ragged) > 1 else ""
    return BlockscaleError(
        f"division over {model.world} ranks cuts through its FP8 blocks{more}",
        where=entry.name,
        expected=f"a multiple of {block} {kind} for each rank",
        got=f"{size} / {model.world} = {size // model.world}",
        remedy="use --on-ragged-split requantize, another number of ranks, or the BF16 checkpoint",
    )


def _ragged_warning(ragged: list[str], world: int) -> Iterator[str]:
    if ragged:
        more = f" and {len(ragged) - 1} more" if len(ragged) > 1 else ""
        yield (
            f"{len(ragged)} FP8 weights are requantized, for a division over {world} ranks cuts through "
            f"their blocks: {ragged[0]}{more}"
        )


def _mtp_warning(layers: list[int], mtp: bool) -> Iterator[str]:
    if layers and mtp:
        names = ", ".join(f"layers.{layer}.*" for layer in layers)
        yield (
            f"multi-token prediction is kept as {names}, which DeepSeek's own load_model refuses: "
            "for that, leave it out with --no-mtp"
        )
    elif layers:
        yield f"multi-token prediction (layer {', '.join(map(str, layers))}) is left out"
