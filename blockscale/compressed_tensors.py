"""The `quantization_config` of the compressed-tensors layout: a config group for each format.

    config_groups.group_N = {
        format: "float-quantized", targets: [...],
        weights: {num_bits: 8, type: "float", strategy: "block", block_structure: [R, C]},
        input_activations: {..., strategy: "group", group_size: C, dynamic: true}}

    {format: "pack-quantized", weights: {num_bits: 4, type: "int", strategy: "group", group_size: G},
     input_activations: {..., strategy: "token", dynamic: true}}           only with INT4 in groups of 128
    {format: "mxfp4-pack-quantized", weights: {num_bits: 4, type: "float", strategy: "group", group_size: 32}}

Where there are several formats, that of the whole is "mixed-precision".

Blocks of one row, 1 x G, could be spelled strategy "group" with group_size G too, and are read so. They are
written as blocks: the package decompresses those for any shape, and groups only where G divides the columns.

Sources: compressed-tensors 0.20, `quantization/quant_args.py` and `lifecycle/forward_helpers.py`; vLLM's
`compressed_tensors.py` (`_is_fp8_w4a8`: token activations; a format in each group).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blockscale.errors import BlockscaleError

# What a scheme means that is for every linear layer not named by another one.
ALL_LINEARS = "Linear"
BLOCKS, INTEGERS, MXFP4 = "float-quantized", "pack-quantized", "mxfp4-pack-quantized"
_FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}


@dataclass(frozen=True)
class Scheme:
    """A config group.

    Attributes:
        targets: full module paths, regular expressions behind "re:", or "Linear".
        format: compression format of its weights.
        weights: fields of the package's `QuantizationArgs`.
        activations: the same of the inputs; None where only weights are quantized.
    """

    targets: tuple[str, ...]
    format: str
    weights: dict[str, Any]
    activations: dict[str, Any] | None


def block_scheme(block_size: tuple[int, int], targets: Sequence[str]) -> Scheme:
    """FP8 in blocks, multiplied with FP8 in groups as wide as a block."""
    weights = {**_FP8, "strategy": "block", "block_structure": list(block_size), "dynamic": False}
    activations = {**_FP8, "strategy": "group", "group_size": block_size[1], "dynamic": True}
    return Scheme(tuple(targets), BLOCKS, weights, activations)


def group_scheme(bits: int, group_size: int, targets: Sequence[str]) -> Scheme:
    """Integers of 4 or 3 bits in groups.

    INT4 in groups of 128 is multiplied with FP8, one scale a token: that is what vLLM runs by its W4A8
    kernels. Of everything else its kernels take the weights alone.
    """
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
    tokens = {**_FP8, "strategy": "token", "dynamic": True} if (bits, group_size) == (4, 128) else None
    return Scheme(tuple(targets), INTEGERS, {**weights, "group_size": group_size, "dynamic": False}, tokens)


def mxfp4_scheme(targets: Sequence[str]) -> Scheme:
    """E2M1 in groups of 32 with power of two scales."""
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    return Scheme(tuple(targets), MXFP4, {**weights, "dynamic": False, "scale_dtype": torch.uint8}, None)


def write_config(schemes: Sequence[Scheme], skip: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json, by the package itself.

    Args:
        schemes: of each group.
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
    groups = {}
    for number, scheme in enumerate(schemes):
        inputs = scheme.activations
        groups[f"group_{number}"] = QuantizationScheme(
            targets=list(scheme.targets),
            weights=QuantizationArgs(**scheme.weights),
            input_activations=None if inputs is None else QuantizationArgs(**inputs, observer=None),
            format=scheme.format,
        )
    formats = {scheme.format for scheme in schemes}
    config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=list(skip),
    )
    return config.model_dump(mode="json", exclude_none=True)


def read_schemes(entry: dict[str, Any], where: str) -> list[Scheme]:
    """The config groups as they are spelled.

    Raises:
        BlockscaleError: a group without weights, or of targets that are none.
    """
    groups = entry.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    found = []
    for group in groups:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise unknown_scheme(f"{len(groups)} groups, weights unknown", where)
        targets = group.get("targets", [ALL_LINEARS])
        if not isinstance(targets, list) or not all(map(is_target, targets)):
            expected = "a list of names and regular expressions"
            raise BlockscaleError("bad targets", where=where, expected=expected, got=repr(targets))
        kind = group.get("format") or entry.get("format")
        found.append(Scheme(tuple(targets), str(kind), weights, group.get("input_activations")))
    if not found:
        raise unknown_scheme(
            f"{0 if entry.get('config_groups') == {} else 'no'} groups, weights unknown", where
        )
    return found


def block_of(scheme: Scheme) -> object | None:
    """The block size of 8-bit float weights as it is spelled; None of anything else."""
    weights = scheme.weights
    if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        return None
    if weights.get("strategy") == "group":
        return (1, weights.get("group_size"))
    return weights.get("block_structure") if weights.get("strategy") == "block" else None


def group_of(scheme: Scheme) -> tuple[str, int, int] | None:
    """(type, bits, group size) of symmetric weights in groups that are packed; None of anything else."""
    weights = scheme.weights
    kind, bits, size = (weights.get(key) for key in ("type", "num_bits", "group_size"))
    packed = (kind, scheme.format) in (("int", INTEGERS), ("float", MXFP4))
    plain = weights.get("strategy") == "group" and weights.get("symmetric", True)
    in_order = weights.get("actorder") in (None, False, "static", "weight")
    if not (packed and plain and in_order and isinstance(bits, int) and isinstance(size, int)):
        return None
    return str(kind), bits, size


def is_target(target: object) -> bool:
    """Whether this is a name, or a regular expression behind "re:"."""
    try:
        return isinstance(target, str) and bool(re.compile(target.removeprefix("re:")))
    except re.error:
        return False


def unknown_scheme(got: str, where: str) -> BlockscaleError:
    """The error about a config group that is not read here."""
    return BlockscaleError(
        "compressed-tensors checkpoint is not block FP8",
        where=where,
        expected="config groups with 8-bit float weights and strategy block or group, or packed groups",
        got=got,
        remedy="start from an unquantized (BF16) or block FP8 checkpoint",
    )
