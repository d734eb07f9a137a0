"""Numbers as readers see them, and tensor names in short."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockscale.checkpoint.names import role_of
from blockscale.evaluate.windows import Estimate
from blockscale.formats import module_path

ROLES = {
    "attention": "attention",
    "dense_mlp": "dense MLP",
    "shared_experts": "shared experts",
    "experts": "experts",
    "mtp_projection": "MTP projection",
}
_LEAVES = (
    *("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "w1", "up_proj", "w3", "gate_up_proj", "down_proj", "w2"),
)


@dataclass(frozen=True, order=True)
class Kind:
    """The kind of a layer's weights, a column of heatmaps: role and last module name, in reading order."""

    order: tuple[int, int]
    role: str
    leaf: str

    @property
    def label(self) -> str:
        """`experts down_proj`; the leaf alone where it says enough."""
        plain = self.role in ("attention", "dense_mlp", self.leaf)
        return (
            self.leaf if plain else f"{ROLES.get(self.role, self.role).removesuffix(' experts')} {self.leaf}"
        )


def kind_of(name: str) -> Kind:
    """Kind of a weight, by its full name."""
    role, leaf = role_of(name), module_path(name).rpartition(".")[2]
    known = list(ROLES)
    place = known.index(role) if role in known else len(known)
    return Kind((place, _LEAVES.index(leaf) if leaf in _LEAVES else len(_LEAVES)), role, leaf)


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor or module is in, or None."""
    return next((int(segment) for segment in name.split(".") if segment.isdecimal()), None)


def short(name: str) -> str:
    """`12 down_proj` for `model.layers.12.mlp.down_proj.weight`, `3 experts 7 up_proj` for an expert's."""
    segments = module_path(name).split(".")
    layer = layer_of(name)
    behind = segments[segments.index(str(layer)) + 1 :] if str(layer) in segments else segments
    tail = behind[-1:] if "experts" not in behind else behind[behind.index("experts") :]
    shared = ["shared"] if "shared_expert" in name else []
    return " ".join([*([] if layer is None else [str(layer)]), *shared, *tail])


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits; a dash where nothing is known or nothing finite."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "-\N{INFINITY}"
    return f"{value:.{digits}g}"


def percent(share: float, digits: int = 3) -> str:
    """A share with so many decimals; none is called 0 that is not."""
    if share == 0:
        return "0 %"
    if 0 < 100 * share < 10.0**-digits:
        return f"< {10.0**-digits:g} %"
    return f"{100 * share:.{digits}f} %"


def interval(estimate: Estimate, digits: int) -> str:
    """`22.310 to 26.222`, the 95 % confidence interval."""
    if math.isnan(estimate.standard_error):
        return "too few for an interval"
    return f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


def label(text: str, most: int | None = None) -> str:
    """Text for a figure: Plotly reads tags and entities in labels, and names must not be taken for them.

    What is longer than `most` characters loses its middle, so that a name cannot take the room of the chart.
    """
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]}...{text[-(most // 2) :]}"
    return html.escape(text, quote=False).replace("\n", "<br>")


def spelled(value: Mapping[str, Any]) -> str:
    """JSON with an entry a line; long ones take several."""
    lines = (f"  {json.dumps(key)}: {_entry(each)}" for key, each in value.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _entry(value: object) -> str:
    line = json.dumps(value)
    return line if len(line) < 60 else json.dumps(value, indent=2).replace("\n", "\n  ")
