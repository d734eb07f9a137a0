"""config.json of a checkpoint: read it, and what blockscale itself records in it."""

from __future__ import annotations

from typing import Any

from blockscale.checkpoint.index import parse_object
from blockscale.checkpoint.source import Source
from blockscale.errors import BlockscaleError, CorruptCheckpointError
from blockscale.quantization_config import QUANTIZATION_KEYS

CONFIG_NAME = "config.json"
# Our own entry: modules that were left in raw FP8 because they have no scale.
_OWN_KEY, _KEPT_KEY = "blockscale", "kept_fp8_without_scale"


def read_config(source: Source) -> dict[str, Any]:
    """Parse config.json of a checkpoint.

    Raises:
        BlockscaleError: it is absent or not a JSON object.
    """
    where = f"{source.spec}/{CONFIG_NAME}"
    if not source.exists(CONFIG_NAME):
        raise BlockscaleError("no config.json", where=where, remedy="fetch it: it says which model this is")
    return parse_config(source.read(CONFIG_NAME), where)


def parse_config(raw: bytes, where: str) -> dict[str, Any]:
    """Parse the bytes of a config.json; what they say of a quantization must be an object."""
    config = parse_object(raw, where)
    for key in QUANTIZATION_KEYS:
        if not isinstance(config.get(key) or {}, dict):
            raise CorruptCheckpointError(f"{key} is not a JSON object", where=where, got=repr(config[key]))
    return config


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what it says of a quantization."""
    return {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}


def with_kept_fp8(config: dict[str, Any], modules: tuple[str, ...]) -> dict[str, Any]:
    """A config.json that records modules left in raw FP8 for want of a scale."""
    return {**config, _OWN_KEY: {_KEPT_KEY: list(modules)}} if modules else config


def kept_fp8(config: dict[str, Any]) -> frozenset[str]:
    """The modules that `with_kept_fp8` recorded."""
    own = config.get(_OWN_KEY)
    kept = own.get(_KEPT_KEY) if isinstance(own, dict) else None
    return frozenset(map(str, kept)) if isinstance(kept, list) else frozenset()
