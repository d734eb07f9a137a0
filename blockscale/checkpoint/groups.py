"""Weights of fewer than 8 bits: which format each has, whether its shape allows it, how config.json names it.

How such a weight (N, K), or (E, N, K) of fused experts, is stored, `group_storage` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from blockscale.checkpoint.families import Family
from blockscale.checkpoint.group_storage import LowBitWeight, group_storage, is_expert, values_in_unit
from blockscale.checkpoint.names import sharing_groups
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.skip_list import Signature
from blockscale.errors import BlockscaleError
from blockscale.formats import Layout, module_path
from blockscale.group_spelling import WrittenFormat, spell_group_format
from blockscale.quantization_config import LowBitGroup, Quantization

_CODES = ("U8", "I8", "I32")
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
    groups: Mapping[str, WrittenFormat], tensors: Mapping[str, Signature], family: Family, layout: Layout
) -> None:
    """Refuse rows that are not whole bytes or groups, and experts that are stored the other way round.

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
        storage = group_storage(layout, fmt)
        if storage.whole and shape[-1] % fmt.group_size:
            raise BlockscaleError(
                f"rows of {spelled} are not whole groups, as the {layout} layout has them",
                where=name,
                expected=f"a multiple of {fmt.group_size} inputs",
                got=shape[-1],
                remedy="use --layout blockscale",
            )


def check_experts(groups: Mapping[str, WrittenFormat], quantized: Iterable[str], kept: Iterable[str]) -> None:
    """Refuse what SGLang's w4afp8 kernels have no place for: they run all routed experts, and nothing else.

    Raises:
        BlockscaleError: another weight of fewer than 8 bits, or an expert of 8 or 16.
    """
    plain = [name for name in (*quantized, *kept) if is_expert(name) and name not in groups]
    for name in (*(name for name in groups if not is_expert(name)), *plain):
        raise BlockscaleError(
            "the w4afp8 layout has INT4 in all routed experts and nowhere else",
            where=name,
            expected="int4:g128" if is_expert(name) else "fp8 or bf16",
            got=spell_group_format(groups[name]) if name in groups else "fp8 or bf16",
            remedy="use --layout blockscale or compressed-tensors",
        )


def low_bit_weights(
    tensors: Mapping[str, Signature], quantization: Quantization | None
) -> dict[str, LowBitWeight]:
    """The weights of a checkpoint that have fewer than 8 bits, by the names of their codes."""
    found: dict[str, LowBitWeight] = {}
    if quantization is None or not quantization.low:
        return found
    suffix = "_packed" if quantization.layout == "compressed-tensors" else ""
    for name, (dtype, _) in tensors.items():
        if dtype not in _CODES or not name.endswith(suffix):
            continue
        fmt = quantization.group_format_of(name.removesuffix(suffix))
        storage = None if fmt is None else group_storage(quantization.layout, fmt)
        if storage is not None and storage.codes_dtype == dtype:
            found[name] = LowBitWeight(name.removesuffix(suffix), storage)
    return found


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
