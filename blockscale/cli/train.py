"""`blockscale train MODEL DATA --recipe w4a8`: train a checkpoint through its rounding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from blockscale.cli import console, options
from blockscale.cli.recipe import build_recipe, fitted

if TYPE_CHECKING:
    from blockscale.checkpoint.recipe import Recipe
    from blockscale.qat import Check, QatOptions, Step, TrainingResult

_UNQUANTIZED = "none"
_LINES = 10.0  # seconds between lines where there is no terminal
_RECENT = 20  # steps whose mean loss is shown


class ScalesChoice(str, Enum):
    """Values of --scales."""

    dynamic = "dynamic"
    frozen = "frozen"
    learned = "learned"


class ActivationsChoice(str, Enum):
    """Values of --activations."""

    fp8 = "fp8"
    high = "high"


class ProductsChoice(str, Enum):
    """Values of --compute."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    fp8 = "fp8"


def command(
    model: options.Src,
    data: Annotated[Path, typer.Argument(help="Text to train on, UTF-8 (.xz and .bz2 too).")],
    recipe: Annotated[
        str,
        typer.Option(
            help="As of quantize: fp8, w4a8, mxfp4a8, budget:SIZE or a JSON file. none trains the model as it"
            " is, to compare with."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result; by default MODEL-RECIPE in this folder.")
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Learn the predictions of this model, not the next token."),
    ] = None,
    initial: Annotated[
        str | None,
        typer.Option(help="Begin with codes and scales of this checkpoint of the same recipe (calibrated)."),
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step, on all processes together.")] = 16,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at a time on a device; all of its own by default.")
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate; falls as a cosine to zero.")] = 2e-5,
    scale_lr: Annotated[float, typer.Option(help="Of learned scales, in octaves.")] = 1e-3,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which rates rise.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    scales: Annotated[
        ScalesChoice,
        typer.Option(help="dynamic: from the largest values, at every step."),
    ] = ScalesChoice.dynamic,
    activations: Annotated[
        ActivationsChoice, typer.Option(help="high: for engines that quantize weights alone.")
    ] = ActivationsChoice.fp8,
    compute: Annotated[
        ProductsChoice, typer.Option(help="Of products; auto: bfloat16 on a GPU, else float32.")
    ] = ProductsChoice.auto,
    train_router: Annotated[
        bool, typer.Option("--train-router", help="Routers of experts train too; by default they do not.")
    ] = False,
    freeze: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Parameters that do not train (repeatable).")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations again instead of keeping them.")
    ] = False,
    eval_data: Annotated[
        str | None, typer.Option(metavar="FILE|wikitext2", help="Text to measure perplexity on meanwhile.")
    ] = None,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between measurements.")] = 100,
    eval_windows: Annotated[int, typer.Option(min=1, help="Windows of it, spread evenly.")] = 64,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saves.")] = 200,
    masters: Annotated[
        Path | None, typer.Option(help="Folder for the trained weights in float32, for verify --against.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    overwrite: options.Overwrite = False,
    scale_fmt: options.ScaleFmt = None,
    block_size: options.BlockSize = None,
    layout: options.Layout = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    precision: options.Precision = None,
    device: options.Device = options.DeviceChoice.auto,
    report: options.Report = None,
    json: options.Json = False,
) -> None:
    """Train a model through the rounding with which its checkpoint is stored.

    Killed at any moment, the same command with --resume goes on from the last save. Started by torchrun, the
    processes share the model and every batch (FSDP2).
    """
    from blockscale.evaluate.session import to_json
    from blockscale.model.launch import open_ranks
    from blockscale.qat import RunLimits, Training, train
    from blockscale.report.ready import refuse_unready

    refuse_unready(report)
    chosen = _recipe(
        recipe,
        model,
        build_recipe(
            None if recipe == _UNQUANTIZED else recipe,
            scale_fmt,
            block_size,
            layout,
            include,
            exclude,
            precision,
        ),
    )
    out = out or Path(f"{Path(model).name}-{Path(recipe).stem.replace(':', '-')}")
    with open_ranks(device.value) as ranks, console.log(ranks.rank):
        training = Training(
            model=model,
            data=data,
            recipe=chosen,
            qat=_qat(scales, activations, compute, ranks.device.type),
            distill=distill,
            initial=initial,
            steps=max_steps,
            batch=batch,
            context=context,
            lr=lr,
            scale_lr=scale_lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            train_router=train_router,
            freeze=tuple(freeze or ()),
            check_data=eval_data,
            check_windows=eval_windows,
        )
        limits = RunLimits(micro_batch, checkpointing, save_every, eval_every, resume, overwrite, masters)
        quiet = json or ranks.rank > 0
        with _watching(max_steps, quiet=quiet) as watch:
            result = train(training, out, limits, ranks=ranks, on_entry=watch)
        if ranks.rank:
            return
        if report is not None:
            from blockscale.report.page import write_page
            from blockscale.report.pages import train_page

            write_page(train_page(result), report)
    print(to_json(result)) if json else _print(result)


def _recipe(name: str, model: str, built: Recipe) -> Recipe | None:
    return None if name == _UNQUANTIZED else fitted(built, name, model, None)


def _qat(
    scales: ScalesChoice, activations: ActivationsChoice, compute: ProductsChoice, device: str
) -> QatOptions:
    import torch

    from blockscale.qat import QatOptions

    if compute is ProductsChoice.auto:
        compute = ProductsChoice.bfloat16 if device == "cuda" else ProductsChoice.float32
    products: torch.dtype | Literal["fp8"] = (
        "fp8" if compute is ProductsChoice.fp8 else getattr(torch, compute.value)
    )
    return QatOptions(scales.value, activations.value, compute=products)


@contextmanager
def _watching(steps: int, *, quiet: bool) -> Iterator[Callable[[Step | Check], None]]:
    """What shows steps and checks as they come: a bar on a terminal, else lines; checks always are lines."""
    from blockscale.qat import Check

    if quiet:
        yield lambda entry: None
        return
    recent: list[float] = []
    printed = time.monotonic()
    with console.bar(steps) as advance:

        def show(entry: Step | Check) -> None:
            nonlocal printed
            if isinstance(entry, Check):
                console.err.print(f"step {entry.step}: perplexity {entry.perplexity:.3f}")
                return
            recent.append(entry.loss)
            del recent[:-_RECENT]
            told = f"loss {sum(recent) / len(recent):.4f}"
            if advance is not None:
                advance(entry.step, told)
            elif time.monotonic() - printed >= _LINES or entry.step == steps:
                printed = time.monotonic()
                console.err.print(f"{entry.step}/{steps} steps, {told}")

        yield show


def _print(result: TrainingResult) -> None:
    from blockscale.qat.history import MORE_THAN_ALL

    first, last = result.steps[0], result.steps[-1]
    out = console.out
    taken = console.seconds(result.seconds)
    out.print(f"{len(result.steps)} steps in {taken}: loss {first.loss:.4f} -> {last.loss:.4f}")
    if result.reference is not None and result.checks:
        before, after = result.checks[0], result.checks[-1]
        out.print(f"perplexity  {result.reference.perplexity:.3f}  {result.training['model']}")
        if result.training["recipe"] is not None:
            out.print(f"            {before.perplexity:.3f}  rounded before training")
        out.print(f"            {after.perplexity:.3f}  trained")
        if result.recovered > 0:
            closed = f"{result.recovered:.0%} of the gap is closed"
            out.print(f"            {MORE_THAN_ALL if result.recovered > 1 else closed}")
    out.print(f"{result.out}: written")
