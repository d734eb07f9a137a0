"""Kernels are compiled into a cache of the tests' own, keyed on their sources, so that none is ever stale."""

import hashlib
import os
import tempfile
from pathlib import Path

from hypothesis import settings

_OPS = Path(__file__).parent.parent / "blockscale" / "ops"
_KEY = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_OPS.glob("_*.py")))).hexdigest()[:16]
os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"blockscale-numba-{os.getuid()}-{_KEY}")

settings.register_profile("blockscale", deadline=None, derandomize=True)
settings.load_profile("blockscale")
