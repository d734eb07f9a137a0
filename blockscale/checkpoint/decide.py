"""Decide, tensor by tensor and before any byte is written, what a conversion does with a checkpoint.

Quantizing: a linear weight becomes E4M3 codes and scales unless its family keeps it (embeddings, head,
router, norms, vision), the recipe's patterns or precision do, or a weight that shares its precision (q/k/v,
gate/up) is kept.
Dequantizing: FP8 is recognized by dtype, its scale is found by name in any shard; the rest is copied.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from blockscale.checkpoint.blocks import BlockSize, block_sizes, count_sizes, declare
from blockscale.checkpoint.families import Family, family_of, stored_block_size
from blockscale.checkpoint.group_storage import LowBitWeight, check_companions
from blockscale.checkpoint.groups import check_experts, check_groups, group_formats, low_bit_weights
from blockscale.checkpoint.names import check_patterns, keep_reason, matches, role_of, sharing_groups
from blockscale.checkpoint.precision import check_followed
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.skip_list import Signature, skip_list
from blockscale.errors import BlockscaleError, MissingScaleError
from blockscale.formats import DTYPE_NAMES, LAYOUTS, module_path, scale_name, scale_shape, scaled_weight_name
from blockscale.group_spelling import WrittenFormat, spell_group_format
from blockscale.quantization_config import OWN_METHOD, QUANTIZATION_KEYS, Quantization

Action = Literal["quantize", "dequantize", "requantize", "copy", "drop"]
FP8 = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_UNSUPPORTED_SUFFIXES = ("_blocks", ".qweight", ".weight_packed", ".qzeros")


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor, and why.

    Attributes:
        scale: names the tensor that dequantizes it.
        block_size: of what becomes FP8, or of FP8 is dequantized, over (out, in) features.
        group: the format of what gets, or has, fewer than 8 bits.
        low: the weight that these codes are of, where fewer than 8 bits are dequantized.
    """

    action: Action
    reason: str
    scale: str | None = None
    block_size: BlockSize | None = None
    group: WrittenFormat | None = None
    low: LowBitWeight | None = None


@dataclass(frozen=True)
class Decisions:
    """The decisions for a whole checkpoint.

    Attributes:
        by_name: tensor name -> decision.
        skip: full module paths of linear weights that stay unquantized, for the skip list of engines.
        warnings: what the user should know.
        quantization: what config.json is to say, if weights become FP8.
    """

    by_name: dict[str, Decision]
    skip: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    quantization: Quantization | None = None

    @property
    def block_sizes(self) -> dict[str, int]:
        """Block size as spelled -> how many FP8 weights have it."""
        return count_sizes(each.block_size for each in self.by_name.values() if each.block_size is not None)

    @property
    def group_formats(self) -> dict[str, int]:
        """Format of fewer than 8 bits as spelled -> how many weights have it."""
        found = [each.group for each in self.by_name.values() if each.group is not None]
        return {spell_group_format(fmt): found.count(fmt) for fmt in dict.fromkeys(found)}

    def stored_block_size(self, name: str, shape: tuple[int, ...], family: Family) -> BlockSize:
        """The block size of a tensor that is quantized or dequantized, on its axes as stored."""
        size = self.by_name[name].block_size
        assert size is not None
        return stored_block_size(size, shape, family)


def decide_quantize(
    tensors: Mapping[str, Signature],
    config: dict[str, Any],
    recipe: Recipe,
    keep: Mapping[str, str] | None = None,
    chosen: Mapping[str, BlockSize] | None = None,
) -> Decisions:
    """Decide what quantizing does with every tensor.

    Args:
        tensors: name -> (safetensors dtype, shape).
        config: parsed config.json.
        recipe: what the user asked for.
        keep: further tensors to leave alone -> why (non-finite weights).
        chosen: block sizes that were chosen by the values of the weights, under "auto".

    Raises:
        BlockscaleError: the source is quantized already, a pattern matches nothing, a precision cannot be
            given, the layout has no place for the block sizes, or nothing is left to do.
    """
    family = family_of(config)
    _refuse_quantized(tensors, config)
    check_patterns((*recipe.include, *recipe.exclude), tensors)
    warnings = [] if family.known else [_unknown_family(config)]
    warnings += [f"{name} keeps its precision: {reason}" for name, reason in (keep or {}).items()]
    decisions: dict[str, Decision] = {}
    for name, signature in tensors.items():
        reason = _reason_to_keep(name, signature, family, recipe) or (keep or {}).get(name)
        decisions[name] = Decision("copy", reason) if reason else Decision("quantize", role_of(name))
    warnings += _share_precision(decisions)
    check_followed(recipe.precision, tensors, lambda name: _reason_in(decisions, name))
    if not any(decision.action == "quantize" for decision in decisions.values()):
        remedy = "set something to fp8" if recipe.precision.entries else "widen --include, narrow --exclude"
        raise BlockscaleError("no tensor would be quantized", remedy=remedy)
    warnings += _head_warning(decisions)
    _refuse_fused_experts(decisions, tensors, recipe)
    kept = [name for name, decision in decisions.items() if decision.action == "copy"]
    skip = skip_list(kept, tensors)
    quantized = [name for name, decision in decisions.items() if decision.action == "quantize"]
    groups = group_formats(quantized, recipe)
    sizes, told = block_sizes([name for name in quantized if name not in groups], recipe, chosen or {})
    decisions |= {name: replace(decisions[name], block_size=size) for name, size in sizes.items()}
    decisions |= {name: replace(decisions[name], group=group) for name, group in groups.items()}
    declared = declare(sizes, groups, recipe, skip)
    if recipe.layout == "w4afp8":
        check_experts(groups, quantized, kept)
    check_groups(groups, tensors, family, recipe.layout)
    return Decisions(decisions, skip, (*warnings, *told), declared)


