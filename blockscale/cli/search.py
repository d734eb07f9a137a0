"""`blockscale search MODEL --target-size 0.7x --prompts FILE`: a format for every weight, and its recipe."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli import console, options
from blockscale.errors import BlockscaleError

if TYPE_CHECKING:
    from blockscale.search.run import Point, SearchResult

_SHOWN = 9  # points of the trade-off that are printed


def command(
    model: options.Src,
    prompts: Annotated[Path, typer.Option(help="Text to measure predictions on.")],
    target_size: Annotated[
        str | None, typer.Option(help="Of all tensors: a share of MODEL's, as 0.7x, or bytes, as 350GB.")
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(help="Share of tokens, measured, whose likeliest next one has to stay MODEL's: 0.95."),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Most KL divergence from MODEL, predicted, nats a token.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text.")] = 1024,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    formats: Annotated[
        str | None,
        typer.Option(
            help="To choose from besides bf16: fp8,fp8:64x64,...; by default what the layout mixes."
        ),
    ] = None,
    layout: options.Layout = None,
    scale_fmt: options.ScaleFmt = None,
    block_size: options.BlockSize = None,
    recipe_out: Annotated[Path | None, typer.Option(help="Write the recipe for `quantize --recipe`.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure the result, and points beside it, as a whole.")
    ] = False,
    dtype: Annotated[
        options.DtypeChoice, typer.Option(help="Of activations and weights that are not quantized.")
    ] = options.DtypeChoice.float32,
    device: options.Device = options.DeviceChoice.auto,
    revision: options.Revision = None,
    report: options.Report = None,
    json: options.Json = False,
) -> None:
    """Choose each weight's format, so that the KL divergence from MODEL is smallest at a size.

    Without a target size, the smallest size with the KL divergence and accuracy that are asked for.
    """
    import torch

    from blockscale.cli.recipe import build_recipe
    from blockscale.evaluate.loading import Loading
    from blockscale.evaluate.session import to_json
    from blockscale.evaluate.text import read_sequences
    from blockscale.model.text import Tokenizer
    from blockscale.report.ready import refuse_unready
    from blockscale.search.goals import Goal
    from blockscale.search.run import search
    from blockscale.search.space import open_space

    refuse_unready(report)
    if recipe_out is not None and not recipe_out.parent.is_dir():
        raise BlockscaleError("no such folder", where=recipe_out.parent, remedy="make it first")
    goal = Goal(target_size, max_kl, min_accuracy)
    base = build_recipe(None, scale_fmt, block_size, layout, None, None, None)
    names = tuple(name.strip() for name in formats.split(",")) if formats else ()
    space = open_space(model, base, names, revision)
    loading = Loading("transformers", device.value, getattr(torch, dtype.value), revision=revision)
    ids = read_sequences(str(prompts), Tokenizer(model, revision), tokens, context)
    with console.counting("measurements", quiet=json) as count:
        result = search(space, goal, ids, loading=loading, measured=measure, on_format=count)
    if recipe_out is not None:
        recipe_out.write_text(jsonlib.dumps(result.recipe, indent=2) + "\n", encoding="utf-8")
    if report is not None:
        from blockscale.report.page import write_page
        from blockscale.report.pages import search_page

        write_page(search_page(result), report)
    console.warn(result.warnings)
    if json:
        print(to_json(result))
    else:
        _print(result)


def _print(result: SearchResult) -> None:
    out, chosen = console.out, result.chosen
    out.print(f"{result.sequences} sequences of {result.tokens} tokens")
    counts: dict[str, int] = {}
    for unit in result.units:
        counts[unit.format] = counts.get(unit.format, 0) + unit.source_bytes
    total = sum(counts.values())
    shares = ", ".join(f"{name} {nbytes / total:.1%}" for name, nbytes in sorted(counts.items()))
    out.print(f"chosen: {chosen.nbytes:,} of {result.source_bytes:,} bytes, {chosen.label}: {shares}")
    bound = "" if result.bound_kl is None else f"; none of that size below {result.bound_kl:.4g}"
    out.print(f"predicted KL {chosen.predicted_kl:.4g} nats a token{bound}")
    if result.measured is not None:
        kl, top1 = result.measured.kl, result.measured.top1
        times = f"{result.measured.calibration:.2f} times what was predicted"
        out.print(f"measured KL  {kl.value:.4g} [{kl.low:.4g}, {kl.high:.4g}], {times}")
        out.print(f"same likeliest {top1.value:.4f} [{top1.low:.4f}, {top1.high:.4f}], share of tokens")
    out.print("trade-off:   size  predicted   measured")
    for point in _some(result):
        measured = "" if point.measured_kl is None else f"{point.measured_kl:.4g}"
        out.print(f"{point.label:>17}  {point.predicted_kl:>9.4g}  {measured:>9}".rstrip())
    out.print(f"recipe: {jsonlib.dumps(result.recipe)}")


def _some(result: SearchResult) -> list[Point]:
    """Points that were measured, and others evenly between."""
    points = result.points
    step = max(1, len(points) // _SHOWN)
    last = len(points) - 1
    return [
        point
        for number, point in enumerate(points)
        if point.measured_kl is not None or number % step == 0 or number == last
    ]
