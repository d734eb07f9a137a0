"""The `quantization_config` of the compressed-tensors layout: a config group for each block size.

    config_groups.group_N = {
        format: "float-quantized", targets: [...],
        weights: {num_bits: 8, type: "float", strategy: "block", block_structure: [R, C]},
        input_activations: {..., strategy: "group", group_size: C, dynamic: true}}

Blocks of one row, 1 x G, could be spelled strategy "group" with group_size G too, and are read so. They are
written as blocks: the package decompresses those for any shape, and groups only where G divides the columns.

Source: compressed-tensors 0.20, `quantization/quant_args.py` and `lifecycle/forward_helpers.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from blockscale.errors import BlockscaleError

# What a scheme means that is for every linear layer not named by another one.
ALL_LINEARS = "Linear"


def write_config(
    groups: Sequence[tuple[tuple[int, int], Sequence[str]]], skip: Sequence[str]
) -> dict[str, Any]:
    """The entry of config.json, by the package itself.

    Args:
        groups: (block size, targets) of each group.
        skip: full module paths that stay unquantized.

    Raises:
        BlockscaleError: the package is not installed.
    """
    try:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    except ImportError as error:
        raise BlockscaleError(
            "the compressed-tensors layout needs the package of that name",
            remedy="pip install 'blockscale[compressed-tensors]'",
        ) from error
    common: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
    schemes = {}
    for number, (block_size, targets) in enumerate(groups):
        weights = QuantizationArgs(
            **common, strategy="block", block_structure=list(block_size), dynamic=False
        )
        activations = QuantizationArgs(
            **common, strategy="group", group_size=block_size[1], dynamic=True, observer=None
        )
        schemes[f"group_{number}"] = QuantizationScheme(
            targets=list(targets), weights=weights, input_activations=activations, format="float-quantized"
        )
    config = QuantizationConfig(
        config_groups=schemes, format="float-quantized", quantization_status="compressed", ignore=list(skip)
    )
    return config.model_dump(mode="json", exclude_none=True)


def read_groups(entry: dict[str, Any], where: str) -> list[tuple[object, tuple[str, ...]]]:
    """(block size as it is spelled, targets) of every config group.

    Raises:
        BlockscaleError: a group is not of 8-bit float weights in blocks.
    """
    groups = entry.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    found = []
    for scheme in schemes:
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        block = _block_of(weights)
        if block is None:
            raise _not_block_fp8(f"{len(schemes)} groups, weights {weights or 'unknown'}", where)
        targets = scheme.get("targets", [ALL_LINEARS])
        if not isinstance(targets, list) or not all(map(is_target, targets)):
            expected = "a list of names and regular expressions"
            raise BlockscaleError("bad targets", where=where, expected=expected, got=repr(targets))
        found.append((block, tuple(targets)))
    if not found:
        raise _not_block_fp8(f"{0 if groups == {} else 'no'} groups, weights unknown", where)
    return found


def _block_of(weights: dict[str, Any]) -> object | None:
    if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        return None
    if weights.get("strategy") == "group":
        return (1, weights.get("group_size"))
    return weights.get("block_structure") if weights.get("strategy") == "block" else None


def is_target(target: object) -> bool:
    """Whether this is a name, or a regular expression behind "re:"."""
    try:
        return isinstance(target, str) and bool(re.compile(target.removeprefix("re:")))
    except re.error:
        return False


def _not_block_fp8(got: str, where: str) -> BlockscaleError:
    return BlockscaleError(
        "compressed-tensors checkpoint is not block FP8",
        where=where,
        expected="config groups with 8-bit float weights and strategy block or group",
        got=got,
        remedy="start from an unquantized (BF16) or block FP8 checkpoint",
    )