def decide_dequantize(
    tensors: Mapping[str, Signature],
    config: dict[str, Any],
    quantization: Quantization | None,
    *,
    on_missing_scale: Literal["error", "keep"] = "error",
) -> Decisions:
    """Decide what dequantizing does with every tensor.

    Args:
        tensors: name -> (safetensors dtype, shape).
        config: parsed config.json.
        quantization: parsed from it; gives the block sizes, which are never derived from a scale grid.
        on_missing_scale: refuse FP8 weights without a scale, or keep them as they are.

    Raises:
        BlockscaleError: nothing to do, a scale that does not fit, or (MissingScaleError) no scale at all.
    """
    fp8 = [name for name, (dtype, _) in tensors.items() if dtype == FP8]
    low = low_bit_weights(tensors, quantization)
    if not fp8 and not low:
        raise BlockscaleError(
            "no FP8 weight in the checkpoint", expected=FP8, remedy="nothing needs dequantizing"
        )
    if quantization is None:
        raise BlockscaleError(
            "FP8 weights but no quantization_config in config.json",
            expected="weight_block_size",
            remedy='add {"quant_method": "fp8", "weight_block_size": [128, 128]} with the true block size',
        )
    decisions: dict[str, Decision] = {}
    warnings: list[str] = []
    of_groups = _of_groups(low, tensors)
    for name, (dtype, _) in tensors.items():
        weight = scaled_weight_name(name)
        if dtype == FP8:
            scale = scale_of(name, tensors)
            decisions[name] = (
                Decision("dequantize", "FP8 with scale", scale, quantization.block_size_of(name))
                if scale
                else Decision("copy", "no scale")
            )
        elif name in of_groups:
            decisions[name] = of_groups[name]
        elif weight is not None and weight in tensors:
            decisions[name] = Decision("drop", f"scale of {weight}")
            if tensors[weight][0] != FP8:
                warnings.append(f"{name}: scale of a weight that is not FP8 ({tensors[weight][0]}); dropped")
        else:
            decisions[name] = Decision("copy", "not quantized")
            if name.endswith(scale_name("")):
                warnings.append(f"{name}: scale without its weight; copied")
    missing = [name for name in fp8 if decisions[name].action == "copy"]
    if missing and on_missing_scale == "error":
        raise MissingScaleError(
            f"{len(missing)} of {len(fp8)} FP8 weights have no scale",
            expected=f"{scale_name(missing[0])} beside {missing[0]}",
            got=f"none for {', '.join(missing)}",
            remedy="fetch the missing shard, or keep them as raw FP8 with --on-missing-scale keep",
        )
    warnings += [f"{name}: no scale; kept as raw FP8, which is not usable as a weight" for name in missing]
    skip = tuple(sorted(map(module_path, missing)))
    result, family = Decisions(decisions, skip, tuple(warnings)), family_of(config)
    for name, decision in decisions.items():
        if decision.scale is not None and decision.group is None:
            shape = tensors[name][1]
            block = result.stored_block_size(name, shape, family)
            check_grid(name, shape, decision.scale, tensors[decision.scale], block)
    return result


def _of_groups(low: Mapping[str, LowBitWeight], tensors: Mapping[str, Signature]) -> dict[str, Decision]:
    """Codes of fewer than 8 bits are dequantized, and all that is stored beside them is used up."""
    decisions = {}
    for name, own in low.items():
        check_companions(own, tensors)
        reason = f"{spell_group_format(own.fmt)} with scales"
        decisions[name] = Decision("dequantize", reason, own.scale, group=own.fmt, low=own)
        decisions |= {each: Decision("drop", f"belongs to {name}") for each in own.companions}
    return decisions


