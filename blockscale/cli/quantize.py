"""`blockscale quantize SRC DST`: BF16, F16 or F32 -> block FP8."""

from __future__ import annotations

from blockscale.cli import console, options
from blockscale.cli.conversion import print_report
from blockscale.cli.plan import print_plan
from blockscale.cli.recipe import build_recipe


def command(
    src: options.Src,
    dst: options.Dst,
    scale_fmt: options.ScaleFmt = None,
    block_size: options.BlockSize = None,
    layout: options.Layout = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    precision: options.Precision = None,
    recipe_file: options.RecipeFile = None,
    on_nonfinite: options.OnNonfinite = options.KeepChoice.error,
    workers: options.Workers = None,
    device: options.Device = options.DeviceChoice.auto,
    cluster: options.Cluster = None,
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
    dry_run: bool = False,
    json: options.Json = False,
) -> None:
    """Quantize a checkpoint to block-scaled FP8.

    Interrupted or killed, the same command goes on where it was. Nothing appears at DST under its final name
    before it is complete.
    """
    from blockscale.checkpoint.convert import RunOptions, quantize_checkpoint
    from blockscale.checkpoint.sizing import plan_checkpoint

    recipe = build_recipe(recipe_file, scale_fmt, block_size, layout, include, exclude, precision)
    if dry_run:
        print_plan(plan_checkpoint(src, recipe, revision=revision), as_json=json)
        return
    with console.progress(quiet=json) as progress:
        run = RunOptions(workers, device.value, overwrite, revision, cluster, progress)
        report = quantize_checkpoint(src, dst, recipe, on_nonfinite=on_nonfinite.value, run=run)
    print_report(report, as_json=json)
