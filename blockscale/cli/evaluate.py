"""`blockscale evaluate MODEL [--against REF]`: perplexity, KL divergence, agreement on a text; tasks."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli import console, options
from blockscale.cli.recipe import build_recipe
from blockscale.errors import BlockscaleError

if TYPE_CHECKING:
    from blockscale.checkpoint.recipe import Recipe
    from blockscale.evaluate.compare import WindowScore
    from blockscale.evaluate.run import Evaluation
    from blockscale.evaluate.tasks.questions import Tasks
    from blockscale.evaluate.windows import Estimate


_METRICS = ("perplexity", "kl", "top1", "tasks")
_OF_A_REFERENCE = ("kl", "top1")
_DATA = "wikitext2"


class RuntimeChoice(str, Enum):
    """Values of --runtime."""

    auto = "auto"
    blockscale = "blockscale"
    transformers = "transformers"


def command(
    model: options.Src,
    against: Annotated[
        str | None, typer.Option(help="Reference on the same tokens, as the checkpoint MODEL was made from.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar=",".join(_METRICS),
            help="What is measured and printed; by default all that the other options allow.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar=f"FILE|{_DATA}",
            help=f"Text (.xz and .bz2 too), or {_DATA} from the Hub, the default where no tasks are named.",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Only the first so many.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between the starts of windows; by default the context.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Tasks of lm-eval: mmlu, hellaswag, arc_challenge, gsm8k; from the Hub any other too.",
        ),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder with the tasks' data; by default it is taken from the Hub.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in a prompt; by default as many as lm-eval takes.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many windows, and questions of each task, spread evenly over it."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows or questions at a time.")] = 1,
    runtime: Annotated[
        RuntimeChoice, typer.Option(help="auto takes blockscale's own for DeepSeek-V2 and V3.")
    ] = RuntimeChoice.auto,
    compute: options.Compute = options.ComputeChoice.fp8,
    recipe: options.RecipeFile = None,
    scale_fmt: options.ScaleFmt = None,
    block_size: options.BlockSize = None,
    precision: options.Precision = None,
    dtype: Annotated[
        options.DtypeChoice | None,
        typer.Option(help="Of activations and unquantized weights; bfloat16 on a GPU, else float32."),
    ] = None,
    quantized_reference: Annotated[
        bool, typer.Option("--quantized-reference", help="The reference may be quantized itself.")
    ] = False,
    debug_gemm: options.DebugGemm = False,
    device: options.Device = options.DeviceChoice.auto,
    revision: options.Revision = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the result there as JSON; an interrupted run goes on.")
    ] = None,
    report: options.Report = None,
    json: options.Json = False,
) -> None:
    """Measure a model on a text and by tasks, and against a reference on the same, with 95 % intervals."""
    import torch

    from blockscale.evaluate.loading import Loading
    from blockscale.evaluate.run import Text, evaluate
    from blockscale.evaluate.session import to_json
    from blockscale.report.ready import refuse_unready

    refuse_unready(report)
    chosen = _chosen(metrics, against, data, tasks)
    asked = _asked(tasks, task_data, limit, shots)
    reads = chosen != ("tasks",)
    texts = [Text(data or _DATA, tokens, context, stride, limit)] if reads else []
    loading = Loading(
        runtime.value,
        device.value,
        None if dtype is None else getattr(torch, dtype.value),
        options.COMPUTE[compute],
        _recipe(recipe, scale_fmt, block_size, precision),
        revision,
        batch_size,
    )
    scored: list[WindowScore] = []

    def note(score: WindowScore, windows: int) -> None:
        scored.append(score)
        count(windows)

    steps = " and ".join([*(["windows"] if reads else []), *(["questions"] if asked else [])])
    with console.counting(steps, quiet=json) as count:
        result = evaluate(
            model,
            *texts,
            *asked,
            reference=against,
            loading=loading,
            quantized_reference=quantized_reference,
            debug_gemm=debug_gemm,
            out=out,
            on_window=note,
            on_question=lambda questions: count(len(scored) + questions),
        )
    if report is not None:
        from blockscale.report.page import write_page
        from blockscale.report.pages import evaluate_page

        write_page(evaluate_page(result, scored, revision), report)
    if json:
        print(to_json(result))
        return
    _print(result, chosen)
    if debug_gemm and not result.gemms:
        console.warn(("no FP8 GEMM ran: nothing was there to check",))


def _chosen(metrics: str | None, against: str | None, data: str | None, tasks: str | None) -> tuple[str, ...]:
    """What is measured, in the order it is printed."""
    if metrics is None:
        reads = data is not None or not tasks
        possible = {"perplexity": reads, "kl": reads and against, "top1": reads and against, "tasks": tasks}
        return tuple(name for name in _METRICS if possible[name])
    named = [name.strip() for name in metrics.split(",")]
    unknown = next((name for name in named if name not in _METRICS), None)
    if unknown is not None:
        expected = " | ".join(_METRICS)
        raise BlockscaleError("unknown metric", where="--metrics", expected=expected, got=repr(unknown))
    alone = next((name for name in named if name in _OF_A_REFERENCE), None) if against is None else None
    if alone is not None:
        raise BlockscaleError(
            f"{alone} needs a reference", where="--metrics", remedy="name it: --against REF"
        )
    if ("tasks" in named) != bool(tasks):
        what = "tasks are asked for and none is named" if not tasks else "tasks are named and not asked for"
        remedy = "name some: --tasks hellaswag" if not tasks else "add tasks to --metrics"
        raise BlockscaleError(what, where="--metrics", remedy=remedy)
    return tuple(name for name in _METRICS if name in named)


def _asked(tasks: str | None, data: Path | None, limit: int | None, shots: int | None) -> list[Tasks]:
    """The tasks that were named, or nothing."""
    from blockscale.evaluate.tasks.questions import Tasks, check_installed

    if tasks is None:
        given = "--task-data" if data is not None else "--shots" if shots is not None else None
        if given is not None:
            raise BlockscaleError("there are no tasks", where=given, remedy="name some: --tasks hellaswag")
        return []
    check_installed()
    names = tuple(name.strip() for name in tasks.split(","))
    return [Tasks(names, None if data is None else str(data), limit, shots)]


def _recipe(
    file: str | None,
    scale_fmt: options.ScaleFmtChoice | None,
    block_size: str | None,
    precision: list[str] | None,
) -> Recipe | None:
    """What is quantized as it is read, or None if no option says so."""
    if not (file or scale_fmt or block_size or precision):
        return None
    return build_recipe(file, scale_fmt, block_size, None, None, None, precision)


def _print(result: Evaluation, chosen: tuple[str, ...]) -> None:
    """A line of the text, and one of each figure that was chosen."""
    scores, text = result.scores, result.text
    if scores is not None and text is not None:
        windows = f"{scores.windows} windows of {text.context}, a new one every {text.stride}"
        console.out.print(f"{scores.tokens} tokens of {text.data} in {windows}")
        against = scores.against
        if "perplexity" in chosen:
            console.out.print(f"perplexity          {_interval(scores.perplexity)}  {result.model}")
        if "perplexity" in chosen and against is not None:
            console.out.print(f"                    {_interval(against.perplexity)}  {result.reference}")
            console.out.print(f"ratio               {_interval(against.ratio, 4)}  paired by windows")
        if "kl" in chosen and against is not None:
            console.out.print(f"KL divergence       {_interval(against.kl, 5)}  nats a token")
        if "top1" in chosen and against is not None:
            console.out.print(f"same likeliest      {_interval(against.top1, 4)}  share of tokens")
    _print_tasks(result)
    console.out.print("In brackets: 95 % confidence intervals.")
    if result.gemms:
        from blockscale.ops.gemm_audit_records import table

        console.out.print(table(result.gemms))


def _print_tasks(result: Evaluation) -> None:
    """A line of each metric; with a reference its own, and the difference."""
    width = max((len(f"{each.task} {each.metric}") for each in result.tasks), default=0) + 2
    width = max(width, 20)
    for each in result.tasks:
        name = f"{each.task} {each.metric}".ljust(width)
        taken = " of the same set" if each.shots_from_questions else ""
        asked = f"{each.questions} questions, {each.shots} shots{taken}"
        console.out.print(f"{name}{_interval(each.score, 4)}  {result.model}, {asked}")
        if each.reference is not None and each.difference is not None:
            console.out.print(f"{' ' * width}{_interval(each.reference, 4)}  {result.reference}")
            difference = _interval(each.difference, 4)
            console.out.print(f"{'  difference'.ljust(width)}{difference}  paired by questions")


def _interval(figure: Estimate, digits: int = 3) -> str:
    """`24.187 [22.310, 26.222]`."""
    if figure.low != figure.low:  # one window has no interval
        return f"{figure.value:.{digits}f} [one draw]"
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
