"""What the user wants of a quantization: a `Recipe`, given as options or read from a JSON file."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import pydantic

from blockscale.checkpoint.precision import AS_STORED, Precision, parse_precision
from blockscale.errors import BlockscaleError
from blockscale.formats import (
    LAYOUTS,
    BlockFP8,
    Layout,
    ScaleFmt,
    parse_block_size,
    parse_scale_fmt,
    spell_block_size,
)
from blockscale.group_spelling import spell_group_format

# A block size that is chosen by the values of the weights (`block_choice`).
AUTO: Literal["auto"] = "auto"


def _block_size(value: object) -> tuple[int, int] | Literal["auto"]:
    return AUTO if value == AUTO else parse_block_size(value, or_else=AUTO)


@dataclass(frozen=True)
class Recipe:
    """How to quantize a checkpoint.

    Attributes:
        scale_fmt: "float32", or "ue8m0" for scales that are powers of two.
        block_size: rows and columns that share a scale, as (128, 128) or "128x128"; "auto" chooses them by
            the values of the weights. A precision "fp8:64x64" has its own.
        layout: "deepseek" (weight_scale_inv), "compressed-tensors" (weight_scale), "w4afp8" (SGLang's, with
            INT4 experts), or "blockscale". All but the first have a place for fewer than 8 bits.
        include: if given, only tensors whose name or module path matches one of these patterns are quantized.
        exclude: tensors that match one of these patterns keep their precision.
        precision: of what is left, by role and pattern, as a `Precision` or {"experts": "fp8"}. If it names
            a format other than bf16, only what has one is quantized; otherwise all but what it names bf16.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    scale_fmt: ScaleFmt = "float32"
    block_size: Annotated[tuple[int, int] | Literal["auto"], pydantic.BeforeValidator(_block_size)] = (
        128,
        128,
    )
    layout: Layout = "deepseek"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    precision: Annotated[Precision, pydantic.BeforeValidator(parse_precision)] = AS_STORED

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale_fmt", parse_scale_fmt(self.scale_fmt))
        object.__setattr__(self, "block_size", _block_size(self.block_size))
        object.__setattr__(self, "include", tuple(self.include))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        object.__setattr__(self, "precision", parse_precision(self.precision))
        if self.layout not in LAYOUTS:
            raise BlockscaleError("unknown layout", expected=" | ".join(LAYOUTS), got=repr(self.layout))

    def spelled(self) -> dict[str, Any]:
        """All of it, in values that JSON has."""
        named = {
            **vars(self),
            "block_size": str(self.block_size),
            "include": list(self.include),
            "exclude": list(self.exclude),
        }
        return {**named, "precision": self.precision.spelled()}

    @property
    def fmt(self) -> BlockFP8:
        """The one format of all quantized weights, for what has no place for several.

        Raises:
            BlockscaleError: as `fp8`, or formats of fewer than 8 bits.
        """
        for group in self.precision.groups:
            raise BlockscaleError(
                "only FP8 is made here",
                where=f"precision {spell_group_format(group)}",
                expected="fp8 | bf16",
                remedy="blockscale quantize writes a checkpoint with it",
            )
        return self.fp8

    @property
    def fp8(self) -> BlockFP8:
        """The one format of all FP8 weights.

        Raises:
            BlockscaleError: the recipe asks for several block sizes, or for a choice among them.
        """
        named = {self.block_size} | self.precision.block_sizes
        if len(named) > 1 or AUTO in named:
            got = ", ".join(
                AUTO if size == AUTO else spell_block_size(size) for size in sorted(named, key=str)
            )
            raise BlockscaleError(
                "one block size is needed here",
                expected="as 128x128",
                got=got,
                remedy="blockscale quantize writes a checkpoint with several",
            )
        return BlockFP8(cast("tuple[int, int]", self.block_size), self.scale_fmt)


# Recipes with a name. Experts are nearly all of a large mixture of experts, and bear fewer bits best.
PRESETS = {
    "fp8": Recipe(),
    "w4a8": Recipe(
        layout="blockscale", precision=parse_precision({"default": "fp8", "experts": "int4:g128"})
    ),
    "mxfp4a8": Recipe(layout="blockscale", precision=parse_precision({"default": "fp8", "experts": "mxfp4"})),
}


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """One of `PRESETS` by its name, or from a JSON file with some of the fields of `Recipe`.

    Raises:
        BlockscaleError: the file cannot be read, is not JSON, or a field is unknown or wrong.
    """
    if path in PRESETS and not Path(path).exists():
        return PRESETS[str(path)]
    try:
        return pydantic.TypeAdapter(Recipe).validate_json(Path(path).read_bytes())
    except OSError as error:
        expected = f"a JSON file, or {' | '.join(PRESETS)}"
        raise BlockscaleError(f"cannot be read: {error.strerror}", where=path, expected=expected) from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"])) or "the file"
        names = ", ".join(entry.name for entry in fields(Recipe))
        raise BlockscaleError(
            f"bad recipe: {field_name}: {first['msg']}",
            where=path,
            expected=f"a JSON object with some of {names}",
        ) from error
