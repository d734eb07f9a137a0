"""Which matrix products a model computes with FP8 weights: the sizes that `blockscale tune` measures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockscale.errors import BlockscaleError

if TYPE_CHECKING:
    from blockscale.checkpoint.decide import Signature

Size = tuple[int, int]


@dataclass(frozen=True)
class Products:
    """Weights (N, K) of a model.

    Attributes:
        dense: of linear layers, each by itself and as engines merge them: q/k/v, gate/up, q_a/kv_a.
        grouped: of one routed expert, gate and up merged.
        experts: routed experts of a layer.
    """

    dense: tuple[Size, ...]
    grouped: tuple[Size, ...] = ()
    experts: int = 1


def parse_sizes(texts: Iterable[str]) -> tuple[Size, ...]:
    """Weights from the command line, each as `N,K`.

    Raises:
        BlockscaleError: not two positive integers.
    """
    found = []
    for text in texts:
        parts = text.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
            raise BlockscaleError("not a shape", where="--shape", expected="N,K", got=repr(text))
        found.append((int(parts[0]), int(parts[1])))
    return tuple(found)


def products_of(src: str, revision: str | None = None) -> Products:
    """The products of a checkpoint (folder, Hub id, URL; only headers are read) or of a config.json.

    Weights that are FP8 count, or, where none is, those that quantizing would make so.

    Raises:
        BlockscaleError: no checkpoint there, or one without such a weight.
    """
    from blockscale.checkpoint.decide import FP8, decide_quantize
    from blockscale.checkpoint.families import family_of
    from blockscale.checkpoint.recipe import Recipe

    config, tensors = _read(src, revision)
    names = [name for name, (dtype, _) in tensors.items() if dtype == FP8]
    if not names:
        decisions = decide_quantize(tensors, config, Recipe()).by_name
        names = [name for name, decision in decisions.items() if decision.action == "quantize"]
    swapped = family_of(config).expert_layout == "kn"
    return merged({name: tensors[name][1] for name in names}, swapped=swapped)


def merged(shapes: Mapping[str, tuple[int, ...]], *, swapped: bool = False) -> Products:
    """The products of weights by name; `swapped`: fused experts are (E, K, N) rather than (E, N, K)."""
    from blockscale.checkpoint.names import sharing_groups

    fused = [shape for shape in shapes.values() if len(shape) == 3]
    grouped = {(k, n) if swapped else (n, k) for _, n, k in fused}
    dense: set[Size] = set()
    # All experts of a layer share one precision. By another name, they only share what is one product.
    single = {name.replace(".experts.", ".expert."): s for name, s in shapes.items() if len(s) == 2}
    groups = sharing_groups(single)
    alone = single.keys() - {name for group in groups for name in group}
    for members in (*groups, *((name,) for name in alone)):
        sizes = [(n, k) for n, k in (single[name] for name in members)]
        whole = sum(n for n, _ in sizes), sizes[0][1]
        if ".expert." in members[0]:
            grouped.add(whole)
        else:
            dense |= {whole, *sizes}
    numbered = (re.search(r"\.experts\.(\d+)\.", name) for name in shapes)
    experts = max((1, *(e for e, _, _ in fused), *(int(found[1]) + 1 for found in numbered if found)))
    return Products(_usable(dense), _usable(grouped), experts)


def _usable(sizes: Iterable[Size]) -> tuple[Size, ...]:
    """Those of `sizes` that FP8 kernels take."""
    return tuple(sorted((n, k) for n, k in sizes if n % 16 == 0 and k % 16 == 0))


def _read(src: str, revision: str | None) -> tuple[dict[str, Any], Mapping[str, Signature]]:
    from blockscale.checkpoint.index import read_index
    from blockscale.checkpoint.model_config import parse_config, read_config, without_quantization
    from blockscale.checkpoint.plan import signatures
    from blockscale.checkpoint.shapes import parameters_of
    from blockscale.checkpoint.source import open_source

    if os.path.isfile(src):
        folder, name = os.path.split(os.path.abspath(src))
        config = without_quantization(parse_config(open_source(folder).read(name), src))
        return config, parameters_of(config)
    source = open_source(src, revision)
    return read_config(source), signatures(read_index(source))
