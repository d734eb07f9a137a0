r"""What the `quantization_config` of a config.json says: how weights are stored, and which are left alone.

Four layouts are written and read. FP8 weights have their block size and scale format, in compressed-tensors
several sizes by module. Weights of fewer than 8 bits (`group_formats`) have no place in that of DeepSeek. In
"compressed-tensors" they have config groups. In "w4afp8" all routed experts are INT4 in groups of 128, and
config.json says no more than that. "blockscale" is that of DeepSeek with one more key:

    "group_formats": {"int4:g128": ["re:model\.layers\.3\.mlp\.experts\..*"]}

A target is a full module path or, behind "re:", a regular expression that a module path begins with.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from blockscale import compressed_tensors
from blockscale.errors import BlockscaleError
from blockscale.formats import (
    BlockFP8,
    Layout,
    module_path,
    parse_block_size,
    parse_scale_fmt,
    spell_block_size,
)
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.group_spelling import WrittenFormat, parse_group_format, spell_group_format

# Where config.json says how a model is quantized; the second is an older spelling.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
OWN_METHOD = "blockscale"
_GROUP_FORMATS = "group_formats"
# What SGLang's w4afp8 runs: routed experts, one format, beside FP8 in one block size.
_EXPERTS = r"re:.*\.experts\.\d+\.\w+$"
_W4AFP8_BITS, _W4AFP8_GROUP, _W4AFP8_BLOCK = 4, 128, (128, 128)


@dataclass(frozen=True)
class BlockGroup:
    """Modules whose FP8 weights have blocks of one size.

    Attributes:
        block_size: (block_n, block_k).
        targets: full module paths, regular expressions behind "re:", or "Linear" for all that no other names.
    """

    block_size: tuple[int, int]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class LowBitGroup:
    """Modules whose weights have fewer than 8 bits.

    Attributes:
        fmt: how they are stored.
        targets: full module paths, or regular expressions behind "re:".
    """

    fmt: WrittenFormat
    targets: tuple[str, ...]


_T = TypeVar("_T")


class _ByTarget(Generic[_T]):
    """Values by target: a module path beats an expression; of several, the first counts."""

    def __init__(self, values: Iterable[tuple[Sequence[str], _T]]) -> None:
        self._values: dict[str, _T] = {}
        for targets, value in values:
            for target in targets:
                self._values.setdefault(target, value)
        patterns = sorted(target for target in self._values if target.startswith("re:"))
        self._patterns = [(target, re.compile(target.removeprefix("re:"))) for target in patterns]

    def find(self, module: str, or_else: str | None = None) -> _T | None:
        """The value of a module path, that of another target, or None."""
        if module in self._values:
            return self._values[module]
        for target, pattern in self._patterns:  # in the order of the compressed-tensors package
            if pattern.match(module):
                return self._values[target]
        return None if or_else is None else self._values.get(or_else)


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are stored.

    Attributes:
        layout: which on-disk spelling it is.
        fmt: scale format of FP8 weights, and the block size; with several, that of the first group.
        skip: full module paths that stay unquantized, sorted.
        groups: where there are several block sizes, who has which; else empty.
        low: who has fewer than 8 bits.
        weights_only: inputs of layers are not quantized; by compressed-tensors groups without activations.

    Raises:
        BlockscaleError: several block sizes, or fewer than 8 bits, in a layout that has no place for them.
    """

    layout: Layout
    fmt: BlockFP8
    skip: tuple[str, ...] = ()
    groups: tuple[BlockGroup, ...] = ()
    low: tuple[LowBitGroup, ...] = ()
    weights_only: bool = False

    def __post_init__(self) -> None:
        if self.groups and self.layout != "compressed-tensors":
            raise BlockscaleError(
                f"the {self.layout} layout has one block size for the whole checkpoint",
                got=", ".join(spell_block_size(size) for size in self.block_sizes),
                remedy="use --layout compressed-tensors, or one size",
            )
        for each in self.low:
            if not _has_place(self.layout, each.fmt):
                raise BlockscaleError(
                    f"the {self.layout} layout has no place for "
                    + ("weights of fewer than 8 bits" if self.layout == "deepseek" else "this format"),
                    expected="int4:g128" if self.layout == "w4afp8" else None,
                    got=", ".join(spell_group_format(each.fmt) for each in self.low),
                    remedy="use --layout blockscale",
                )
        if self.layout == "w4afp8" and not (self.low and self.fmt.block_size == _W4AFP8_BLOCK):
            raise BlockscaleError(
                "the w4afp8 layout is INT4 experts beside FP8 in blocks of 128x128",
                got=f"blocks of {spell_block_size(self.fmt.block_size)}" if self.low else "FP8 alone",
                remedy="use --recipe w4a8, or --layout deepseek for FP8",
            )

    @property
    def block_sizes(self) -> tuple[tuple[int, int], ...]:
        """Every block size there is, each once."""
        return tuple(dict.fromkeys(group.block_size for group in self.groups)) or (self.fmt.block_size,)

    def block_size_of(self, weight_name: str) -> tuple[int, int]:
        """The block size of an FP8 weight; a module path beats a regular expression, and that beats "Linear".

        Raises:
            BlockscaleError: no group names it.
        """
        if not self.groups:
            return self.fmt.block_size
        size = self._sizes.find(module_path(weight_name), or_else=compressed_tensors.ALL_LINEARS)
        if size is None:
            raise BlockscaleError(
                "FP8 weight of unknown block size", where=weight_name, expected="a config group that names it"
            )
        return size

    def group_format_of(self, weight_name: str) -> WrittenFormat | None:
        """The format of a weight of fewer than 8 bits; None of any other."""
        everywhere = compressed_tensors.ALL_LINEARS if self.layout == "compressed-tensors" else None
        return self._formats.find(module_path(weight_name), everywhere)

    @functools.cached_property
    def _sizes(self) -> _ByTarget[tuple[int, int]]:
        return _ByTarget((group.targets, group.block_size) for group in self.groups)

    @functools.cached_property
    def _formats(self) -> _ByTarget[WrittenFormat]:
        return _ByTarget((group.targets, group.fmt) for group in self.low)

    def config(self) -> dict[str, Any]:
        """The `quantization_config` entry of config.json that engines read."""
        if self.layout == "compressed-tensors":
            usual = BlockGroup(self.fmt.block_size, (compressed_tensors.ALL_LINEARS,))
            schemes = [
                compressed_tensors.block_scheme(group.block_size, group.targets)
                for group in self.groups or (usual,)
            ]
            return compressed_tensors.write_config([*schemes, *map(_low_scheme, self.low)], self.skip)
        config: dict[str, Any] = {
            "quant_method": "fp8" if self.layout == "deepseek" else self.layout,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.fmt.block_size),
        }
        # An engine that reads `scale_fmt: null` takes it for an unknown format: leave the key out.
        if self.fmt.scale_fmt == "ue8m0":
            config["scale_fmt"] = "ue8m0"
        if self.layout == "w4afp8":
            config |= {"linear_activation_scheme": "dynamic", "moe_activation_scheme": "static"}
            config["group_size"] = _W4AFP8_GROUP
        elif self.low:
            config[_GROUP_FORMATS] = {spell_group_format(each.fmt): list(each.targets) for each in self.low}
        config["modules_to_not_convert"] = list(self.skip)
        return config


