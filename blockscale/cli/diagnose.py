"""`blockscale diagnose MODEL --against REF`: which tensors are to blame, and what to keep."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli import console, options

if TYPE_CHECKING:
    from blockscale.evaluate.diagnose import Diagnosis, TensorDiagnosis


_TITLES = ("KL nats", "output dB", "weight dB", "worst block dB", "outliers", "flushed", "tensor")


def command(
    model: options.Src,
    against: Annotated[str, typer.Option(help="The checkpoint that MODEL was made from.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text to measure predictions on; without it weights alone are looked at."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text.")] = 1024,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    show: Annotated[int, typer.Option(min=1, help="How many tensors are printed.")] = 20,
    recipe: Annotated[
        Path | None, typer.Option(help="Write a recipe for `quantize` that keeps the costliest.")
    ] = None,
    report: options.Report = None,
    json: options.Json = False,
) -> None:
    """Find what quantization did wrong, what it cost, and where.

    Exits with 1 if a tensor or the checkpoint has a fault.
    """
    from blockscale.evaluate.diagnose import diagnose_weights, measure_costs, rank
    from blockscale.evaluate.session import to_json
    from blockscale.evaluate.text import read_sequences
    from blockscale.model.text import Tokenizer
    from blockscale.report.ready import refuse_unready

    refuse_unready(report)
    with console.counting("weights", quiet=json) as count:
        problems, tensors = diagnose_weights(model, against, count)
    costs = []
    if prompts is not None:
        batch = read_sequences(str(prompts), Tokenizer(against), tokens, context)
        with console.counting("layers", quiet=json) as count:
            costs = measure_costs(model, against, batch, lambda _, total: count(total))
    result = rank(problems, tensors, costs)
    if recipe is not None:
        recipe.write_text(jsonlib.dumps({"exclude": list(result.keep)}, indent=2) + "\n", encoding="utf-8")
    if report is not None:
        from blockscale.report.page import write_page
        from blockscale.report.pages import diagnose_page

        write_page(diagnose_page(result, model, against), report)
    if json:
        print(to_json(result))
    else:
        _print(result, show)
    if any(tensor.at_fault for tensor in result.tensors) or any(
        problem.severity == "error" for problem in result.problems
    ):
        raise typer.Exit(1)


def _print(result: Diagnosis, show: int) -> None:
    if result.problems:
        console.print_problems(result.problems)
    shown: dict[object, list[TensorDiagnosis]] = {}
    for tensor in result.tensors:  # experts of a layer are measured together, and are one line
        shown.setdefault(tensor.cost or tensor.name, []).append(tensor)
    lines = [_cells(group) for group in list(shown.values())[:show]]
    widths = [max(map(len, column)) for column in zip(_TITLES, *lines, strict=True)]
    for line in (_TITLES, *lines):
        numbers = (cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False))
        console.out.print("  ".join((*numbers, line[-1])))
    for tensor in result.tensors:
        if tensor.at_fault:
            weight = tensor.weight
            said = [*tensor.problems]
            if weight is not None and weight.fault is not None:
                said.append(f"{weight.fault}: {weight.evidence}")
            console.out.print(f"fault: {tensor.name}: {'; '.join(said)}")
    if result.keep:
        share = f"{result.saved:.0%} of the KL divergence that single tensors cost"
        console.out.print(f"a recipe that keeps these saves {share}: {', '.join(result.keep)}")


def _cells(group: list[TensorDiagnosis]) -> list[str]:
    """A line of the table: the first of tensors that were measured together, and how many there are."""
    tensor = group[0]
    weight, cost = tensor.weight, tensor.cost
    name = tensor.name if len(group) == 1 else f"{tensor.name} and {len(group) - 1} more"
    cells = ["", ""] if cost is None else [f"{cost.kl:.2g}", f"{cost.output_sqnr_db:.1f}"]
    if weight is None:
        return [*cells, "", "", "", "", name]
    block = f"{weight.worst_sqnr_db:.1f} at {','.join(map(str, weight.worst_block))}"
    return [*cells, f"{weight.sqnr_db:.1f}", block, f"{weight.outliers:.3%}", f"{weight.flushed:.3%}", name]
