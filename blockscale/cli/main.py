"""`blockscale`: the command line. One small file a subcommand; errors are one line and exit code 2."""

from __future__ import annotations

import typer

from blockscale.cli import (
    console,
    convert,
    dequantize,
    diagnose,
    evaluate,
    generate,
    inspect,
    lint,
    plan,
    quantize,
    search,
    train,
    tune,
    verify,
)
from blockscale.errors import BlockscaleError
from blockscale.version import __version__

app = typer.Typer(
    help="Block-scaled FP8 models: quantize, dequantize, convert, verify, lint, inspect, plan, generate, "
    "evaluate, diagnose, search, train, tune.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS = (
    *(quantize, dequantize, convert, verify, lint, inspect, plan),
    *(generate, evaluate, diagnose, search, train, tune),
)
for module in _COMMANDS:
    app.command(module.__name__.rpartition(".")[2])(module.command)

# Typer carries its own copy of click since 0.26 and used the real one before; this finds the class in either.
_ClickException = typer.BadParameter.__mro__[2]

# What typer since 0.26 returns after Ctrl-C; before, it raised Abort.
_INTERRUPTED = 130


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _global(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never shows a traceback for what a user can cause.

    Args:
        arguments: instead of those of the process.
    """
    try:
        code = app(arguments, standalone_mode=False)
    except BlockscaleError as error:
        console.fail(str(error), 2)
    except _ClickException as error:  # type: ignore[misc]
        # Called without a command, typer shows the help and raises an error without a text.
        console.fail(error.format_message() or "no command given", 2)
    except (typer.Abort, KeyboardInterrupt):
        console.interrupted()
    if code == _INTERRUPTED:
        console.interrupted()
    raise SystemExit(code or 0)
