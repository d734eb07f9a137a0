"""The precision of linear weights, by what they are: experts in FP8, the rest in BF16.

    {"default": "bf16", "experts": "fp8", "*.o_proj": "fp8:64x64", "model.layers.0.*": "bf16"}

A key is a role, a shell-style pattern on the full tensor name or module path, or `default`. A pattern beats
a role, a role beats `default`; of several patterns that match, the last one counts. The output head is
quantized where it is named, never by `default`. What is no linear weight (norm, router, ...) has no
precision.
A value is a `WeightFormat`: "fp8" has the blocks that the recipe has by default, "fp8:64x64" its own; "int4",
"int3" and "mxfp4" are formats in groups, "int4:g64:ue8m0" one with options (`group_formats`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal, cast, get_args

from blockscale.checkpoint.names import Role, check_patterns, matcher, role_of
from blockscale.errors import BlockscaleError
from blockscale.formats import parse_block_size, spell_block_size
from blockscale.group_spelling import GROUP_SPELLINGS, WrittenFormat, parse_group_format, spell_group_format

# "bf16" is whatever is not quantized: in the source's dtype after a conversion, in the model's once loaded.
Kind = Literal["fp8", "bf16", "int4", "int3", "mxfp4"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SPELLINGS = ("fp8", "fp8:ROWSxCOLUMNS", "bf16", *GROUP_SPELLINGS)
ROLES: tuple[Role, ...] = ("attention", "dense_mlp", "shared_experts", "experts", "head")
_ROLES_SET = frozenset((*ROLES, "other"))
DEFAULT = "default"


@dataclass(frozen=True)
class WeightFormat:
    """What a weight is to be.

    Attributes:
        kind: what it is called.
        block_size: (block_n, block_k) of FP8; None is that of the recipe.
        group: of fewer than 8 bits: how it is stored.
    """

    kind: Kind
    block_size: tuple[int, int] | None = None
    group: WrittenFormat | None = None

    @property
    def quantizes(self) -> bool:
        """Whether it is anything but "bf16"."""
        return self.kind != "bf16"

    def __str__(self) -> str:
        """As `parse_weight_format` reads it: `fp8:64x64`."""
        if self.group is not None:
            return spell_group_format(self.group)
        return self.kind if self.block_size is None else f"{self.kind}:{spell_block_size(self.block_size)}"


def parse_weight_format(value: object, where: str | None = None) -> WeightFormat:
    """`"bf16"`, `"fp8"`, `"fp8:64x64"`, or a group format as `"int4:g64"`.

    Raises:
        BlockscaleError: anything else; `where` says in the message which value it is.
    """
    if isinstance(value, WeightFormat):
        return value
    kind, colon, size = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind == "fp8":
        return WeightFormat("fp8", parse_block_size(size, where) if colon else None)
    if kind == "bf16" and not colon:
        return WeightFormat("bf16")
    if kind in ("int4", "int3", "mxfp4"):
        return WeightFormat(cast("Kind", kind), group=parse_group_format(value, where))
    raise BlockscaleError("unknown precision", where=where, expected=" | ".join(_SPELLINGS), got=repr(value))


@dataclass(frozen=True)
class Precision:
    """Which precision a tensor is to have; see the module for the rule.

    Attributes:
        entries: (role, pattern or "default", format), in the order they were given; formats may be spelled.

    Raises:
        BlockscaleError: an unknown role or precision, or two of one key.
    """

    entries: tuple[tuple[str, WeightFormat], ...] = ()

    def __post_init__(self) -> None:
        for key, _ in self.entries:
            _check_key(key)
        entries = tuple(
            (key, parse_weight_format(wanted, f"precision {key}")) for key, wanted in self.entries
        )
        object.__setattr__(self, "entries", entries)
        keys = [key for key, _ in self.entries]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise BlockscaleError("given twice", where=f"precision {twice}", expected="one value")

    def precision_of(self, name: str) -> Kind | None:
        """The kind of what a tensor of this full name is to be; None leaves it as the checkpoint has it."""
        wanted = self.format_of(name)
        return None if wanted is None else wanted.kind

    def format_of(self, name: str) -> WeightFormat | None:
        """What a tensor of this full name is to be; None leaves it as the checkpoint has it."""
        role = role_of(name)
        if role not in _ROLES_SET:
            return None
        for found, wanted in self._patterns:
            if found(name):
                return wanted
        return self._by_role.get(role)

    @cached_property
    def _patterns(self) -> tuple[tuple[Callable[[str], object], WeightFormat], ...]:
        """The patterns, the one that counts first."""
        return tuple((matcher(key), wanted) for key, wanted in reversed(self.entries) if _is_pattern(key))

    @cached_property
    def _by_role(self) -> dict[str, WeightFormat]:
        """What weights have that no pattern names."""
        named = dict(self.entries)
        if DEFAULT not in named:
            return named
        wanted = named[DEFAULT]
        return {role: wanted for role in _ROLES_SET if role != "head" or not wanted.quantizes} | named

    @property
    def quantizes(self) -> bool:
        """Whether an entry names something that is quantized."""
        return any(wanted.quantizes for _, wanted in self.entries)

    @property
    def groups(self) -> tuple[WrittenFormat, ...]:
        """The formats of fewer than 8 bits that entries name, each once."""
        return tuple(dict.fromkeys(wanted.group for _, wanted in self.entries if wanted.group is not None))

    @property
    def block_sizes(self) -> set[tuple[int, int]]:
        """The block sizes that entries name."""
        return {wanted.block_size for _, wanted in self.entries if wanted.block_size is not None}

    def over(self, other: Precision) -> Precision:
        """Both, where `self` counts if the two say different things of one key."""
        keys = {key for key, _ in self.entries}
        return Precision((*(entry for entry in other.entries if entry[0] not in keys), *self.entries))

    def spelled(self) -> list[str]:
        """As `parse_precision` reads it: `["experts=fp8"]`."""
        return [f"{key}={wanted}" for key, wanted in self.entries]


AS_STORED = Precision()


def parse_precision(value: object) -> Precision:
    """A `Precision` from a mapping (`{"experts": "fp8"}`) or texts (`["experts=fp8"]`).

    Raises:
        BlockscaleError: neither of these, or an unknown role or precision.
    """
    if isinstance(value, Precision):
        return value
    if isinstance(value, Mapping):
        return Precision(tuple(value.items()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Precision(tuple(_entry(text) for text in value))
    raise BlockscaleError("bad precision", expected='a mapping, as {"experts": "fp8"}', got=repr(value))


def check_followed(precision: Precision, names: Collection[str], reason: Callable[[str], str | None]) -> None:
    """Refuse a pattern that matches no tensor, and a format that comes to nothing.

    A role that the model does not have may be set to bf16: a recipe can serve several models.

    Args:
        precision: what was asked for.
        names: full names of all tensors.
        reason: why a tensor is not quantized, None if it is.

    Raises:
        BlockscaleError: as said.
    """
    check_patterns((key for key, _ in precision.entries if _is_pattern(key)), names)
    for key, wanted in precision.entries:
        if not wanted.quantizes or key == DEFAULT:
            continue
        named = _named_by(key, names)
        reasons = [reason(name) for name in named]
        if None not in reasons:
            raise BlockscaleError(
                f"nothing becomes {wanted.kind.upper()} by it",
                where=f"precision {key}={wanted}",
                expected="linear weights",
                got=f"{named[0]}: {reasons[0]}" if named else "no tensor of this role",
                remedy="leave it out, or name something else",
            )


def _named_by(key: str, names: Iterable[str]) -> list[str]:
    if _is_pattern(key):
        return list(filter(matcher(key), names))
    return [name for name in names if role_of(name) == key]


def _entry(text: object) -> tuple[str, Any]:
    key, equals, wanted = str(text).rpartition("=")
    if not equals:
        expected = f"ROLE or PATTERN={' | '.join(_SPELLINGS)}"
        raise BlockscaleError("bad precision", expected=expected, got=repr(text))
    return key, wanted


def _is_pattern(key: str) -> bool:
    return any(character in key for character in ".*?[")


def _check_key(key: str) -> None:
    if key in (DEFAULT, *ROLES) or _is_pattern(key):
        return
    close = get_close_matches(key, ROLES, 1)
    known = key in get_args(Role)
    raise BlockscaleError(
        "role is never quantized and has no precision to set" if known else "unknown role",
        where=f"precision {key!r}",
        expected=f"{' | '.join((*ROLES, DEFAULT))}, or a pattern with a dot or a wildcard",
        remedy=f"did you mean {close[0]}?" if close and not known else None,
    )
