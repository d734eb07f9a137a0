"""The formats that a search chooses from: what a weight takes on disk, and how its module then computes.

A candidate is data. "bf16" stands for what is not quantized; FP8 quantizes weights and, as it will run,
activations (1 x block_k groups); a format of weights alone is described by its bytes and a function that
rounds a weight to what it can hold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from blockscale.checkpoint.decide import FP8
from blockscale.checkpoint.families import Family, stored_block_size
from blockscale.checkpoint.precision import WeightFormat, parse_weight_format
from blockscale.errors import BlockscaleError
from blockscale.formats import (
    BlockFP8,
    Layout,
    ScaleFmt,
    scale_name,
    scale_shape,
    tensor_nbytes,
)

BF16 = "bf16"  # as recipes spell what is not quantized
MIXED_BLOCKS = ("fp8", "fp8:64x64", "fp8:32x32", "fp8:1x128")

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

    return Candidate(name, nbytes, partial(_fp8_module, fmt=fmt))


def weights_only(
    name: str, nbytes: Bytes, fake_quantize: Callable[[torch.Tensor], torch.Tensor]
) -> Candidate:
    """A format of weights: `fake_quantize` rounds a weight (..., N, K) to what the format can hold."""

    def quantized(module: nn.Module, parts: Mapping[str, int]) -> nn.Module:
        made = _copied(module)
        for each, count in parts.items():
            pieces = getattr(module, each).detach().chunk(count, dim=-2)
            rounded = torch.cat([fake_quantize(piece) for piece in pieces], -2)
            made._parameters[each] = nn.Parameter(rounded, requires_grad=False)
        return made

    return Candidate(name, nbytes, quantized)


def candidates(
    names: tuple[str, ...], layout: Layout, block_size: tuple[int, int], scale_fmt: ScaleFmt
) -> tuple[Candidate, ...]:
    """The quantized formats of these names; "bf16" among them says nothing, as it is always there.

    Args:
        names: "fp8" is the recipe's block size, "fp8:RxC" another one; empty for all that the layout can mix.
        layout: DeepSeek's has one block size in a checkpoint.
        block_size: of "fp8".
        scale_fmt: of all of them.

    Raises:
        BlockscaleError: an unknown format, or several block sizes in DeepSeek's layout.
    """
    wanted = names or (MIXED_BLOCKS if layout == "compressed-tensors" else ("fp8",))
    found: dict[tuple[int, int], Candidate] = {}
    for name in wanted:
        parsed = parse_weight_format(name, "formats")
        if parsed.kind == "fp8":
            block = parsed.block_size or block_size
            # The recipe's own block size has one spelling, and two names of it are one format.
            spelled = str(WeightFormat("fp8", None if block == block_size else block))
            found.setdefault(block, fp8(spelled, BlockFP8(block, scale_fmt)))
    if not found:
        raise BlockscaleError("nothing to choose from", where="formats", expected="fp8 among them")
    if layout == "deepseek" and set(found) != {block_size}:
        raise BlockscaleError(
            "DeepSeek's layout has one block size in a checkpoint",
            where="formats",
            expected="bf16 and fp8",
            got=", ".join(wanted),
            remedy="take --layout compressed-tensors to mix block sizes, or set one with --block-size",
        )
    return tuple(found.values())


def _fp8_module(module: nn.Module, parts: Mapping[str, int], fmt: BlockFP8) -> nn.Module:
    from blockscale.huggingface.modules import fp8_layer

    # Of a copy: experts give up their weights to the layer.
    layer = fp8_layer(_copied(module), fmt, "auto", parts)
    for name in layer.parts:
        codes, scale = layer.quantized(name, getattr(module, name).detach())
        getattr(layer, name).data, getattr(layer, scale_name(name)).data = codes, scale
    return layer


def _copied(module: nn.Module) -> nn.Module:
    """The same parameters in a module of their own, from which they can be taken."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    return made
