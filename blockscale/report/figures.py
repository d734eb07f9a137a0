"""Plotly figures of a report, as plain `data` and `layout`.

Colours of series are those of Okabe and Ito, at a lightness that stands out on white and on near black;
heatmaps have Cividis: both are told apart with any colour vision. Text, grid and background take the colours
of the page when a figure is drawn there, so that no figure says them. Axes are fixed: a finger that moves
over a chart scrolls the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from blockscale.report.histogram import KINDS, LOW, STEPS, WeightHistogram, grid
from blockscale.report.wording import label, number
from blockscale.wording import size

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2b83c6", "#d98e04", "#00916a", "#d55e00", "#b5679a", "#8b9099"
_SERIES = (BLUE, GREY, ORANGE, GREEN, PURPLE, RED)
_FORMATS, _OTHERS = {"FP8": BLUE, "scales": ORANGE, "BF16": GREY}, (GREEN, PURPLE, RED)
_KIND_COLOURS = {"flushed": RED, "subnormal": ORANGE, "normal": BLUE, "saturated": PURPLE}
_LAST = math.log2(448)
_ZONES = ("to 0", "subnormal", "normal", "448")  # of |value / scale|, by what code is the nearest
_LONGEST = 28  # characters of a label at an axis or in a legend
_SHARES = [10.0**power for power in range(-10, 1)]


@dataclass(frozen=True)
class Axis:
    """What an axis is of: its title, and which way it counts."""

    title: str = ""
    log: bool = False
    down: bool = False


@dataclass(frozen=True)
class Grid:
    """Values of a heatmap.

    Attributes:
        rows, columns: what stands at the sides.
        values: one for each row and column; None where there is nothing.
        told: what is said of each.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    told: tuple[tuple[str, ...], ...]


