"""Where things are kept between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/blockscale`, or `~/.cache/blockscale`; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockscale"


def replace_file(path: Path, content: bytes) -> None:
    """Write a file at once or not at all, in place of the one that is there; makes the folder if needed.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read it
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def tuning_folder() -> Path:
    """Where `blockscale tune` writes its tables; it need not exist."""
    return cache_folder() / "tuning"
