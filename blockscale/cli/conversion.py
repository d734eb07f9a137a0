"""What `quantize`, `dequantize` and `convert` print when they are done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockscale.cli import console
from blockscale.wording import size

if TYPE_CHECKING:
    from blockscale.checkpoint.convert import ConversionReport

_MOST_NAMED = 4  # layers, and experts of each, in a line


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
    console.print_group_formats(report.group_formats)
    if report.calibrated:
        console.out.print(_calibrated(report))
    if default := report.input_scales.get("default"):
        line = f"input scales of {default:,} expert weights are 1.0, not calibrated"
        console.out.print(f"{line}: their inputs are cast to FP8 as they are and saturate at 448")
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


def _calibrated(report: ConversionReport) -> str:
    """How many weights were calibrated, and which experts saw too few tokens to be."""
    line = f"calibrated {report.calibrated:,} weights"
    if report.calibration_tokens:
        line += f" on {report.calibration_tokens:,} tokens"
    starved = [each for each in report.calibrated_experts if each.plain]
    if not starved:
        return line
    count, needed = sum(len(each.plain) for each in starved), max(each.needed for each in starved)
    where = [f"layer {each.layer}: {_few(each.plain, 'expert')}" for each in starved[:_MOST_NAMED]]
    rest = "; ..." if len(starved) > _MOST_NAMED else ""
    experts = "expert saw" if count == 1 else "experts saw"
    were = "was" if count == 1 else "were"
    plainly = f"{count:,} {experts} fewer than {needed:,} tokens and {were} rounded plainly"
    return f"{line}; {plainly} ({'; '.join(where)}{rest})"


def _few(numbers: tuple[int, ...], noun: str) -> str:
    """`expert 2`, or `experts 2, 9, 11, 17, ...`."""
    named = ", ".join(map(str, numbers[:_MOST_NAMED]))
    return f"{noun}{'s' if len(numbers) > 1 else ''} {named}{', ...' if len(numbers) > _MOST_NAMED else ''}"