def bars(
    names: Sequence[Sequence[str]], parts: Mapping[str, Sequence[float]], told: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Stacked bars of bytes.

    Args:
        names: outer and inner names of the bars, from the top.
        parts: series -> length of its part of each bar.
        told: series -> what is said of each part.
    """
    both = [[label(name, _LONGEST) for name in level] for level in names]
    data = [
        go.Bar(
            y=both,
            x=list(values),
            orientation="h",
            name=label(series, _LONGEST),
            marker={"color": _FORMATS.get(series) or _OTHERS[place % len(_OTHERS)]},
            customdata=[label(text) for text in told[series]],
            hovertemplate="%{customdata}<extra></extra>",
        )
        for place, (series, values) in enumerate(parts.items())
    ]
    ticks, words = _byte_ticks(max((sum(each) for each in zip(*parts.values(), strict=True)), default=0))
    figure = _figure(data, Axis(), Axis(down=True), 90 + 26 * len(both[0]), margin_left=0)
    figure["layout"] |= {"barmode": "stack", "bargap": 0.25, "showlegend": True}
    figure["layout"]["xaxis"] |= {"tickvals": ticks, "ticktext": words}
    return figure


def heatmap(cells: Grid, unit: str, *, log: bool, low_is_worse: bool) -> dict[str, Any]:
    """Layers down, kinds of weights across; the worse a value, the more yellow it is."""
    known = [value for row in cells.values for value in row if value is not None and math.isfinite(value)]
    least = min((value for value in known if value > 0), default=1.0)
    values = [
        [None if value is None else math.log10(max(value, least)) if log else value for value in row]
        for row in cells.values
    ]
    bar: dict[str, Any] = {"title": {"text": unit, "side": "top"}, "thickness": 10, "outlinewidth": 0}
    bar |= {"orientation": "h", "y": 1, "yanchor": "bottom", "len": 1, "ypad": 10, "xpad": 0}
    if log:
        span = range(math.floor(math.log10(least)), math.ceil(math.log10(max([*known, least]))) + 1)
        bar |= {"tickvals": list(span), "ticktext": [f"1e{power}" for power in span]}
    trace = go.Heatmap(
        x=[label(name, _LONGEST) for name in cells.columns],
        y=[label(name) for name in cells.rows],
        z=values,
        customdata=[[label(text) for text in row] for row in cells.told],
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale="Cividis",
        reversescale=low_is_worse,
        colorbar=bar,
        xgap=1,
        ygap=1,
    )
    figure = _figure([trace], Axis(), Axis("layer", down=True), 230 + 18 * len(cells.rows))
    figure["layout"]["xaxis"] |= {"type": "category", "tickangle": -60, "showgrid": False}
    figure["layout"]["yaxis"] |= {"type": "category", "showgrid": False}
    return figure


def histogram(weight: WeightHistogram) -> dict[str, Any]:
    """Values by log2 |w / s|, coloured by what became of them, over the magnitudes that E4M3 has."""
    used = [b for kind in weight.counts for b, many in enumerate(kind) if many]
    bins = range(min([*used, (-14 - LOW) * STEPS]), max([*used, (10 - LOW) * STEPS - 1]) + 1)
    total = max(1, weight.values)
    data: list[Any] = []
    for kind, counts in zip(KINDS, weight.counts, strict=True):
        filled = [b for b in bins if counts[b]]
        data.append(
            go.Bar(
                x=[LOW + (b + 0.5) / STEPS for b in filled],
                y=[counts[b] / total for b in filled],
                width=1 / STEPS,
                name=kind,
                marker={"color": _KIND_COLOURS[kind], "line": {"width": 0}},
                customdata=[f"{kind}: {number(100 * counts[b] / total)} %<br>{_bin(b)}" for b in filled],
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    magnitudes = grid()
    ticks = go.Scatter(
        x=[math.log2(magnitude) for magnitude in magnitudes],
        y=[0] * len(magnitudes),
        yaxis="y2",
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 10, "color": GREY, "line": {"width": 1}},
        customdata=[f"{magnitude:g}" for magnitude in magnitudes],
        hovertemplate="code %{customdata}<extra></extra>",
    )
    figure = _figure([*data, ticks], Axis("log2 |value / scale|"), Axis("values, %", log=True), 280)
    layout = figure["layout"] | {"barmode": "overlay", "bargap": 0}
    first, last = LOW + bins.start / STEPS, LOW + bins.stop / STEPS
    layout["xaxis"] |= {"range": [first, last], "dtick": 4, "tick0": 0, "tickangle": 0, "anchor": "y2"}
    layout["yaxis"] |= {
        "domain": [0.1, 1],
        "tickvals": _SHARES,
        "ticktext": [f"{100 * s:g}" for s in _SHARES],
    }
    layout["yaxis2"] = {"domain": [0, 0.06], "range": [-1, 1], "visible": False, "fixedrange": True}
    # Boundaries of the kinds of codes, each with its name in its place.
    edges = (first, -10.0, -6.0, _LAST, last)
    layout["shapes"] = [_line(edge) for edge in edges[1:-1]]
    middles = ((low + high) / 2 for low, high in pairwise(edges))
    layout["annotations"] = [_above(x, text) for x, text in zip(middles, _ZONES, strict=True)]
    return figure | {"layout": layout}


def ranking(names: Sequence[str], values: Sequence[float], told: Sequence[str], unit: str) -> dict[str, Any]:
    """Bars from the largest value down."""
    numbers = list(range(len(names)))  # two modules may have one short name
    trace = go.Bar(
        y=numbers,
        x=list(values),
        orientation="h",
        marker={"color": BLUE},
        customdata=[label(text) for text in told],
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure = _figure([trace], Axis(unit), Axis(down=True), 70 + 20 * len(names))
    figure["layout"] |= {"bargap": 0.25}
    figure["layout"]["yaxis"] |= {"tickvals": numbers, "ticktext": [label(name, _LONGEST) for name in names]}
    return figure


def points(
    series: Mapping[str, Sequence[tuple[float, float, str]]], across: Axis, up: Axis, *, joined: str = ""
) -> dict[str, Any]:
    """Points (x, y, what is said of it) of several series; the one called `joined` has a line through it."""
    data = [
        go.Scatter(
            x=[x for x, _, _ in values],
            y=[y for _, y, _ in values],
            mode="lines+markers" if name == joined else "markers",
            name=label(name, _LONGEST),
            marker={"color": _SERIES[place % len(_SERIES)], "symbol": place, "size": 8, "opacity": 0.85},
            customdata=[label(text) for _, _, text in values],
            hovertemplate="%{customdata}<extra></extra>",
        )
        for place, (name, values) in enumerate(series.items())
    ]
    figure = _figure(data, across, up, 380)
    figure["layout"]["showlegend"] = len(series) > 1
    return figure


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], across: Axis, up: Axis, levels: Mapping[str, float]
) -> dict[str, Any]:
    """Lines through points (x, y) of several series, and horizontal ones at the levels; named in a legend."""
    data = [
        go.Scatter(
            x=[x for x, _ in values],
            y=[y for _, y in values],
            mode="lines+markers" if len(values) < 60 else "lines",
            name=label(name, _LONGEST),
            line={"color": _SERIES[place % len(_SERIES)], "width": 1.5},
            marker={"size": 5},
            hovertemplate=f"%{{x}}: %{{y:.5g}}<extra>{label(name, _LONGEST)}</extra>",
        )
        for place, (name, values) in enumerate(series.items())
    ]
    first, last = (pick(x for values in series.values() for x, _ in values) for pick in (min, max))
    for place, (name, level) in enumerate(levels.items(), len(series)):
        data.append(
            go.Scatter(
                x=[first, last],
                y=[level, level],
                mode="lines",
                name=label(name, _LONGEST),
                line={"color": _SERIES[place % len(_SERIES)], "width": 1.5, "dash": "dash"},
                hovertemplate=f"%{{y:.5g}}<extra>{label(name, _LONGEST)}</extra>",
            )
        )
    figure = _figure(data, across, up, 320)
    figure["layout"]["showlegend"] = len(data) > 1
    return figure


def course(
    places: Sequence[float],
    values: Sequence[float],
    mean: tuple[float, float, float],
    titles: tuple[str, str],
) -> dict[str, Any]:
    """Values along a text, with their mean and its interval (mean, low, high; NaN where there is none)."""
    trace = go.Scatter(
        x=list(places),
        y=list(values),
        mode="lines+markers" if len(values) < 400 else "lines",
        line={"color": BLUE, "width": 1.5},
        marker={"size": 5},
        customdata=[
            f"from token {place:g}: {number(each)}" for place, each in zip(places, values, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure = _figure([trace], Axis(titles[0]), Axis(titles[1]), 300)
    figure["layout"]["yaxis"] |= {"rangemode": "tozero"}
    middle, low, high = mean
    side = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "layer": "below", "line": {"width": 0}}
    shapes = [{**side, "type": "line", "y0": middle, "y1": middle, "line": {"color": ORANGE, "width": 2}}]
    if not math.isnan(low):
        shapes.append({**side, "y0": low, "y1": high, "fillcolor": ORANGE, "opacity": 0.2})
    figure["layout"]["shapes"] = shapes
    return figure


def _line(x: float) -> dict[str, Any]:
    line = {"color": GREY, "width": 1, "dash": "dash"}
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def _above(x: float, text: str) -> dict[str, Any]:
    return {"x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "text": text, "showarrow": False}


def _bin(b: int) -> str:
    return f"2^{LOW + b / STEPS:g} to 2^{LOW + (b + 1) / STEPS:g}"


def _byte_ticks(most: float) -> tuple[list[float], list[str]]:
    """Up to five round numbers of bytes from 0 on; Plotly would count giga as G, which is no unit."""
    if most <= 0:
        return [0.0], [size(0)]
    step = 10.0 ** math.floor(math.log10(most / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (step * factor) <= 4)
    ticks = [step * number for number in range(int(most / step) + 1)]
    return ticks, [f"{tick:.0f} B" if tick == 0 else _round_size(tick) for tick in ticks]


def _round_size(nbytes: float) -> str:
    value, _, unit = size(nbytes).partition(" ")
    return f"{float(value):g} {unit}"


def _figure(data: list[Any], across: Axis, up: Axis, height: int, margin_left: int = 8) -> dict[str, Any]:
    """Checked by Plotly's own rules, and without its template, which would be most of the text."""
    axes = [
        {
            "title": {"text": axis.title, "standoff": 6},
            "type": "log" if axis.log else "-",
            "automargin": True,
            "fixedrange": True,
            "zeroline": False,
            **({"autorange": "reversed"} if axis.down else {}),
        }
        for axis in (across, up)
    ]
    layout = go.Layout(
        height=height,
        margin={"l": margin_left, "r": 8, "t": 24, "b": 8},
        xaxis=axes[0],
        yaxis=axes[1],
        dragmode=False,
        hovermode="closest",
        showlegend=False,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
    )
    drawn = go.Figure(data, layout).to_plotly_json()
    drawn["layout"].pop("template", None)
    return dict(drawn)
