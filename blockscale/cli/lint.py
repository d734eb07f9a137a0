"""`blockscale lint DST --engine vllm|sglang|transformers`: what the engine would stumble over."""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from blockscale.cli import console, options

if TYPE_CHECKING:
    from blockscale.checkpoint.lint.finding import Finding

_MOST_OF_A_KIND = 4  # findings of one rule that are printed one by one
_STYLES = {"error": "red", "silent": "red", "warning": "yellow"}


class EngineChoice(str, Enum):
    """Values of --engine."""

    vllm = "vllm"
    sglang = "sglang"
    transformers = "transformers"


def command(
    dst: Annotated[str, typer.Argument(help="Checkpoint to check: folder, Hub repo id or fsspec URL.")],
    engine: Annotated[EngineChoice, typer.Option(help="The engine that is to load it.")],
    tp: Annotated[int, typer.Option(min=1, help="Ranks of tensor parallelism.")] = 1,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Check a checkpoint against an engine's loading rules, by its headers and config.json alone.

    An error stops the engine; what is silent loads and gives wrong values. Exits with 1 if there is either.
    """
    from blockscale.checkpoint.lint.run import lint_checkpoint

    found = lint_checkpoint(dst, engine.value, tp=tp, revision=revision)
    if json:
        console.print_json({**vars(found), "ok": found.ok})
    else:
        _print(found.findings)
        ranks = f" on {tp} ranks" if tp > 1 else ""
        verdict = "is loaded" if found.ok else "is NOT loaded as it was meant"
        console.out.print(f"{console.printable(found.source)} {verdict} by {engine.value}{ranks}")
    if not found.ok:
        raise typer.Exit(1)


def _print(findings: tuple[Finding, ...]) -> None:
    printed: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        kind = finding.severity, finding.rule
        printed[kind] += 1
        if printed[kind] <= _MOST_OF_A_KIND:
            text = console.printable(str(finding))
            console.out.print(Text(text, style=_STYLES[finding.severity]), soft_wrap=True)
    for (severity, rule), count in printed.items():
        if count > _MOST_OF_A_KIND:
            console.out.print(f"{count - _MOST_OF_A_KIND} more of {severity} [{rule}]; --json has them all")
