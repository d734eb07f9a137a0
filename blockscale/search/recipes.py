"""An assignment of formats to tensors as the precision of a recipe: few entries, checked to say the same.

Entries go from the general to the special: the format of most weights as `default`, then roles of which most
have another one, then kinds in all layers, then layers, whole or in part, and single units. The last pattern
that matches counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from blockscale.checkpoint.precision import DEFAULT, ROLES, parse_precision
from blockscale.formats import module_path
from blockscale.search.units import Unit


def compact(units: Sequence[Unit], formats: Sequence[str]) -> dict[str, str]:
    """The precision of a recipe that gives each unit its format.

    Args:
        units: of a checkpoint, all that can be quantized.
        formats: of each; "bf16", or as a candidate is named.
    """
    wanted = {unit.name: fmt for unit, fmt in zip(units, formats, strict=True)}
    entries = {DEFAULT: _most(units, wanted)}
    for role in dict.fromkeys(unit.role for unit in units):
        usual = _most([unit for unit in units if unit.role == role], wanted)
        if role in ROLES and usual != entries[DEFAULT]:
            entries[role] = usual
    _add_kinds(entries, units, wanted)
    for unit in units:
        if _differs(entries, unit, wanted):
            entries |= dict.fromkeys(_patterns(unit, wanted), wanted[unit.name])
    return entries


def _most(units: Sequence[Unit], wanted: Mapping[str, str]) -> str:
    """The format of most weights."""
    elements: Counter[str] = Counter()
    for unit in units:
        elements[wanted[unit.name]] += unit.elements
    return elements.most_common(1)[0][0]


def _add_kinds(entries: dict[str, str], units: Sequence[Unit], wanted: Mapping[str, str]) -> None:
    """Patterns over all layers, `model.layers.*.self_attn.o_proj`, of kinds that are mostly not as said."""
    kinds: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.role != "experts":  # they are a role of their own
            kinds.setdefault(_anywhere(unit.name), []).append(unit)
    for alike in kinds.values():
        usual = _most(alike, wanted)
        patterns = {_anywhere(pattern): usual for pattern in _exact(alike[0])}
        before = sum(_differs(entries, unit, wanted) for unit in alike)
        if before > len(patterns) + sum(wanted[unit.name] != usual for unit in alike):
            entries |= patterns


def _patterns(unit: Unit, wanted: Mapping[str, str]) -> Iterable[str]:
    """The most general pattern, of those around a unit, that says nothing false; else its modules."""
    for path in _around(unit):
        formats = {fmt for name, fmt in wanted.items() if f"{name}.".startswith(f"{path}.")}
        if formats == {wanted[unit.name]}:
            return (f"{path}.*",)
    return _exact(unit)


def _around(unit: Unit) -> Iterator[str]:
    """`model.layers.3`, then `model.layers.3.mlp`, and so on."""
    parts = unit.name.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
    for end in range(numbered + 1, len(parts)):
        yield ".".join(parts[:end])


def _exact(unit: Unit) -> tuple[str, ...]:
    """Patterns of this unit alone: `model.layers.3.self_attn.[kqv]_proj`, or a module each."""
    if unit.role == "experts":
        return (f"{unit.name}.*",)
    modules = [module_path(name) for name in unit.tensors]
    leaves = [module.rpartition(".")[2] for module in modules]
    heads, tails = {leaf[:1] for leaf in leaves}, {leaf[1:] for leaf in leaves}
    if len(modules) > 1 and len(tails) == 1:
        return (f"{modules[0].rpartition('.')[0]}.[{''.join(sorted(heads))}]{tails.pop()}",)
    return tuple(modules)


def _anywhere(name: str) -> str:
    """The name with its first number, the layer's, left open."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _differs(entries: Mapping[str, str], unit: Unit, wanted: Mapping[str, str]) -> bool:
    """Whether these entries give a tensor of the unit another format."""
    precision = parse_precision(entries)
    return any(str(precision.format_of(name)) != wanted[unit.name] for name in unit.tensors)
