"""`blockscale dequantize SRC DST`: block FP8 -> BF16, F16 or F32."""

from __future__ import annotations

from blockscale.cli import console, options
from blockscale.cli.conversion import print_report

_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def command(
    src: options.Src,
    dst: options.Dst,
    dtype: options.Dtype = options.DtypeChoice.bfloat16,
    on_missing_scale: options.OnMissingScale = options.KeepChoice.error,
    on_nonfinite: options.OnNonfinite = options.KeepChoice.error,
    workers: options.Workers = None,
    device: options.Device = options.DeviceChoice.auto,
    cluster: options.Cluster = None,
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Dequantize a block FP8 checkpoint, of any layout, and its weights of fewer than 8 bits."""
    from blockscale.checkpoint.convert import RunOptions, dequantize_checkpoint

    with console.progress(quiet=json) as progress:
        run = RunOptions(workers, device.value, overwrite, revision, cluster, progress)
        report = dequantize_checkpoint(
            src,
            dst,
            dtype=_SAFETENSORS_NAMES[dtype.value],
            on_missing_scale=on_missing_scale.value,
            on_nonfinite=on_nonfinite.value,
            run=run,
        )
    print_report(report, as_json=json)
