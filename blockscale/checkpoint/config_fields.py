"""Checked reading of the fields of a parsed config.json that tensor names and shapes depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockscale.errors import BlockscaleError


@dataclass(frozen=True)
class ConfigFields:
    """A parsed config.json (or its text part) whose fields are checked when read; null counts as missing.

    Every reader raises BlockscaleError, naming the key, for a value that is missing without a default or is
    not of its kind.
    """

    values: dict[str, Any]

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean field."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def indices(self, key: str) -> list[int]:
        """A list of layer indices, empty if missing."""
        value = self.values.get(key) or []
        if not isinstance(value, list):
            raise BlockscaleError(f"bad {key}", where="config.json", expected="a list", got=repr(value))
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer field; without a default it is required."""
        return self._integer(key, default, 1)

    def count(self, key: str, default: int | None = None) -> int:
        """An integer field that may be zero; without a default it is required."""
        return self._integer(key, default, 0)

    def experts(self, key: str) -> int:
        """Routed experts, by the family's own key or the one that transformers 5 writes; zero means dense."""
        return self.count(key, self.values.get("num_local_experts"))

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.size("hidden_size")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.size("num_attention_heads")

    @property
    def head_dim(self) -> int:
        """Width of an attention head, by default the hidden size split over the heads."""
        return self.size("head_dim", self.hidden // self.heads)

    def _integer(self, key: str, default: int | None, least: int) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise BlockscaleError(
                f"key {key} is missing",
                where="config.json",
                remedy=f"model_type {self.values.get('model_type')} needs it for its tensor names and shapes",
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BlockscaleError(
                f"bad {key}", where="config.json", expected=f"an integer >= {least}", got=repr(value)
            )
        return value
