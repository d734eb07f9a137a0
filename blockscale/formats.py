"""On-disk formats: block scaling parameters, scale shapes, and every name that is spelled in a checkpoint.

The block FP8 format stores a weight as E4M3 codes and one scale per block,

    weight[n, k] ~= codes[n, k] * scale[n // block_n, k // block_k]

with `scale` of shape (ceil(N / block_n), ceil(K / block_k)); the last block of a ragged dimension is the
remainder. A 3-D tensor of fused experts (E, N, K) has its own blocks in every expert: (E, ceil, ceil).
On disk the scale is called `<weight>_scale_inv` (DeepSeek layout: despite the name it is the multiplier)
or `<weight>_scale` (compressed-tensors layout). A checkpoint of compressed-tensors may have several block
sizes, by module; one of any other layout has one.

Sources: DeepSeek-V3 `README_WEIGHTS.md` (format), safetensors README (dtypes), OCP MX v1.0 (E8M0).
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from blockscale.errors import BlockscaleError

ScaleFmt = Literal["float32", "ue8m0"]
Layout = Literal["deepseek", "compressed-tensors", "w4afp8", "blockscale"]

E4M3_MAX = 448.0
LAYOUTS: tuple[Layout, ...] = ("deepseek", "compressed-tensors", "w4afp8", "blockscale")
_SCALE_SUFFIX: dict[Layout, str] = {
    "deepseek": "_scale_inv",
    "compressed-tensors": "_scale",
    "w4afp8": "_scale_inv",
    "blockscale": "_scale_inv",
}
# A spelling seen in the wild maps to the real one; an absent or null key means plain float32 scales.
_SCALE_FMT_SPELLINGS: dict[str, ScaleFmt] = {"float32": "float32", "ue8m0": "ue8m0", "uf8m0": "ue8m0"}

# safetensors dtype name -> torch dtype, or None for those torch cannot hold one element a value of.
SAFETENSORS_DTYPES: dict[str, torch.dtype | None] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F4": None,
    "F6_E2M3": None,
    "F6_E3M2": None,
}
_SUB_BYTE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items() if dtype is not None}
# What the quantizer takes as a high-precision weight, and the dequantizer gives back.
HIGH_PRECISION = ("BF16", "F16", "F32")


def dtype_bits(name: str) -> int:
    """Bits of one element of a safetensors dtype name."""
    dtype = SAFETENSORS_DTYPES[name]
    return _SUB_BYTE_BITS[name] if dtype is None else dtype.itemsize * 8


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor; sub-byte elements are packed without padding."""
    return math.prod(shape) * dtype_bits(dtype) // 8


def parse_scale_fmt(value: object, where: str | None = None) -> ScaleFmt:
    """The scale format of a config value: absent or null, `float32`, `ue8m0` or its misspelling `uf8m0`.

    Raises:
        BlockscaleError: anything else; `where` says in the message which value it is.
    """
    if value is None:
        return "float32"
    if isinstance(value, str) and value in _SCALE_FMT_SPELLINGS:
        return _SCALE_FMT_SPELLINGS[value]
    accepted = " | ".join(_SCALE_FMT_SPELLINGS) + " | null"
    raise BlockscaleError("unknown scale_fmt", where=where, expected=accepted, got=repr(value))


def parse_block_size(value: object, where: str | None = None, or_else: str | None = None) -> tuple[int, int]:
    """`"128x128"`, `"128"` (square) or a pair of integers, as (block_n, block_k).

    Raises:
        BlockscaleError: anything else; `where` says in the message which value it is, `or_else` what else
            would have been right.
    """
    pair: tuple[Any, ...] | None = None
    if isinstance(value, str) and re.fullmatch(r"\d+(x\d+)?", value):
        parts = [int(part) for part in value.split("x")]
        pair = (parts[0], parts[-1])
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        pair = tuple(value)
    if pair is None or not all(isinstance(side, int) and side > 0 for side in pair):
        expected = "two positive integers, as 128x128" + ("" if or_else is None else f", or {or_else}")
        raise BlockscaleError("bad block size", where=where, expected=expected, got=repr(value))
    return pair[0], pair[1]


def spell_block_size(block_size: tuple[int, int]) -> str:
    """As `parse_block_size` reads it: `"128x128"`."""
    return f"{block_size[0]}x{block_size[1]}"


@dataclass(frozen=True)
class BlockFP8:
    """E4M3 codes with one scale per `block_size` region of a weight.

    Attributes:
        block_size: (block_n, block_k), rows and columns that share a scale.
        scale_fmt: "float32", or "ue8m0" for powers of two (stored as float32 all the same).
    """

    block_size: tuple[int, int] = (128, 128)
    scale_fmt: ScaleFmt = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", parse_block_size(self.block_size))
        object.__setattr__(self, "scale_fmt", parse_scale_fmt(self.scale_fmt))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale grid: (576, 7168) -> (5, 56); (E, N, K) -> (E, ceil(N/bn), ceil(K/bk))."""
        return scale_shape(shape, self.block_size)


@functools.lru_cache(typed=True)
def activation_format(group_size: int, scale_fmt: ScaleFmt) -> BlockFP8:
    """The format of activations in groups of G adjacent values: blocks (1, G).

    Raises:
        BlockscaleError: not a positive integer, or no scale format.
    """
    return BlockFP8((1, group_size), scale_fmt)


def blocks_over(run: range, side: int) -> range:
    """Numbers of the blocks of this side that cover a run of rows or columns."""
    return range(run.start // side, math.ceil(run.stop / side))


def cuts_through(run: range, side: int) -> bool:
    """Whether a block of a run, counted from its own start, lies across two blocks of the whole.

    Then codes and scales cut apart would be silently wrong.
    """
    return run.start % side != 0 and len(blocks_over(run, side)) > 1


def scale_shape(shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scale grid of a (N, K) or (E, N, K) weight; ragged edges count as a block.

    Raises:
        BlockscaleError: the weight is neither 2-D nor 3-D.
    """
    if len(shape) not in (2, 3):
        raise BlockscaleError("only 2-D and 3-D weights have blocks", got=f"shape {tuple(shape)}")
    grid = (math.ceil(shape[-2] / block_size[0]), math.ceil(shape[-1] / block_size[1]))
    return (*shape[:-2], *grid)


def scale_name(weight_name: str, layout: Layout = "deepseek") -> str:
    """Name of the scale stored beside a weight: `q_proj.weight` -> `q_proj.weight_scale_inv`."""
    return weight_name + _SCALE_SUFFIX[layout]


def scaled_weight_name(name: str) -> str | None:
    """Name of the weight that `name` is a scale of by its spelling, in any layout, or None."""
    for suffix in ("_scale_inv", "_scale"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def module_path(weight_name: str) -> str:
    """Full module path of a weight, as skip lists spell it: `model.layers.0.mlp.gate`."""
    return weight_name.removesuffix(".weight")
