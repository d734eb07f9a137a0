"""Kernels are compiled into a cache of the tests' own, keyed on their sources, so that none is ever stale.

Without a GPU, Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported.
"""

import hashlib
import os
import signal
import tempfile
from pathlib import Path

import torch
from hypothesis import settings

_OPS = Path(__file__).parent.parent / "blockscale" / "ops"
_KEY = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_OPS.glob("_*.py")))).hexdigest()[:16]
os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"blockscale-numba-{os.getuid()}-{_KEY}")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("blockscale", deadline=None, derandomize=True)
settings.load_profile("blockscale")
