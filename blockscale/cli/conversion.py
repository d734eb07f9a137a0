"""What `quantize`, `dequantize` and `convert` print when they are done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.cli import console
from blockscale.wording import size

if TYPE_CHECKING:
    from blockscale.checkpoint.convert import ConversionReport


def print_report(report: ConversionReport, *, as_json: bool) -> None:
    """Print the outcome of a conversion."""
    console.warn(report.warnings)
    if as_json:
        console.print_json(report)
        return
    if report.already_complete:
        console.out.print(f"{report.destination} is complete already: nothing to do")
        return
    sizes = f"{size(report.input_bytes)} -> {size(report.output_bytes)}"
    rate = size(report.input_bytes / report.seconds)
    console.out.print(f"{_done(report)}: {sizes} in {console.seconds(report.seconds)} ({rate}/s)")
    console.print_block_sizes(report.block_sizes)
    if report.resumed_shards:
        console.out.print(
            f"{report.resumed_shards} of {report.shards} shards were finished by an earlier run"
        )
    console.out.print(f"result: {report.destination}")


def _done(report: ConversionReport) -> str:
    copied, requantized = report.tensors.get("copy", 0), report.tensors.get("requantize", 0)
    if report.command == "convert":
        also = f", {requantized} of them requantized" if requantized else ""
        return f"divided {copied + requantized} tensors over {report.shards} ranks{also}"
    done = "quantized" if report.command == "quantize" else "dequantized"
    return f"{done} {report.tensors.get(report.command, 0)} tensors, copied {copied}"