def parse_quantization_config(config: dict[str, Any]) -> Quantization | None:
    """Read the `quantization_config` of a config.json; None if the model is not quantized.

    Raises:
        BlockscaleError: quantized, but not in a block FP8 format that is known here.
    """
    key = next((key for key in QUANTIZATION_KEYS if config.get(key)), None)
    if key is None:
        return None
    entry, where = config[key], f"config.json {key}"
    if not isinstance(entry, dict):
        raise BlockscaleError("is not a JSON object", where=where, got=repr(entry))
    method = entry.get("quant_method")
    if method in ("fp8", "w4afp8", OWN_METHOD):
        # SGLang's w4afp8 has this one whatever config.json says.
        block = entry.get("weight_block_size", _W4AFP8_BLOCK if method == "w4afp8" else None)
        if block is None:
            raise BlockscaleError(
                "FP8 checkpoint without block scales (per-tensor or per-channel)",
                where=where,
                expected="weight_block_size",
                remedy="start from the unquantized checkpoint",
            )
        key = "modules_to_not_convert" if entry.get("modules_to_not_convert") else "ignored_layers"
        fmt = BlockFP8(parse_block_size(block, where), parse_scale_fmt(entry.get("scale_fmt"), where))
        skip = _parse_skip_list(entry.get(key), f"{where} {key}")
        if method == "fp8":
            return Quantization("deepseek", fmt, skip)
        if method == "w4afp8":
            experts = LowBitGroup(GroupInt(_W4AFP8_BITS, _W4AFP8_GROUP), (_EXPERTS,))
            return Quantization("w4afp8", fmt, skip, low=(experts,))
        return Quantization(
            "blockscale", fmt, skip, low=parse_group_formats(entry.get(_GROUP_FORMATS), where)
        )
    if method == "compressed-tensors":
        return _parse_compressed_tensors(entry, where)
    raise BlockscaleError(
        "quantization method is not block FP8",
        where=where,
        expected="quant_method fp8, compressed-tensors, w4afp8 or blockscale",
        got=repr(method),
        remedy="start from an unquantized (BF16) or block FP8 checkpoint",
    )


