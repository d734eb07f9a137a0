"""`blockscale tune [MODEL | --shape N,K]`: measure what runs the GEMMs of a model fastest on this GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from blockscale.cli import console, options
from blockscale.cli.products import Products, parse_sizes, products_of
from blockscale.errors import BlockscaleError

if TYPE_CHECKING:
    from blockscale.ops.tuning_run import Outcome

_ROWS = ",".join(str(1 << power) for power in range(14))
_EXPERTS = 32  # on a GPU, where a model has more: expert parallelism spreads them


def command(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, Hub repo id, fsspec URL, or a config.json.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="N,K of a weight, instead of a model (repeatable).")
    ] = None,
    rows: Annotated[str, typer.Option(help="Rows M to tune for; rounded up to powers of two.")] = _ROWS,
    experts: Annotated[
        int | None,
        typer.Option(min=1, help="Experts on this GPU. With --shape: tune the grouped products instead."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Table to write to, instead of your own.")] = None,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Measure the FP8 GEMMs of a model on this GPU and write down what beats the built-in choice.

    Later calls on this GPU with these sizes take what the table says; no call ever measures.
    """
    from blockscale.ops import tuning, tuning_run, tuning_table

    sizes, buckets = parse_sizes(shape or ()), _parse_rows(rows)
    if (model is None) == (not sizes):
        raise BlockscaleError("give a model or --shape N,K, one of them", where="blockscale tune")
    device, gpu = tuning_run.find_gpu()
    if model is not None:
        found = products_of(model, revision)
        products = replace(found, experts=experts or min(_EXPERTS, found.experts))
    else:
        products = Products(sizes) if experts is None else Products((), sizes, experts)
    cases = tuning.cases(products.dense, products.grouped, products.experts, buckets)
    path = output or tuning_table.table_file(gpu)
    with _progress(len(cases), quiet=json) as show:
        outcomes = tuning_run.tune(cases, device, path, show)
    _print(outcomes, gpu, path, as_json=json)


def _parse_rows(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BlockscaleError("not a list of rows", where="--rows", expected="1,16,4096", got=repr(text))
    return [int(part) for part in parts]


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[Outcome], None]]:
    """Show each outcome on standard error as it is found: above a bar on a terminal, else a line each."""
    if quiet or not console.err.is_terminal:
        yield (lambda outcome: None) if quiet else (lambda outcome: console.err.print(_line(outcome)))
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("products"), TimeRemainingColumn())
    with Progress(*columns, console=console.err) as bar:
        task = bar.add_task("", total=total)

        def show(outcome: Outcome) -> None:
            bar.console.print(_line(outcome))
            bar.advance(task)

        yield show


def _line(outcome: Outcome) -> str:
    m, n, k = outcome.case.sizes
    measured = f"{outcome.heuristic_microseconds:.1f} -> {outcome.microseconds:.1f} us"
    return f"{_form(outcome)} N={n} K={k} M={m}: {measured}, {outcome.gain:.2f} x, {outcome.best}"


def _form(outcome: Outcome) -> str:
    from blockscale.ops.tuning import KINDS

    experts = outcome.case.experts
    return KINDS[outcome.case.op] + (f" E={experts}" if experts > 1 else "")


def _print(outcomes: tuple[Outcome, ...], gpu: str, path: Path, *, as_json: bool) -> None:
    better = [outcome for outcome in outcomes if outcome.worth_it]
    mean = math.exp(math.fsum(math.log(outcome.gain) for outcome in better) / len(outcomes))
    if as_json:
        console.print_json({"gpu": gpu, "table": str(path), "mean_gain": mean, "outcomes": outcomes})
        return
    table = Table()
    for heading in ("product", "N", "K", "M", "built-in", "tuned", "gain", "choice"):
        table.add_column(heading, justify="left" if heading in ("product", "choice") else "right")
    for outcome in better:
        m, n, k = outcome.case.sizes
        times = f"{outcome.heuristic_microseconds:.1f} us", f"{outcome.microseconds:.1f} us"
        row = _form(outcome), str(n), str(k), str(m), *times, f"{outcome.gain:.2f} x", str(outcome.best)
        table.add_row(*row)
    if better:
        console.out.print(table)
    console.out.print(f"{gpu}: a faster choice for {len(better)} of {len(outcomes)}, {mean:.3f} x over all")
    console.out.print(f"table: {path}")
