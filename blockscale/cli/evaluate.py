"""`blockscale evaluate MODEL [--against REF]`: perplexity, KL divergence and agreement on a text."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockscale.cli import console, options

if TYPE_CHECKING:
    from blockscale.evaluate.run import Evaluation
    from blockscale.evaluate.windows import Estimate


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
    data: Annotated[
        str, typer.Option(help="Text file (.xz and .bz2 too), or wikitext2 from the Hub.")
    ] = "wikitext2",
    tokens: Annotated[int | None, typer.Option(min=2, help="Only the first so many.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between the starts of windows; by default the context.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many windows, spread evenly over the text.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    runtime: Annotated[
        RuntimeChoice, typer.Option(help="auto takes blockscale's own for DeepSeek-V2 and V3.")
    ] = RuntimeChoice.auto,
    compute: options.Compute = options.ComputeChoice.fp8,
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
    json: options.Json = False,
) -> None:
    """Measure a model on a text, and against a reference on the same tokens, with 95 % intervals."""
    import torch

    from blockscale.checkpoint.precision import parse_precision
    from blockscale.evaluate.run import Text, evaluate
    from blockscale.evaluate.session import to_json
    from blockscale.evaluate.subjects import Loading

    loading = Loading(
        runtime.value,
        device.value,
        None if dtype is None else getattr(torch, dtype.value),
        options.COMPUTE[compute],
        parse_precision(precision or ()),
        revision,
        batch_size,
    )
    with console.counting("windows", quiet=json) as count:
        result = evaluate(
            model,
            Text(data, tokens, context, stride, limit),
            reference=against,
            loading=loading,
            quantized_reference=quantized_reference,
            debug_gemm=debug_gemm,
            out=out,
            on_window=lambda _, windows: count(windows),
        )
    if json:
        print(to_json(result))
        return
    _print(result)
    if debug_gemm and not result.gemms:
        console.warn(("no FP8 GEMM ran: nothing was there to check",))


def _print(result: Evaluation) -> None:
    """A line of the text, and one of each figure."""
    scores, text = result.scores, result.text
    windows = f"{scores.windows} windows of {text.context}, a new one every {text.stride}"
    console.out.print(f"{scores.tokens} tokens of {text.data} in {windows}")
    console.out.print(f"perplexity          {_interval(scores.perplexity)}  {result.model}")
    against = scores.against
    if against is not None:
        console.out.print(f"                    {_interval(against.perplexity)}  {result.reference}")
        console.out.print(f"ratio               {_interval(against.ratio, 4)}  paired by windows")
        console.out.print(f"KL divergence       {_interval(against.kl, 5)}  nats a token")
        console.out.print(f"same likeliest      {_interval(against.top1, 4)}  share of tokens")
    console.out.print("In brackets: 95 % confidence intervals.")
    if result.gemms:
        from blockscale.ops.gemm_audit_records import table

        console.out.print(table(result.gemms))


def _interval(figure: Estimate, digits: int = 3) -> str:
    """`24.187 [22.310, 26.222]`."""
    if figure.standard_error != figure.standard_error:  # one window has no interval
        return f"{figure.value:.{digits}f} [one window]"
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
