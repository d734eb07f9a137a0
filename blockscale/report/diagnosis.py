"""Sections of a diagnosis: faults, where the noise is, what costs the most, outliers, the worst tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockscale.evaluate.diagnose import Diagnosis, TensorDiagnosis
from blockscale.report import figures
from blockscale.report.content import Chart, Charts, Facts, Note, Section, Table, View
from blockscale.report.figures import Axis, Grid
from blockscale.report.histogram import KINDS, WeightHistogram
from blockscale.report.wording import ROLES, kind_of, label, layer_of, number, percent, short

_ROWS = 500  # of a table; --json has all
_BARS = 25
_WORST = 6  # tensors whose histogram is drawn


@dataclass(frozen=True)
class _Measure:
    """A figure of tensors for the heatmap; None where it is not known."""

    title: str
    unit: str
    of: Callable[[TensorDiagnosis], float | None]
    log: bool = False
    low_is_worse: bool = True

    def badness(self, tensor: TensorDiagnosis) -> float:
        """Orders tensors, the worst with the largest."""
        value = self.of(tensor)
        return -math.inf if value is None else -value if self.low_is_worse else value


_MEASURES = (
    _Measure("KL divergence", "nats", lambda t: t.cost.kl if t.cost else None, log=True, low_is_worse=False),
    _Measure("SQNR of the output", "dB", lambda t: t.cost.output_sqnr_db if t.cost else None),
    _Measure("SQNR of the weight", "dB", lambda t: t.weight.sqnr_db if t.weight else None),
)


def summary(result: Diagnosis) -> Facts:
    """How many weights there are, what is wrong, and how noisy they are."""
    noise = sorted(tensor.weight.sqnr_db for tensor in result.tensors if tensor.weight is not None)
    faults = sum(tensor.at_fault for tensor in result.tensors)
    entries = [
        ("FP8 weights", f"{len(result.tensors):,}", ""),
        (
            "with a fault",
            f"{faults:,}",
            f"and {len(result.problems)} of the checkpoint" if result.problems else "",
        ),
    ]
    if noise:
        entries.append(
            ("SQNR of weights", f"{noise[len(noise) // 2]:.1f} dB", f"median; lowest {noise[0]:.1f} dB")
        )
    groups = _groups(result)
    if groups and groups[0][0].cost is not None:
        costs = [group[0].cost for group in groups if group[0].cost is not None]
        worst = max(costs, key=lambda cost: cost.kl)
        entries.append(("highest KL of one module", f"{worst.kl:.2g} nats", short(worst.name)))
    return Facts(tuple(entries))


def worst_names(result: Diagnosis) -> tuple[str, ...]:
    """The weights whose histograms are worth a look: the first of each group that has usable scales."""
    groups = [[tensor for tensor in group if tensor.weight is not None] for group in _groups(result)]
    return tuple(group[0].name for group in groups if group)[:_WORST]


def sections(result: Diagnosis, histograms: Sequence[WeightHistogram]) -> tuple[Section, ...]:
    """Everything there is to show of a diagnosis."""
    found = [_faults(result), _errors(result), _costs(result), _outliers(result), _histograms(histograms)]
    return tuple(section for section in found if section is not None)


def _groups(result: Diagnosis) -> list[list[TensorDiagnosis]]:
    """Tensors in their order, together where they were measured together."""
    groups: dict[object, list[TensorDiagnosis]] = {}
    for tensor in result.tensors:
        groups.setdefault(tensor.cost or tensor.name, []).append(tensor)
    return list(groups.values())


def _faults(result: Diagnosis) -> Section:
    rows = [("checkpoint", f"{each.where}: {each.message}") for each in result.problems]
    for tensor in result.tensors:
        rows += [(tensor.name, message) for message in tensor.problems]
        if tensor.weight is not None and tensor.weight.fault is not None:
            rows.append((tensor.name, f"{tensor.weight.fault}: {tensor.weight.evidence}"))
    if not rows:
        return Section("Faults", (Note("None: scales belong to their codes, and config.json to both."),))
    warning = Note(
        "A fault is repaired by quantizing again, not by keeping more in high precision.", warning=True
    )
    return Section("Faults", (warning, *_table("What is wrong", ("where", "what"), rows, (0, 1))))


def _errors(result: Diagnosis) -> Section | None:
    measures = [each for each in _MEASURES if any(each.of(tensor) is not None for tensor in result.tensors)]
    if not measures:
        return None
    views = tuple(
        View(
            each.title,
            figures.heatmap(_grid(result, each), each.unit, log=each.log, low_is_worse=each.low_is_worse),
        )
        for each in measures
    )
    note = (
        "A cell is one layer and one kind of weight; of several tensors, as the experts of a layer, it shows "
        "the worst. The yellower, the worse. KL divergence and SQNR of the output are of one quantized "
        "module in an otherwise exact model; the experts of a layer are one module."
    )
    return Section(
        "Errors by layer", (Chart("Errors by layer and kind of weight", note, views), *_weights(result))
    )


def _grid(result: Diagnosis, measure: _Measure) -> Grid:
    worst: dict[tuple[int | None, str], TensorDiagnosis] = {}
    for tensor in result.tensors:
        place = layer_of(tensor.name), kind_of(tensor.name).label
        if measure.of(tensor) is not None:
            worst[place] = max(worst.get(place, tensor), tensor, key=measure.badness)
    layers = sorted({layer for layer, _ in worst}, key=lambda layer: (layer is None, layer))
    kinds = list(dict.fromkeys(kind.label for kind in sorted({kind_of(t.name) for t in result.tensors})))
    kinds = [kind for kind in kinds if any((layer, kind) in worst for layer in layers)]
    cells = [[worst.get((layer, kind)) for kind in kinds] for layer in layers]
    return Grid(
        rows=tuple("none" if layer is None else str(layer) for layer in layers),
        columns=tuple(kinds),
        values=tuple(tuple(None if each is None else measure.of(each) for each in row) for row in cells),
        told=tuple(tuple("" if each is None else _said(each, measure) for each in row) for row in cells),
    )


def _said(tensor: TensorDiagnosis, measure: _Measure) -> str:
    value = measure.of(tensor)
    return f"{number(value)} {measure.unit}\n{tensor.name}"


def _weights(result: Diagnosis) -> tuple[Table | Note, ...]:
    columns = (
        *("tensor", "role", "KL, nats", "output, dB", "weight, dB", "worst block, dB", "block"),
        *("outliers", "saturated", "flushed", "largest value"),
    )
    rows = [_row(tensor) for tensor in result.tensors]
    return _table("Every weight, the worst first", columns, rows, (0, 1), folded=True)


def _row(tensor: TensorDiagnosis) -> tuple[str, ...]:
    weight, cost = tensor.weight, tensor.cost
    dash = number(None)
    costs = (dash, dash) if cost is None else (number(cost.kl), f"{cost.output_sqnr_db:.1f}")
    head = (tensor.name, ROLES.get(tensor.role, tensor.role), *costs)
    if weight is None:
        return (*head, *(dash,) * 7)
    block = ",".join(map(str, weight.worst_block))
    shares = (percent(share) for share in (weight.outliers, weight.saturated, weight.flushed))
    return (
        *head,
        f"{weight.sqnr_db:.1f}",
        f"{weight.worst_sqnr_db:.1f}",
        block,
        *shares,
        number(weight.amax),
    )


def _costs(result: Diagnosis) -> Section | None:
    costs = sorted({tensor.cost for tensor in result.tensors if tensor.cost is not None}, key=lambda c: -c.kl)
    if not costs:
        return None
    note = f"The {min(_BARS, len(costs))} costliest of {len(costs)} modules. " * (len(costs) > 1) + (
        "Mean KL divergence of the next token from the exact model's when this module alone is quantized; "
        "in front of each stands the number of its layer."
    )
    shown = costs[:_BARS]
    told = [f"{number(cost.kl)} nats\n{cost.name}" for cost in shown]
    bars = figures.ranking(
        [short(cost.name) for cost in shown], [cost.kl for cost in shown], told, "nats a token"
    )
    rows = [(cost.name, number(cost.kl), f"{cost.output_sqnr_db:.1f}") for cost in costs]
    table = _table("All modules", ("module", "KL, nats", "output, dB"), rows, folded=True)
    parts = (Chart("What each module costs", note, (View("KL", bars),)), *table)
    if result.keep:
        kept = (
            f"{len(result.keep)} modules saves {result.saved:.0%} of the KL divergence that single ones cost"
        )
        parts = (*parts, Note(f"Keeping {kept}; the recipe for it is below."))
    return Section("Sensitivity", parts)


def _outliers(result: Diagnosis) -> Section | None:
    most: dict[tuple[int | None, str], TensorDiagnosis] = {}
    for tensor in result.tensors:
        place = layer_of(tensor.name), kind_of(tensor.name).label
        if tensor.weight is not None:
            most[place] = max(most.get(place, tensor), tensor, key=_outlier_share)
    if not most:
        return None
    series: dict[str, list[tuple[float, float, str]]] = {}
    for tensor in most.values():
        if tensor.weight is not None:
            told = f"{percent(tensor.weight.outliers)}, {tensor.weight.sqnr_db:.1f} dB\n{tensor.name}"
            point = (100 * tensor.weight.outliers, tensor.weight.sqnr_db, told)
            series.setdefault(ROLES.get(tensor.role, tensor.role), []).append(point)
    axes = Axis("outliers, % of values"), Axis("SQNR of the weight, dB")
    note = (
        "Outliers are beyond six times the root mean square. Of each layer and kind of weight, the tensor "
        "with the largest share of them."
    )
    chart = Chart("Outliers and noise", note, (View("outliers", figures.points(series, *axes)),))
    ranked = sorted(most.values(), key=lambda tensor: -_outlier_share(tensor))
    rows = [
        (
            tensor.name,
            percent(tensor.weight.outliers),
            number(tensor.weight.amax),
            f"{tensor.weight.sqnr_db:.1f}",
        )
        for tensor in ranked
        if tensor.weight is not None
    ]
    columns = ("tensor", "outliers", "largest value", "weight, dB")
    return Section("Outliers", (chart, *_table("Most outliers", columns, rows, folded=True)))


def _outlier_share(tensor: TensorDiagnosis) -> float:
    return -1.0 if tensor.weight is None else tensor.weight.outliers


def _histograms(histograms: Sequence[WeightHistogram]) -> Section | None:
    if not histograms:
        return None
    note = Note(
        "Values divided by the scale of their block, in powers of two, coloured by the FP8 (E4M3) code that "
        "they became. The ticks below are the magnitudes that there are codes for. Values left of the first "
        "line become 0, and those beyond the last one 448, the largest; with float32 scales the largest "
        "value of each block is there, and that is normal. The scale of shares is logarithmic."
    )
    charts = tuple(
        Chart(
            short(each.name) if layer_of(each.name) is None else f"Layer {short(each.name)}",
            f"{percent(each.share('flushed'))} became 0, {percent(each.share('saturated'))} 448: {each.name}",
            (View(label(each.name), figures.histogram(each)),),
        )
        for each in histograms
    )
    shares = [
        (each.name, f"{each.values:,}", *(percent(each.share(kind)) for kind in KINDS), f"{each.zeros:,}")
        for each in histograms
    ]
    columns = ("tensor", "values", *KINDS, "zeros in the source")
    return Section("Worst tensors", (note, Charts(charts), *_table("Shares of codes", columns, shares)))


def _table(
    title: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    words: tuple[int, ...] = (0,),
    *,
    folded: bool = False,
) -> tuple[Table | Note, ...]:
    """A table, and what is left out of it."""
    table = Table(title, columns, tuple(rows[:_ROWS]), words, folded)
    if len(rows) <= _ROWS:
        return (table,)
    return table, Note(f"{title}: the first {_ROWS} of {len(rows):,} rows; --json prints all.")
