"""Which modules an engine leaves unquantized by the skip list of config.json: each has its own way to look.

    vLLM          a full module path; experts by any entry that contains the path of their layer's experts
    SGLang        whole segments of a path, anywhere in it; w4afp8 has no skip list at all
    transformers  a regular expression from the start up to a segment's end, or the end of the path

In compressed-tensors an entry of `ignore` is a full module path or an expression behind "re:", for all three.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from blockscale.compressed_tensors import ALL_LINEARS

Engine = Literal["vllm", "sglang", "transformers"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang", "transformers")
# (skip list entry, module path) -> whether the entry names the module.
Match = Callable[[str, str], bool]


def skip_entries(engine: Engine, entry: dict[str, Any]) -> tuple[str, ...]:
    """The skip list that an engine reads out of a `quantization_config`."""
    method = entry.get("quant_method")
    if method == "compressed-tensors":
        return _strings(entry.get("ignore"))
    if engine == "sglang" and method == "w4afp8":
        return ()
    ignored, kept = entry.get("ignored_layers"), entry.get("modules_to_not_convert")
    if engine != "transformers":
        return _strings(ignored) or _strings(kept)
    found = ignored if kept is None else kept
    # Where nothing is said it leaves the output head alone, but not where there is a list without it.
    return ("lm_head",) if found is None else _strings(found)


def matcher(engine: Engine, method: object) -> Match:
    """How an engine compares an entry with a module path."""
    if method == "compressed-tensors":
        return _exact_or_expression
    return {"vllm": _exact, "sglang": _segments, "transformers": _prefix_or_suffix}[engine]


def group_targets(entry: dict[str, Any]) -> frozenset[str]:
    """What the config groups of a `quantization_config` name; other methods are about every linear layer."""
    groups = entry.get("config_groups")
    if entry.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict):
        return frozenset({ALL_LINEARS})
    schemes = (each for each in groups.values() if isinstance(each, dict))
    return frozenset(target for each in schemes for target in _strings(each.get("targets")))


def is_targeted(targets: frozenset[str], module: str) -> bool:
    """Whether one of the targets names a linear layer."""
    return ALL_LINEARS in targets or any(_exact_or_expression(target, module) for target in targets)


def first_match(match: Match, entries: Sequence[str], module: str) -> str | None:
    """The entry that names a module, or None."""
    return next((entry for entry in entries if match(entry, module)), None)


def _exact(entry: str, module: str) -> bool:
    if entry == module or "experts" not in entry:
        return entry == module
    experts = re.match(r"(.*\.experts)\.\d+\.", module)
    return experts is not None and experts[1] in entry


def _segments(entry: str, module: str) -> bool:
    return f".{entry}." in f".{module}."


def _prefix_or_suffix(entry: str, module: str) -> bool:
    try:
        found = re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module)
    except re.error:
        return module.endswith(entry)
    return found is not None or module.endswith(entry)


def _exact_or_expression(entry: str, module: str) -> bool:
    if not entry.startswith("re:"):
        return entry == module
    try:
        return re.match(entry.removeprefix("re:"), module) is not None
    except re.error:
        return False


def _strings(value: object) -> tuple[str, ...]:
    return tuple(each for each in value if isinstance(each, str)) if isinstance(value, list) else ()
