"""`blockscale quantize SRC DST`: BF16, F16 or F32 -> block FP8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.cli import console, options
from blockscale.cli.conversion import print_report
from blockscale.cli.plan import print_plan
from blockscale.cli.recipe import build_recipe, fitted
from blockscale.errors import BlockscaleError

if TYPE_CHECKING:
    from blockscale.checkpoint.rounded import Rounder


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
    calibrate: options.Calibrate = None,
    calibration_tokens: options.CalibrationTokens = None,
    on_nonfinite: options.OnNonfinite = options.KeepChoice.error,
    workers: options.Workers = None,
    device: options.Device = options.DeviceChoice.auto,
    cluster: options.Cluster = None,
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
    dry_run: bool = False,
    report_file: options.Report = None,
    json: options.Json = False,
) -> None:
    """Quantize a checkpoint to block-scaled FP8.

    Interrupted or killed, the same command goes on where it was. Nothing appears at DST under its final name
    before it is complete.
    """
    from blockscale.checkpoint.convert import RunOptions, quantize_checkpoint
    from blockscale.checkpoint.sizing import plan_checkpoint
    from blockscale.report.ready import refuse_unready

    refuse_unready(report_file)
    if dry_run and report_file is not None:
        raise BlockscaleError("a dry run makes nothing to report of", where="--report")
    if calibration_tokens is not None and not calibrate:
        raise BlockscaleError("nothing to calibrate on", where="--calibration-tokens", remedy="--calibrate")
    recipe = build_recipe(recipe_file, scale_fmt, block_size, layout, include, exclude, precision)
    recipe = fitted(recipe, recipe_file, src, revision)
    if dry_run:
        with console.progress(quiet=json) as progress:
            plan = plan_checkpoint(src, recipe, revision=revision, progress=progress)
        print_plan(plan, as_json=json)
        return
    rounder = _rounder(src, revision, calibrate, calibration_tokens, device) if calibrate else None
    with console.progress(quiet=json) as progress:
        run = RunOptions(workers, device.value, overwrite, revision, cluster, progress)
        report = quantize_checkpoint(
            src, dst, recipe, on_nonfinite=on_nonfinite.value, run=run, rounder=rounder
        )
    if report_file is not None:
        from blockscale.report.page import write_page
        from blockscale.report.pages import quantize_page

        write_page(quantize_page(report, revision), report_file)
    print_report(report, as_json=json)


def _rounder(
    src: str, revision: str | None, texts: list[str], tokens: int | None, device: options.DeviceChoice
) -> Rounder:
    """What rounds weights on calibration text; texts are read at once, so that a bad one is told of early."""
    from blockscale.checkpoint.lanes import usable_device
    from blockscale.checkpoint.source import open_source
    from blockscale.evaluate.text import read_text
    from blockscale.model.text import Tokenizer

    encode = Tokenizer(src, revision).encode  # first of all: it tells where transformers is missing
    from blockscale.calibrate.checkpoint import CalibratedRounder
    from blockscale.calibrate.text import SELF, Calibration

    read = tuple(text if text == SELF else read_text(text) for text in texts)
    calibration = Calibration(read, encode) if tokens is None else Calibration(read, encode, tokens)
    return CalibratedRounder(open_source(src, revision), calibration, usable_device(device.value))
