"""Kernels are compiled into a cache of the tests' own, keyed on their sources, so that none is ever stale.

Processes that share the tests (`pytest -n 2`) have a cache and one CPU thread each: numba writes the index of
a cache and what it points to one after the other, so two that compile at once could mix them up.

Without a GPU, Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported.
"""

import hashlib
import os
import signal
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # not where one process runs all tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from hypothesis import settings

TESTS = Path(__file__).parent
# Files that take longest: those that wait for processes of their own beside those that compute.
LONGEST = (
    *("checkpoint/test_cluster", "model/test_speculative", "ops/test_group", "model/test_ranks"),
    *("ops/test_rounding", "qat/test_train", "qat/test_gap", "ops/test_w4a8_gemm", "test_bench_671b"),
    *("ops/test_gemm", "ops/test_mla", "cli/test_errors", "calibrate/test_checkpoint", "report/test_browser"),
    *("checkpoint/test_resume", "qat/test_fake_quant", "calibrate/test_memory", "model/test_layouts"),
)

_OPS = TESTS.parent / "blockscale" / "ops"
_KEY = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_OPS.glob("_*.py")))).hexdigest()[:16]
_CACHE = f"blockscale-numba-{os.getuid()}-{_KEY}{os.environ.get('PYTEST_XDIST_WORKER', '')}"
os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / _CACHE)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("blockscale", deadline=None, derandomize=True)
settings.load_profile("blockscale")


def pytest_collection_modifyitems(items):
    """The longest files first: begun last, one of them would leave the other processes with nothing to do."""
    places = {TESTS / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
