"""Whether a report can be made at the end, asked before the work starts; needs none of the extra itself."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

from blockscale.errors import BlockscaleError

_NEEDED = ("plotly", "jinja2")


def refuse_unready(path: Path | None) -> None:
    """Say now what would keep a report from being written hours later.

    Args:
        path: where it is to go, replacing a file of that name; None where no report is wanted.

    Raises:
        BlockscaleError: a package of the extra `report` is missing, or no file can be written there.
    """
    if path is None:
        return
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            remedy = "pip install 'blockscale[report]'"
            raise BlockscaleError(f"needs the package {name}", where="--report", remedy=remedy) from error
    if path.is_dir():
        raise BlockscaleError("is a folder", where=path, expected="a file name, as report.html")
    if not path.parent.is_dir():
        raise BlockscaleError(
            "no such folder", where=path.parent, remedy="make it, or name another for --report"
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise BlockscaleError(f"cannot be written: {error.strerror}", where=path) from error