def _refuse_quantized(tensors: Mapping[str, Signature], config: dict[str, Any]) -> None:
    entry = next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), None)
    low = {DTYPE_NAMES[d] for d in DTYPE_NAMES if d.itemsize == 1 and d.is_floating_point} | {
        "F4",
        "F6_E2M3",
        "F6_E3M2",
    }
    found = next((name for name, (dtype, _) in tensors.items() if dtype in low), None)
    packed = next((name for name in tensors if name.endswith(_UNSUPPORTED_SUFFIXES)), None)
    if entry or found or packed:
        method = (entry or {}).get("quant_method")
        got = f"quant_method {method!r}" if entry else f"{found or packed}"
        ours = (
            method in ("fp8", "compressed-tensors", "w4afp8", OWN_METHOD)
            if entry
            else found and tensors[found][0] == FP8
        )
        raise BlockscaleError(
            "source is already quantized",
            expected="BF16, F16 or F32 weights and no quantization_config",
            got=got,
            remedy="run blockscale dequantize first" if ours else "start from the unquantized checkpoint",
        )


def _reason_to_keep(name: str, signature: Signature, family: Family, recipe: Recipe) -> str | None:
    dtype, shape = signature
    wanted = recipe.precision.precision_of(name)
    reason = keep_reason(name, shape, dtype, family, head=wanted not in (None, "bf16"))
    if reason is not None:
        return reason
    if any(matches(name, pattern) for pattern in recipe.exclude):
        return "excluded"
    if recipe.include and not any(matches(name, pattern) for pattern in recipe.include):
        return "not included"
    if wanted is None and recipe.precision.quantizes:
        return "not named by the precision"
    return "set to bf16" if wanted == "bf16" else None


def _reason_in(decisions: dict[str, Decision], name: str) -> str | None:
    decision = decisions[name]
    return decision.reason if decision.action == "copy" else None


def _head_warning(decisions: dict[str, Decision]) -> list[str]:
    heads = [name for name, decision in decisions.items() if decision == Decision("quantize", "head")]
    told = "is quantized: vLLM and SGLang keep the output head in high precision and load no FP8 one"
    return [f"{heads[0]} {told}"] if heads else []


def _share_precision(decisions: dict[str, Decision]) -> list[str]:
    """Keep the whole of every group that engines fuse if one of it is kept; says so."""
    warnings = []
    for group in sharing_groups(decisions):
        kept = [name for name in group if decisions[name].action == "copy"]
        moved = [name for name in group if decisions[name].action == "quantize"]
        if kept and moved:
            for name in moved:
                decisions[name] = Decision("copy", f"shares its precision with {kept[0]}")
            also = moved[0] if len(moved) == 1 else f"{moved[0]} and {len(moved) - 1} more"
            warnings.append(
                f"{kept[0]} keeps its precision ({decisions[kept[0]].reason}), so {also} must too"
            )
    return warnings


def _refuse_fused_experts(
    decisions: dict[str, Decision], tensors: Mapping[str, Signature], recipe: Recipe
) -> None:
    if recipe.layout not in ("compressed-tensors", "w4afp8"):
        return
    for name, decision in decisions.items():
        if decision.action == "quantize" and len(tensors[name][1]) == 3:
            raise BlockscaleError(
                f"the {recipe.layout} layout has no place for fused 3-D experts",
                where=name,
                remedy="use --layout deepseek, or --exclude '*.experts.*'",
            )


def scale_of(weight: str, tensors: Container[str]) -> str | None:
    """Name of the scale stored for a weight, in any layout, or None."""
    return next((name for layout in LAYOUTS if (name := scale_name(weight, layout)) in tensors), None)


def check_grid(
    name: str, shape: tuple[int, ...], scale: str, found: Signature, block_size: tuple[int, int]
) -> None:
    """Refuse a scale, by its name and (dtype, shape), that is not that of an FP8 weight of this shape.

    Raises:
        BlockscaleError: the weight is no matrix, or the scale has another grid or a dtype that scales lack.
    """
    if len(shape) not in (2, 3):
        raise BlockscaleError(
            "FP8 tensor is not a matrix", where=name, expected="2 or 3 dimensions", got=list(shape)
        )
    expected = scale_shape(shape, block_size)
    if found[1] != expected:
        raise BlockscaleError(
            f"scale grid does not fit the {block_size[0]}x{block_size[1]} blocks of config.json",
            where=scale,
            expected=f"{list(expected)} for weight {list(shape)}",
            got=list(found[1]),
        )
    if found[0] not in SCALE_DTYPES:
        raise BlockscaleError(
            "scale has a wrong dtype", where=scale, expected=" | ".join(SCALE_DTYPES), got=found[0]
        )


def _unknown_family(config: dict[str, Any]) -> str:
    return (
        f"model_type {config.get('model_type')!r} is not known: only weights that are linear layers by "
        "their name are quantized; --dry-run shows how many"
    )
