"""A checkpoint as the rules see it: its linear layers, how each is stored, and what the engine skips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockscale.checkpoint.decide import FP8
from blockscale.checkpoint.families import Family, family_of
from blockscale.checkpoint.group_storage import LowBitWeight
from blockscale.checkpoint.groups import low_bit_weights
from blockscale.checkpoint.lint.skipping import (
    Engine,
    Match,
    first_match,
    group_targets,
    is_targeted,
    matcher,
    skip_entries,
)
from blockscale.checkpoint.names import keep_reason
from blockscale.checkpoint.skip_list import Signature
from blockscale.errors import BlockscaleError
from blockscale.formats import module_path
from blockscale.group_spelling import spell_group_format
from blockscale.quantization_config import QUANTIZATION_KEYS, Quantization, parse_quantization_config


@dataclass(frozen=True)
class Linear:
    """A weight that an engine runs as a quantized linear layer, or as one of many experts.

    Attributes:
        name: of the weight, before it was quantized.
        stored: of the tensor that has its codes or values.
        kind: "FP8", a format of fewer than 8 bits as spelled, or another dtype.
        shape: (N, K), or (E, N, K) of fused experts.
        quantized: whether it is stored as codes.
        skipped_by: the entry by which the engine leaves it unquantized, or None.
    """

    name: str
    stored: str
    kind: str
    shape: tuple[int, ...]
    quantized: bool
    skipped_by: str | None

    @property
    def module(self) -> str:
        return module_path(self.name)


@dataclass(frozen=True)
class Subject:
    """What the rules look at.

    Attributes:
        engine: that is to load it.
        tp: ranks of tensor parallelism.
        tensors: name -> (dtype, shape).
        config: config.json.
        entry: its `quantization_config`, {} if there is none.
        quantization: the entry parsed, or None where it cannot be.
        unreadable: why not.
        low: weights of fewer than 8 bits, by the names of their codes.
        linears: weights that the engine would quantize by the config.
        skip: entries of the skip list that the engine reads.
        match: how it compares them with a module.
    """

    engine: Engine
    tp: int
    tensors: Mapping[str, Signature]
    config: dict[str, Any]
    entry: dict[str, Any]
    quantization: Quantization | None
    unreadable: str | None
    low: Mapping[str, LowBitWeight]
    linears: tuple[Linear, ...]
    skip: tuple[str, ...]
    match: Match

    @property
    def method(self) -> str:
        """The `quant_method` of config.json, "" without one."""
        method = self.entry.get("quant_method")
        return method if isinstance(method, str) else ""

    @property
    def scale_suffix(self) -> str:
        """What the engine looks for behind the name of an FP8 weight."""
        return "_scale" if self.method == "compressed-tensors" else "_scale_inv"

    def of_kind(self, kind: str) -> tuple[Linear, ...]:
        return tuple(each for each in self.linears if each.kind == kind)

    def skipped(self, module: str) -> str | None:
        """The entry by which the engine leaves a module unquantized."""
        return first_match(self.match, self.skip, module)


def subject_of(
    engine: Engine, tensors: Mapping[str, Signature], config: dict[str, Any], tp: int = 1
) -> Subject:
    """Look at a checkpoint with the eyes of an engine."""
    entry: dict[str, Any] = next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), {})
    quantization, unreadable = _parsed(entry)
    low, skip = low_bit_weights(tensors, quantization), skip_entries(engine, entry)
    match, family = matcher(engine, entry.get("quant_method")), family_of(config)
    companions = {name for each in low.values() for name in each.companions}
    linears, targets = [], group_targets(entry)
    for stored, signature in tensors.items():
        found = None if stored in companions else _linear(stored, signature, low.get(stored), family)
        if found is not None:
            name, kind, shape, quantized = found
            by = first_match(match, skip, module_path(name))
            by = by if is_targeted(targets, module_path(name)) else "no config group names it"
            linears.append(Linear(name, stored, kind, shape, quantized, by))
    return Subject(
        *(engine, tp, tensors, config, entry, quantization, unreadable),
        *(low, tuple(linears), skip, match),
    )


def _parsed(entry: dict[str, Any]) -> tuple[Quantization | None, str | None]:
    """The entry parsed, or why it cannot be; a scale format that is not known here has a rule of its own."""
    try:
        plain = {key: value for key, value in entry.items() if key != "scale_fmt" or value == "ue8m0"}
        return parse_quantization_config({QUANTIZATION_KEYS[0]: plain}), None
    except BlockscaleError as error:
        return None, str(error)


def _linear(
    stored: str, signature: Signature, low: LowBitWeight | None, family: Family
) -> tuple[str, str, tuple[int, ...], bool] | None:
    dtype, shape = signature
    if low is not None:
        try:
            return low.name, spell_group_format(low.fmt), low.storage.shape(shape), True
        except BlockscaleError:
            return low.name, spell_group_format(low.fmt), shape, True
    # As if it were of high precision: the engine builds the layer before it sees what is stored.
    if keep_reason(stored, shape, "BF16", family) is not None:
        return None
    return stored, "FP8" if dtype == FP8 else dtype, shape, dtype == FP8
