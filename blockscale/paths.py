"""Where things are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/blockscale`, or `~/.cache/blockscale`; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockscale"


def tuning_folder() -> Path:
    """Where `blockscale tune` writes its tables; it need not exist."""
    return cache_folder() / "tuning"
