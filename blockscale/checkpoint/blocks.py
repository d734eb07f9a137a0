"""The block size of every weight that becomes FP8: decided here, tensor by tensor, and written down.

A precision that names a size ("fp8:64x64") has it; otherwise it is the recipe's, or the one chosen for the
tensor under "auto". Weights that engines fuse into one layer have one size: the finest that any of them asks
for. `Quantization` says it in config.json, and refuses several sizes in a layout that has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from blockscale.checkpoint.groups import low_bit_groups
from blockscale.checkpoint.names import sharing_groups
from blockscale.checkpoint.recipe import AUTO, Recipe
from blockscale.formats import BlockFP8, module_path, spell_block_size
from blockscale.group_spelling import WrittenFormat
from blockscale.quantization_config import BlockGroup, Quantization

BlockSize = tuple[int, int]
# What vLLM and SGLang have kernels for; also the size before any choice.
USUAL: BlockSize = (128, 128)


def is_free(name: str, recipe: Recipe) -> bool:
    """Whether the block size of a weight that becomes FP8 is left to the choice by values."""
    wanted = recipe.precision.format_of(name)
    return recipe.block_size == AUTO and (wanted is None or wanted.block_size is None)


def block_sizes(
    names: Iterable[str], recipe: Recipe, chosen: Mapping[str, BlockSize]
) -> tuple[dict[str, BlockSize], list[str]]:
    """The block size, over (out, in) features, of the weights that become FP8; and what to warn of.

    Args:
        names: of these weights.
        recipe: what the user asked for.
        chosen: sizes for those that are free; one that has none is `USUAL`.
    """
    sizes = {}
    for name in names:
        wanted = recipe.precision.format_of(name)
        general = chosen.get(name, USUAL) if recipe.block_size == AUTO else recipe.block_size
        sizes[name] = wanted.block_size if wanted is not None and wanted.block_size is not None else general
    return sizes, [*_share(sizes), *_warn_of_engines(sizes)]


def declare(
    sizes: Mapping[str, BlockSize], low: Mapping[str, WrittenFormat], recipe: Recipe, skip: tuple[str, ...]
) -> Quantization:
    """What config.json says of these weights.

    Args:
        sizes: FP8 weights -> block size.
        low: weights of fewer than 8 bits -> their format.
        recipe: what the user asked for.
        skip: full module paths of what stays unquantized.

    Raises:
        BlockscaleError: the layout has no place for several block sizes, or for fewer than 8 bits.
    """
    targets: dict[BlockSize, list[str]] = {}
    for name, size in sizes.items():
        targets.setdefault(size, []).append(module_path(name))
    usual = USUAL if recipe.block_size == AUTO else recipe.block_size
    ordered = sorted(targets, reverse=True)
    # All are named: for a fused layer, vLLM would take "Linear" before the names of its parts.
    groups = tuple(BlockGroup(size, tuple(sorted(targets[size]))) for size in ordered)
    fmt = BlockFP8(ordered[0] if ordered else usual, recipe.scale_fmt)
    lower = low_bit_groups(low)
    by_name = any(not target.startswith("re:") for group in lower for target in group.targets)
    several = len(groups) > 1 or (by_name and recipe.layout == "compressed-tensors")
    return Quantization(recipe.layout, fmt, skip, groups if several else (), lower)


def count_sizes(sizes: Iterable[BlockSize]) -> dict[str, int]:
    """Weights of each block size, as it is spelled; the most frequent first."""
    return dict(Counter(map(spell_block_size, sizes)).most_common())


def _share(sizes: dict[str, BlockSize]) -> list[str]:
    """Give all of every group that engines fuse its finest size; says so."""
    warnings = []
    for group in sharing_groups(sizes):
        finest = min(group, key=lambda name: sizes[name][0] * sizes[name][1])
        moved = [name for name in group if sizes[name] != sizes[finest]]
        if moved:
            also = moved[0] if len(moved) == 1 else f"{moved[0]} and {len(moved) - 1} more"
            size = spell_block_size(sizes[finest])
            warnings.append(f"{finest} has blocks of {size}, so {also} must too")
        sizes |= dict.fromkeys(moved, sizes[finest])
    return warnings


def _warn_of_engines(sizes: Mapping[str, BlockSize]) -> list[str]:
    counts = count_sizes(size for size in sizes.values() if size != USUAL)
    if not counts:
        return []
    several = ", ".join(f"{count} of {size}" for size, count in counts.items())
    usual = f"{spell_block_size(USUAL)}, the only ones that vLLM and SGLang are known to run"
    return [f"{sum(counts.values())} weights ({several}) have other blocks than {usual}"]
