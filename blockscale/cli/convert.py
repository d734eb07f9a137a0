"""`blockscale convert SRC DST --mp N`: a Hugging Face folder -> the shards of DeepSeek's inference folder."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from blockscale.cli import console, options
from blockscale.cli.conversion import print_report


class RaggedChoice(str, Enum):
    """Values of --on-ragged-split."""

    refuse = "refuse"
    requantize = "requantize"


def command(
    src: Annotated[str, typer.Argument(help="Local folder of a DeepSeek-V2 or V3 checkpoint, FP8 or not.")],
    dst: options.Dst,
    mp: Annotated[int, typer.Option("--mp", min=1, help="Ranks to divide it over; 1 only renames.")],
    mtp: Annotated[bool, typer.Option(help="Keep the layer of multi-token prediction.")] = True,
    on_ragged_split: Annotated[
        RaggedChoice, typer.Option(help="FP8 weights that do not divide by blocks: refuse, or requantize.")
    ] = RaggedChoice.refuse,
    workers: options.Workers = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Divide a checkpoint into model{rank}-mp{N}.safetensors, one file a rank.

    Every file is read back before it counts. Interrupted or killed, the same command goes on where it was.
    """
    from blockscale.checkpoint.convert import RunOptions
    from blockscale.checkpoint.shard import shard_checkpoint

    with console.progress(quiet=json) as progress:
        run = RunOptions(workers, overwrite=overwrite, progress=progress)
        report = shard_checkpoint(src, dst, mp, mtp=mtp, on_ragged_split=on_ragged_split.value, run=run)
    print_report(report, as_json=json)
