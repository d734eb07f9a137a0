"""The sections of a search: what could be had at which size, what was chosen, and what each unit costs.

All points that the search looked at go in; which of them are on the curve is found here: a point is on it if
no other one is as small and costs less, going by the predicted KL divergence.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockscale.report import figures
from blockscale.report.content import Chart, Facts, Note, Section, Table, View
from blockscale.report.figures import Axis
from blockscale.report.wording import ROLES, interval, number, short
from blockscale.search.costs import Cost
from blockscale.search.run import Point, SearchResult, UnitChoice
from blockscale.wording import size

_ROWS = 500
_BARS = 25
_CURVE, _MEASURED, _OTHERS, _CHOSEN = "curve, predicted", "measured", "other, predicted", "chosen"


def summary(result: SearchResult) -> Facts:
    """The chosen assignment: its size, and what it does to predictions."""
    chosen, measured = result.chosen, result.measured
    asked = "" if result.target_bytes is None else f", at most {size(result.target_bytes)} asked"
    entries = [
        ("size", size(chosen.nbytes), f"{chosen.label} of {size(result.source_bytes)}{asked}"),
        ("predicted KL", number(chosen.predicted_kl), "nats a token"),
    ]
    if measured is None:
        entries.append(("measured KL", number(None), "not measured"))
    else:
        entries += [
            ("measured KL, nats", f"{measured.kl.value:.5f}", interval(measured.kl, 5)),
            ("same likeliest token", f"{measured.top1.value:.4f}", interval(measured.top1, 4)),
        ]
    return Facts(tuple(entries))


def pareto(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in both size and predicted KL, the smallest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.nbytes, each.predicted_kl)):
        if not best or point.predicted_kl < best[-1].predicted_kl:
            best.append(point)
    return best


def curve_section(result: SearchResult) -> Section:
    """Size against KL divergence of what was looked at, and the point that was settled on."""
    chosen = result.chosen
    points = [*result.points, *([chosen] if chosen not in result.points else [])]
    curve = pareto(points)
    others = [each for each in points if each not in curve]
    unit, scale = ("GB", 1e9) if result.source_bytes >= 1e9 else ("MB", 1e6)

    def told(each: Point, kl: float | None) -> tuple[float, float, str]:
        return each.nbytes / scale, kl or 0.0, f"{size(each.nbytes)}, {number(kl)} nats\n{each.label}"

    series = {
        _CURVE: [told(each, each.predicted_kl) for each in curve],
        _MEASURED: [told(each, each.measured_kl) for each in points if each.measured_kl is not None],
        _OTHERS: [told(each, each.predicted_kl) for each in others],
        _CHOSEN: [told(chosen, chosen.predicted_kl)],
    }
    axes = Axis(f"size, {unit}"), Axis("KL divergence, nats a token")
    shown = {name: values for name, values in series.items() if values}
    drawn = figures.points(shown, *axes, joined=_CURVE)
    note = (
        "On the curve lies what no other point beats in both size and predicted KL divergence. Predicted is "
        f"the sum of what units cost one by one, on {result.sequences:,} sequences of {result.tokens:,} "
        "tokens."
    )
    rows = [
        (*_cells(each), "on the curve" * (each in curve), "chosen" * (each == chosen))
        for each in (*curve, *others)
    ]
    columns = ("what", "size", "predicted KL", "measured KL", "", "")
    table = Table("Points", columns, tuple(rows[:_ROWS]), (0, 4, 5), folded=len(rows) > 12)
    chart = Chart("Size against KL divergence", note, (View("all", drawn),))
    return Section("Pareto curve", (chart, table, *_left_out("Points", rows)))


def units_section(units: Sequence[UnitChoice]) -> Section:
    """How much of the model has which format, and the format of everything."""
    whole: dict[tuple[str, str], int] = {}
    for unit in units:
        place = ROLES.get(unit.role, unit.role), unit.format
        whole[place] = whole.get(place, 0) + unit.source_bytes
    shares = tuple((*place, size(nbytes)) for place, nbytes in sorted(whole.items()))
    rows = tuple((unit.name, unit.format, size(unit.source_bytes)) for unit in units[:_ROWS])
    return Section(
        "Formats",
        (
            Table("By role", ("role", "format", "size before"), shares, (0, 1)),
            Table("Every unit", ("what", "format", "size before"), rows, (0, 1), folded=True),
            *_left_out("Units", units),
        ),
    )


def costs_section(units: Sequence[UnitChoice]) -> Section | None:
    """What each unit alone costs, a view for each format; None if no unit's cost is known."""
    ranked = {
        name: sorted(_of_format(units, name), key=lambda pair: -pair[1].kl)
        for name in dict.fromkeys(cost.format for unit in units for cost in unit.costs)
    }
    if not ranked:
        return None
    views = tuple(View(name, _ranking(pairs[:_BARS])) for name, pairs in ranked.items())
    note = (
        f"The {min(_BARS, len(units))} costliest of {len(units)} units. "
        * (len(units) > 1)
        + "Mean KL divergence of the next token from the exact model's when this unit alone is quantized; in "
        "front of each stands the number of its layer."
    )
    rows = [
        (unit.name, cost.format, "chosen" * (cost.format == unit.format), *_figures(cost))
        for pairs in ranked.values()
        for unit, cost in pairs
    ]
    columns = ("unit", "format", "", "KL, nats", "measured", "output, dB", "size")
    table = Table("All units", columns, tuple(rows[:_ROWS]), (0, 1, 2), folded=True)
    chart = Chart("What each unit costs", note, views)
    return Section("Sensitivity", (chart, table, *_left_out("Costs", rows)))


def _of_format(units: Sequence[UnitChoice], name: str) -> list[tuple[UnitChoice, Cost]]:
    return [(unit, cost) for unit in units for cost in unit.costs if cost.format == name]


def _ranking(pairs: Sequence[tuple[UnitChoice, Cost]]) -> dict[str, object]:
    told = [
        f"{number(cost.kl)} nats in {cost.format}\n{unit.name}\nchosen: {unit.format}" for unit, cost in pairs
    ]
    names, values = [short(unit.name) for unit, _ in pairs], [cost.kl for _, cost in pairs]
    return figures.ranking(names, values, told, "nats a token")


def _figures(cost: Cost) -> tuple[str, str, str, str]:
    decibels = number(None) if cost.output_sqnr_db is None else f"{cost.output_sqnr_db:.1f}"
    return number(cost.kl), number(cost.measured_kl), decibels, size(cost.nbytes)


def _cells(each: Point) -> tuple[str, str, str, str]:
    return each.label, size(each.nbytes), number(each.predicted_kl), number(each.measured_kl)


def _left_out(what: str, rows: Sequence[object]) -> tuple[Note, ...]:
    """What a table that was cut says of it."""
    return (Note(f"{what}: the first {_ROWS} of {len(rows):,}; --json prints all."),) * (len(rows) > _ROWS)
