"""`blockscale verify DST [--against SRC]`: read every byte back."""

from __future__ import annotations

from typing import Annotated

import typer

from blockscale.cli import console, options
from blockscale.wording import size


def command(
    dst: Annotated[str, typer.Argument(help="Checkpoint to verify: folder, Hub repo id or fsspec URL.")],
    against: Annotated[str | None, typer.Option(help="The checkpoint it was converted from.")] = None,
    workers: options.Workers = None,
    json: options.Json = False,
) -> None:
    """Verify a checkpoint: checksums, scales, codes, config, and the values against their source.

    Exits with 1 if a problem was found.
    """
    from blockscale.checkpoint.verify import verify_checkpoint

    with console.progress(quiet=json) as progress:
        result = verify_checkpoint(dst, against, workers=workers, progress=progress)
    if json:
        console.print_json({**vars(result), "ok": result.ok, "relative_error": result.relative_error})
    else:
        console.out.print(f"{result.tensors} tensors read back, {size(result.nbytes)}")
        sums = (
            "no manifest, so no checksums"
            if result.checksums is None
            else f"{result.checksums} checksums compared"
        )
        console.out.print(sums)
        if result.compared is not None:
            console.out.print(f"{result.compared} tensors compared with {against}")
        if result.errors:
            worst = result.errors[0]
            mean = f"relative error of quantized weights {result.relative_error:.3%} (root mean square)"
            console.out.print(f"{mean}, worst {worst.relative:.3%} in {worst.name}")
        if result.calibrated:
            console.out.print(f"{result.calibrated} weights calibrated, not rounded to the nearest code")
        console.print_problems(result.problems)
        console.out.print("OK" if result.ok else "NOT OK")
    if not result.ok:
        raise typer.Exit(1)