def parse_group_formats(value: Any, where: str) -> tuple[LowBitGroup, ...]:
    """The value of "group_formats" in the entry `where`; nothing where there is none.

    Raises:
        BlockscaleError: it is not as the module says.
    """
    where = f"{where} {_GROUP_FORMATS}"
    if value is None:
        return ()
    if not isinstance(value, dict) or not all(
        isinstance(targets, list) and all(map(compressed_tensors.is_target, targets))
        for targets in value.values()
    ):
        expected = "lists of module paths and expressions by format"
        raise BlockscaleError("bad group formats", where=where, expected=expected, got=repr(value))
    return tuple(
        LowBitGroup(parse_group_format(key, where), tuple(targets)) for key, targets in value.items()
    )


def _has_place(layout: Layout, fmt: WrittenFormat) -> bool:
    if layout == "w4afp8":
        return isinstance(fmt, GroupInt) and (fmt.bits, fmt.group_size) == (_W4AFP8_BITS, _W4AFP8_GROUP)
    return layout != "deepseek"


def _low_scheme(group: LowBitGroup) -> compressed_tensors.Scheme:
    if isinstance(group.fmt, MXFP4):
        return compressed_tensors.mxfp4_scheme(group.targets)
    return compressed_tensors.group_scheme(group.fmt.bits, group.fmt.group_size, group.targets)


def _parse_compressed_tensors(entry: dict[str, Any], where: str) -> Quantization:
    schemes = compressed_tensors.read_schemes(entry, where)
    groups, low = [], []
    for scheme in schemes:
        block, group = compressed_tensors.block_of(scheme), _low_format(scheme)
        if block is not None:
            groups.append(BlockGroup(parse_block_size(block, where), scheme.targets))
        elif group is not None:
            low.append(LowBitGroup(group, scheme.targets))
        else:
            raise compressed_tensors.unknown_scheme(f"{len(schemes)} groups, weights {scheme.weights}", where)
    # The layout has no key for the scale format; the scales themselves tell (`verify` and `inspect` look).
    fmt = BlockFP8(groups[0].block_size if groups else (128, 128), "float32")
    several = len({group.block_size for group in groups}) > 1
    skip = _parse_skip_list(entry.get("ignore"), f"{where} ignore")
    weights_only = all(scheme.activations is None for scheme in schemes)
    sizes = tuple(groups) if several else ()
    return Quantization("compressed-tensors", fmt, skip, sizes, tuple(low), weights_only)


def _low_format(scheme: compressed_tensors.Scheme) -> WrittenFormat | None:
    found = compressed_tensors.group_of(scheme)
    if found == ("float", 4, 32):
        return MXFP4()
    if found is None or found[0] != "int":
        return None
    try:
        return GroupInt(found[1], found[2])
    except BlockscaleError:
        return None


def _parse_skip_list(value: object, where: str) -> tuple[str, ...]:
    entries = [] if value is None else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise BlockscaleError("is not a list of module paths", where=where, got=repr(value))
    return tuple(sorted(entries))
