"""The formats that a search chooses from: what a weight takes on disk, and how its module then computes.

A candidate is data. "bf16" stands for what is not quantized; the others quantize weights and, as they will
run, activations to FP8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from blockscale.checkpoint.decide import FP8
from blockscale.checkpoint.families import Family, stored_block_size
from blockscale.checkpoint.group_storage import group_storage
from blockscale.checkpoint.precision import WeightFormat, parse_weight_format
from blockscale.errors import BlockscaleError
from blockscale.formats import (
    BlockFP8,
    Layout,
    ScaleFmt,
    scale_shape,
    tensor_nbytes,
)
from blockscale.group_spelling import WrittenFormat, spell_group_format

BF16 = "bf16"  # as recipes spell what is not quantized
MIXED_BLOCKS = ("fp8", "fp8:64x64", "fp8:32x32", "fp8:1x128")
# What there is to choose from where nobody says.
_MIXED: dict[Layout, tuple[str, ...]] = {
    "deepseek": ("fp8",),
    "compressed-tensors": MIXED_BLOCKS,
    "blockscale": ("fp8", "int4:g128", "int3:g128"),
}

# (N, K) or (E, N, K), family of the checkpoint -> bytes, scales included.
Bytes = Callable[[tuple[int, ...], Family], int]
# A module, and weight -> how many matrices lie in it one below the other; to the module that computes so.
Made = Callable[[nn.Module, Mapping[str, int]], nn.Module]


@dataclass(frozen=True)
class Candidate:
    """A format that a unit may have.

    Attributes:
        name: as recipes spell it.
        nbytes: what a weight takes, its scales included.
        quantized: the module that computes as the format does; the one it is made of is left as it was.
    """

    name: str
    nbytes: Bytes
    quantized: Made


def fp8(name: str, fmt: BlockFP8) -> Candidate:
    """FP8 in blocks, with activations in FP8 too."""

    def nbytes(shape: tuple[int, ...], family: Family) -> int:
        grid = scale_shape(shape, stored_block_size(fmt.block_size, shape, family))
        return tensor_nbytes(FP8, shape) + tensor_nbytes("F32", grid)

    return Candidate(name, nbytes, partial(_quantized_module, fmt=fmt))


def in_groups(group: WrittenFormat, fmt: BlockFP8) -> Candidate:
    """Fewer than 8 bits, with activations in FP8 of the scale format of `fmt`."""

    def nbytes(shape: tuple[int, ...], _: Family) -> int:
        return group_storage("blockscale", group).nbytes("", shape)

    return Candidate(spell_group_format(group), nbytes, partial(_quantized_module, fmt=fmt, group=group))


def candidates(
    names: tuple[str, ...], layout: Layout, block_size: tuple[int, int], scale_fmt: ScaleFmt
) -> tuple[Candidate, ...]:
    """The quantized formats of these names; "bf16" among them says nothing, as it is always there.

    Args:
        names: "fp8" is the recipe's block size, "fp8:RxC" another one, "int4:g128" has fewer than 8 bits;
            empty for what the layout can mix.
        layout: all but compressed-tensors have one block size in a checkpoint, and only ours fewer bits.
        block_size: of "fp8".
        scale_fmt: of all of them.

    Raises:
        BlockscaleError: an unknown format, or one that the layout has no place for.
    """
    if layout not in _MIXED:
        raise BlockscaleError(
            f"the {layout} layout leaves nothing to choose: experts are INT4 and the rest FP8",
            where="layout",
            expected=" | ".join(_MIXED),
        )
    wanted = names or _MIXED[layout]
    found: dict[tuple[int, int] | WrittenFormat, Candidate] = {}
    for name in wanted:
        parsed = parse_weight_format(name, "formats")
        if parsed.kind == "fp8":
            block = parsed.block_size or block_size
            # The recipe's own block size has one spelling, and two names of it are one format.
            spelled = str(WeightFormat("fp8", None if block == block_size else block))
            found.setdefault(block, fp8(spelled, BlockFP8(block, scale_fmt)))
        elif parsed.group is not None:
            found.setdefault(parsed.group, in_groups(parsed.group, BlockFP8(block_size, scale_fmt)))
    if not found:
        raise BlockscaleError("nothing to choose from", where="formats", expected="fp8 or int4 among them")
    low = [each for each in found if not isinstance(each, tuple)]
    if low and layout != "blockscale":
        raise BlockscaleError(
            f"weights of fewer than 8 bits are not searched for the {layout} layout",
            where="formats",
            got=spell_group_format(low[0]),
            remedy="take --layout blockscale",
        )
    if layout != "compressed-tensors" and {*found} - {*low, block_size}:
        raise BlockscaleError(
            f"the {layout} layout has one block size in a checkpoint",
            where="formats",
            expected="bf16 and fp8",
            got=", ".join(wanted),
            remedy="take --layout compressed-tensors to mix block sizes, or set one with --block-size",
        )
    return tuple(found.values())


def _quantized_module(
    module: nn.Module, parts: Mapping[str, int], fmt: BlockFP8, group: WrittenFormat | None = None
) -> nn.Module:
    from blockscale.huggingface.modules import quantized_layer
    from blockscale.huggingface.stored import Stored

    # Of a copy: experts give up their weights to the layer.
    stored = {name: Stored(count, group) for name, count in parts.items()}
    layer = quantized_layer(_copied(module), fmt, "auto", stored)
    for name in layer.stored:
        codes, scale = layer.quantized(name, getattr(module, name).detach())
        getattr(layer, name).data, getattr(layer, layer.scale_name(name)).data = codes, scale
    return layer


def _copied(module: nn.Module) -> nn.Module:
    """The same parameters in a module of their own, from which they can be taken."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    return made
