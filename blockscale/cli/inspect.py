"""`blockscale inspect SRC`: what is in a checkpoint, how it is quantized, what is wrong with it."""

from __future__ import annotations

from rich.table import Table

from blockscale.cli import console, options
from blockscale.group_spelling import spell_group_format
from blockscale.wording import size


def command(src: options.Src, revision: options.Revision = None, json: options.Json = False) -> None:
    """Show what a checkpoint holds by role and dtype, the quantization found, and problems."""
    from blockscale.checkpoint.inspect import inspect_checkpoint
    from blockscale.formats import spell_block_size

    found = inspect_checkpoint(src, revision=revision)
    if json:
        console.print_json(found)
        return
    model_type = console.printable(found.model_type)
    held = f"{found.parameters:,} parameters in {found.files} files"
    console.out.print(f"{found.source}: {model_type}, {held}")
    table = Table()
    for heading in ("role", "dtype", "tensors", "parameters", "size"):
        table.add_column(heading, justify="left" if heading in ("role", "dtype") else "right")
    for count in found.counts:
        numbers = f"{count.tensors:,}", f"{count.parameters:,}", size(count.nbytes)
        table.add_row(count.role, count.dtype, *numbers)
    table.add_section()
    table.add_row("total", "", "", f"{found.parameters:,}", size(found.nbytes))
    console.out.print(table)
    if not found.known_model_type:
        console.warn((f"model_type {found.model_type!r} is not known: roles are by name only",))
    quantization = found.quantization
    if quantization is None:
        console.out.print("quantization: none in config.json")
    else:
        block = ", ".join(map(spell_block_size, quantization.block_sizes))
        named = f"{quantization.layout} layout, blocks {block}, scale_fmt {quantization.fmt.scale_fmt}"
        for low in quantization.low:
            named += f", {spell_group_format(low.fmt)} for {len(low.targets)} targets"
        console.out.print(f"quantization: {named}, {len(quantization.skip)} modules on the skip list")
    if found.power_of_two_scales is not None and found.scales:
        console.out.print(
            f"scales: {found.power_of_two_scales} of {found.scales} tensors hold powers of two only"
        )
    console.print_problems(found.problems)
