"""`blockscale plan SRC|config.json`: sizes before and after, by role and per GPU; nothing is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from blockscale.cli import console, options
from blockscale.cli.recipe import build_recipe, fitted
from blockscale.wording import size

if TYPE_CHECKING:
    from blockscale.checkpoint.sizing import SizePlan

# Input rate assumed for the time estimate: a plain SSD that reads BF16 while half as many bytes are written.
_ASSUMED_RATE = 0.4


def command(
    src: Annotated[str, typer.Argument(help="Checkpoint folder, Hub repo id, fsspec URL, or a config.json.")],
    scale_fmt: options.ScaleFmt = None,
    block_size: options.BlockSize = None,
    layout: options.Layout = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    precision: options.Precision = None,
    recipe_file: options.RecipeFile = None,
    tp: Annotated[int, typer.Option(min=1, help="GPUs of the tensor-parallel group.")] = 1,
    ep: Annotated[
        int | None, typer.Option(min=1, help="GPUs the experts are spread over; as --tp by default.")
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0.001, help="GB of input a second, for the time estimate.")
    ] = _ASSUMED_RATE,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Plan sizes, memory per GPU and time, from headers or from a config.json alone.

    Only with --block-size auto the weights are read too.
    """
    from blockscale.checkpoint.sizing import Parallelism, plan_checkpoint

    recipe = build_recipe(recipe_file, scale_fmt, block_size, layout, include, exclude, precision)
    recipe = fitted(recipe, recipe_file, src, revision)
    parallelism = Parallelism(tp, ep)
    with console.progress(quiet=json) as progress:
        plan = plan_checkpoint(
            src, recipe, parallelism=parallelism, rate=rate * 1e9, revision=revision, progress=progress
        )
    print_plan(plan, as_json=json)


def print_plan(plan: SizePlan, *, as_json: bool) -> None:
    """Print a size plan."""
    console.warn(plan.warnings)
    if as_json:
        console.print_json(plan)
        return
    model_type = console.printable(plan.model_type)
    console.out.print(f"{plan.source}: {model_type}, {plan.parameters:,} parameters")
    table = Table()
    for heading in ("role", "tensors", "quantized", "before", "after"):
        table.add_column(heading, justify="left" if heading == "role" else "right")
    for role in plan.roles:
        sizes = size(role.before), size(role.after)
        table.add_row(role.role, f"{role.tensors:,}", f"{role.quantized:,}", *sizes)
    table.add_section()
    totals = (sum(role.tensors for role in plan.roles), sum(role.quantized for role in plan.roles))
    table.add_row("total", *(f"{n:,}" for n in totals), size(plan.before), size(plan.after))
    console.out.print(table)
    saved = 1 - plan.after / plan.before if plan.before else 0.0
    console.out.print(f"{plan.before:,} -> {plan.after:,} tensor bytes, {saved:.1%} saved")
    if plan.mtp_after:
        rest = plan.after - plan.mtp_after
        console.out.print(f"of these {plan.mtp_after:,} in the MTP module, {rest:,} without it")
    gpus = f"TP {plan.parallelism.tensor}, EP {plan.parallelism.expert or plan.parallelism.tensor}"
    console.out.print(f"weights on each GPU ({gpus}): {size(plan.per_gpu)}; KV cache comes on top")
    if plan.seconds is not None and plan.rate is not None:
        assumed = f"at {size(plan.rate)}/s of input"
        console.out.print(f"estimated time: {console.seconds(plan.seconds)} {assumed} (--rate)")
    console.print_block_sizes(plan.block_sizes)
    console.print_group_formats(plan.group_formats)
    for reason, count in plan.kept.items():
        console.out.print(f"kept: {count:,} tensors, {reason}")
