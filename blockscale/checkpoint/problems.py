"""What is wrong with a checkpoint as its headers and config.json tell it: the classic mistakes, a line each.

`inspect` prints them, `verify` fails on the errors. A warning is something an engine may cope with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from blockscale.checkpoint.decide import FP8, SCALE_DTYPES, Signature, scale_of
from blockscale.checkpoint.families import family_of, stored_block_size
from blockscale.checkpoint.group_problems import group_problems
from blockscale.checkpoint.group_storage import LowBitWeight
from blockscale.checkpoint.groups import low_bit_weights
from blockscale.checkpoint.index import CheckpointIndex
from blockscale.checkpoint.model_config import kept_fp8
from blockscale.checkpoint.names import keep_reason, role_of, sharing_groups
from blockscale.checkpoint.plan import signatures
from blockscale.checkpoint.problem import Problem
from blockscale.checkpoint.skip_list import skip_entry
from blockscale.errors import BlockscaleError
from blockscale.formats import module_path, scale_name, scale_shape, scaled_weight_name, spell_block_size
from blockscale.group_spelling import spell_group_format
from blockscale.quantization_config import Quantization, parse_quantization_config

_RAW = "raw FP8 without a scale, kept on request: not usable as a weight"
_NOT_FP8 = ("embedding", "head", "norm", "router", "mtp_projection", "vision")


def structural_problems(
    index: CheckpointIndex, config: dict[str, Any]
) -> tuple[Quantization | None, list[Problem]]:
    """The quantization that config.json declares, and every problem that headers and config show."""
    tensors = signatures(index)
    fp8 = [name for name, (dtype, _) in tensors.items() if dtype == FP8]
    try:
        quantization = parse_quantization_config(config)
    except BlockscaleError as error:
        return None, [Problem("error", "config.json", str(error))]
    problems = _index_problems(index)
    if quantization is None:
        kept = kept_fp8(config)
        problems += [Problem("warning", n, _RAW) for n in fp8 if module_path(n) in kept]
        told = [name for name in fp8 if module_path(name) not in kept]
        if told:
            text = f"{len(told)} FP8 tensors but no quantization_config, such as {told[0]}"
            problems.append(Problem("error", "config.json", text))
        return None, problems
    low = low_bit_weights(tensors, quantization)
    if not fp8 and not low:
        text = "stale quantization_config: there is no quantized tensor"
        problems.append(Problem("error", "config.json", text))
        return quantization, problems
    problems += _scale_problems(tensors, fp8, quantization, config)
    problems += _stray_scales(tensors, low)
    problems += group_problems(tensors, quantization, low)
    problems += _precision_problems(tensors, quantization, low)
    problems += _skip_list_problems(tensors, quantization, config)
    return quantization, problems


def _index_problems(index: CheckpointIndex) -> list[Problem]:
    declared = (index.index_metadata or {}).get("total_size")
    if declared in (None, index.total_size, str(index.total_size)):
        return []
    text = f"total_size of the index is wrong: expected {index.total_size}, got {declared}"
    return [Problem("error", "model.safetensors.index.json", text)]


def _scale_problems(
    tensors: Mapping[str, Signature], fp8: list[str], quantization: Quantization, config: dict[str, Any]
) -> list[Problem]:
    problems, family = [], family_of(config)
    for name in fp8:
        scale = scale_of(name, tensors)
        if scale is None:
            problems.append(Problem("error", name, "FP8 weight without a scale"))
            continue
        shape, (dtype, grid) = tensors[name][1], tensors[scale]
        if len(shape) not in (2, 3):
            problems.append(Problem("error", name, f"FP8 tensor is not a matrix: shape {list(shape)}"))
            continue
        try:
            block = quantization.block_size_of(name)
        except BlockscaleError as error:
            problems.append(Problem("error", name, str(error)))
            continue
        expected = scale_shape(shape, stored_block_size(block, shape, family))
        if grid != expected:
            text = f"scale grid does not fit the block size: expected {list(expected)}, got {list(grid)}"
            problems.append(Problem("error", scale, text))
        if dtype not in SCALE_DTYPES:
            problems.append(Problem("error", scale, f"scale has dtype {dtype}"))
    return problems


def _stray_scales(tensors: Mapping[str, Signature], low: Mapping[str, LowBitWeight]) -> list[Problem]:
    problems, companions = [], {name for each in low.values() for name in each.companions}
    for name in tensors:
        weight = scaled_weight_name(name)
        if name in companions:
            continue
        if weight is not None and weight in tensors and tensors[weight][0] not in (FP8, "U8"):
            problems.append(
                Problem("error", name, f"scale of a weight that is {tensors[weight][0]}, not FP8")
            )
        elif weight not in tensors and name.endswith(scale_name("")):
            problems.append(Problem("error", name, "scale without its weight"))
    return problems


def _precision_problems(
    tensors: Mapping[str, Signature], quantization: Quantization, low: Mapping[str, LowBitWeight]
) -> list[Problem]:
    problems = []
    spelled = {each.name: spell_group_format(each.fmt) for each in low.values()}
    spelled |= {name: "FP8" for name, (dtype, _) in tensors.items() if dtype == FP8}
    for name, kind in spelled.items():
        role = role_of(name)
        if role in _NOT_FP8:
            severity: Literal["error", "warning"] = "warning" if role == "head" else "error"  # on request
            problems.append(Problem(severity, name, f"{role} is {kind}; engines keep it in high precision"))
    for group in sharing_groups(low[name].name if name in low else name for name in tensors):
        other = next((name for name in group if name in spelled), None)
        if other is None:
            continue
        kinds = {name: spelled.get(name) or tensors[name][0] for name in group}
        one = next((name for name in group if kinds[name] != kinds[other]), None)
        if one is not None:
            text = f"is {kinds[one]} but {other} is {kinds[other]}; engines fuse the two"
            problems.append(Problem("error", one, text))
        elif quantization.groups and kinds[other] == "FP8":
            problems += _shared_block_problems(group, quantization)
    return problems


def _shared_block_problems(group: tuple[str, ...], quantization: Quantization) -> list[Problem]:
    with suppress(BlockscaleError):  # told of the weight that has none
        sizes = {name: spell_block_size(quantization.block_size_of(name)) for name in group}
        other = next((name for name in group if sizes[name] != sizes[group[0]]), None)
        if other is not None:
            text = f"has blocks of {sizes[other]} but {group[0]} of {sizes[group[0]]}; engines fuse the two"
            return [Problem("error", other, text)]
    return []


def _skip_list_problems(
    tensors: Mapping[str, Signature], quantization: Quantization, config: dict[str, Any]
) -> list[Problem]:
    problems, family, skip = [], family_of(config), set(quantization.skip)
    patterns = _patterns(skip)
    unlisted = []
    for name, (dtype, shape) in tensors.items():
        if dtype == FP8 and module_path(name) in skip:
            problems.append(Problem("error", name, "is FP8 but on the skip list"))
        entry = None if scaled_weight_name(name) in tensors else skip_entry(name, (dtype, shape))
        if entry is None or entry in skip or any(pattern.match(entry) for pattern in patterns):
            continue
        if keep_reason(name, shape, dtype, family) is None:
            text = f"is {dtype} but not on the skip list: engines will look for its scale"
            problems.append(Problem("error", name, text))
        else:
            unlisted.append(entry)
    if unlisted:
        text = f"{len(unlisted)} unquantized modules are not on the skip list, such as {unlisted[0]}: "
        text += "engines that go by the list alone will look for their scales"
        problems.append(Problem("warning", "config.json", text))
    modules = {module_path(name.removesuffix("_packed")) for name in tensors} | {
        name.rpartition(".")[0] for name in tensors
    }
    for entry in sorted(skip - modules - {"lm_head"}):
        if not entry.startswith("re:"):
            problems.append(Problem("warning", "config.json", f"skip list entry {entry!r} names no module"))
    return problems


def _patterns(skip: set[str]) -> list[re.Pattern[str]]:
    """The regular expressions of a compressed-tensors `ignore` list; one that is none matches nothing."""
    patterns = []
    for entry in skip:
        with suppress(re.error):
            patterns += [re.compile(entry.removeprefix("re:"))] if entry.startswith("re:") else []
    return patterns
