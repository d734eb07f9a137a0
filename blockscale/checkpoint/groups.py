"""Weights of fewer than 8 bits: which format each has, whether its shape allows it, how config.json names it.

Such a weight (N, K), or (E, N, K) of fused experts, is stored as `group_formats` packs it, with one scale for
every row and group:

    <name>         uint8 (..., N, bytes of a row)
    <name>_scale   bfloat16 or, of powers of two, float8_e8m0fnu (..., N, ceil(K / group))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from blockscale.checkpoint.families import Family
from blockscale.checkpoint.names import sharing_groups
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.skip_list import Signature
from blockscale.errors import BlockscaleError, MissingScaleError
from blockscale.formats import DTYPE_NAMES, module_path
from blockscale.group_formats import group_scale_shape, packed_shape, packed_width
from blockscale.group_spelling import WrittenFormat, spell_group_format
from blockscale.quantization_config import LowBitGroup, Quantization

PACKED = "U8"
_EXPERT = re.compile(r"(.*\.experts\.)\d+(\..*)")


def group_formats(names: Iterable[str], recipe: Recipe) -> dict[str, WrittenFormat]:
    """The format of those of these weights that get fewer than 8 bits.

    Raises:
        BlockscaleError: weights that engines fuse into one layer are to have different formats.
    """
    names = list(names)
    wanted = {name: recipe.precision.format_of(name) for name in names}
    found = {name: each.group for name, each in wanted.items() if each is not None and each.group is not None}
    for group in sharing_groups(names):
        odd = next((name for name in group if found.get(name) != found.get(group[0])), None)
        if odd is not None:
            first, other = (str(wanted[name] or "fp8") for name in (group[0], odd))
            raise BlockscaleError(
                "weights that engines fuse need one format",
                where=odd,
                expected=f"{first}, as {group[0]}",
                got=other,
                remedy="name a format for all of them",
            )
    return found


def check_groups(
    groups: Mapping[str, WrittenFormat], tensors: Mapping[str, Signature], family: Family
) -> None:
    """Refuse weights whose rows are not whole bytes, and experts that are stored the other way round.

    Raises:
        BlockscaleError: as said.
    """
    for name, fmt in groups.items():
        shape, spelled = tensors[name][1], spell_group_format(fmt)
        if len(shape) == 3 and family.expert_layout == "kn":
            raise BlockscaleError(
                f"experts stored as (E, in, out) cannot become {spelled}",
                where=name,
                expected="groups along the inputs, which are the last axis",
                remedy="leave them in FP8",
            )
        if shape[-1] % values_in_unit(fmt):
            raise BlockscaleError(
                f"rows of {spelled} are not whole bytes",
                where=name,
                expected=f"a multiple of {values_in_unit(fmt)} inputs",
                got=shape[-1],
                remedy="leave it in FP8",
            )


def values_in_unit(fmt: WrittenFormat) -> int:
    """Values that fill whole bytes."""
    return 8 if fmt.bits == 3 else 2


def stored_shapes(
    fmt: WrittenFormat, shape: tuple[int, ...]
) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of the codes and of the scales of a weight of this shape, as safetensors has them."""
    scale = DTYPE_NAMES[fmt.scale_dtype]
    return (PACKED, packed_shape(shape, fmt)), (scale, group_scale_shape(shape, fmt))


def group_scale_name(weight: str) -> str:
    """Name of the scales stored beside a weight of fewer than 8 bits."""
    return f"{weight}_scale"


def low_bit_weights(
    tensors: Mapping[str, Signature], quantization: Quantization | None
) -> dict[str, WrittenFormat]:
    """The weights of a checkpoint that have fewer than 8 bits, by its config.json and their dtype."""
    if quantization is None or not quantization.low:
        return {}
    packed = (name for name, (dtype, _) in tensors.items() if dtype == PACKED)
    formats = {name: quantization.group_format_of(name) for name in packed}
    return {name: fmt for name, fmt in formats.items() if fmt is not None}


def unpacked_shape(fmt: WrittenFormat, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (..., N, K) of the weight whose codes have this shape, as safetensors has it.

    Raises:
        BlockscaleError: no whole number of values.
    """
    unit = values_in_unit(fmt)
    units, rest = divmod(shape[-1], packed_width(unit, fmt.bits))
    if len(shape) not in (2, 3) or rest:
        raise BlockscaleError(f"no codes of {spell_group_format(fmt)}", got=f"shape {list(shape)}")
    return (*shape[:-1], units * unit)


def check_group_scale(name: str, fmt: WrittenFormat, tensors: Mapping[str, Signature]) -> None:
    """Refuse codes without scales, or with such as do not belong to them.

    Raises:
        MissingScaleError: there are none.
        BlockscaleError: another dtype or shape than the format says.
    """
    scale = group_scale_name(name)
    if scale not in tensors:
        raise MissingScaleError(
            f"{spell_group_format(fmt)} weight without scales", where=name, expected=f"{scale} beside it"
        )
    expected = stored_shapes(fmt, unpacked_shape(fmt, tensors[name][1]))[1]
    if tensors[scale] != expected:
        spelled, got = (f"{dtype} {list(shape)}" for dtype, shape in (expected, tensors[scale]))
        raise BlockscaleError(
            f"scales do not fit {spell_group_format(fmt)}", where=scale, expected=spelled, got=got
        )


def low_bit_groups(formats: Mapping[str, WrittenFormat]) -> tuple[LowBitGroup, ...]:
    """As config.json names them: modules by path, the experts of a layer by one expression."""
    targets: dict[WrittenFormat, dict[str, None]] = {}
    for name, fmt in formats.items():
        expert = _EXPERT.fullmatch(module_path(name))
        target = module_path(name)
        if expert:
            target = f"re:{re.escape(expert[1])}\\d+{re.escape(expert[2])}$"
        targets.setdefault(fmt, {})[target] = None
    return tuple(LowBitGroup(fmt, tuple(sorted(names))) for fmt, names in targets.items())
