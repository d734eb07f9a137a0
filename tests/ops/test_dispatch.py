"""Choice of the backend, what is said about it, and the checks at the public boundary."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from blockscale import ops, reference
from blockscale.errors import BlockscaleError
from blockscale.ops import dispatch
from blockscale.testing import data
from blockscale.testing.asserts import assert_quantized_equal


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    dispatch._load.cache_clear()
    dispatch._say_once.cache_clear()
    yield
    dispatch._load.cache_clear()
    dispatch._say_once.cache_clear()


def test_without_numba_the_reference_is_used_and_that_is_said_once(without_numba, caplog):
    x = data.gaussian((200, 300))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            quantized = ops.quantize_weight(x)
            ops.dequantize_weight(*quantized)
    assert_quantized_equal(quantized, reference.quantize_weight(x))
    (record,) = caplog.records
    assert "numba cannot be imported" in record.message
    assert "plain PyTorch, same results" in record.message


def test_nothing_is_said_where_the_reference_was_asked_for(without_numba, caplog):
    ops.quantize_weight(data.gaussian((20, 30)), backend="reference")
    assert not caplog.records


def test_asking_for_numba_without_it_is_an_error(without_numba):
    with pytest.raises(BlockscaleError, match=r"backend numba is not available .*cannot be imported"):
        ops.quantize_weight(data.gaussian((20, 30)), backend="numba")


@pytest.mark.parametrize(
    ("machine", "features", "reason"),
    [
        ("x86_64", {"avx2": True, "f16c": False}, "lacks f16c"),
        ("riscv64", {}, "no kernels for the processor riscv64"),
    ],
)
def test_a_processor_without_the_features_gets_the_reference(monkeypatch, machine, features, reason):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: features)
    kernels, why = dispatch._load.__wrapped__()
    assert kernels is None
    assert reason in why


def test_switched_off_compilation_gets_the_reference(monkeypatch):
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    kernels, why = dispatch._load.__wrapped__()
    assert kernels is None
    assert "environment variable" in why


def test_kernels_are_compiled_without_a_cache_where_none_can_be_written(monkeypatch):
    from blockscale.ops import _numba_kernels

    asked = []

    def njit(**options):
        asked.append("cache" in options)
        if "cache" in options:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(_numba_kernels, "njit", njit)
    assert _numba_kernels._jit(len) is len
    assert asked == [True, False]


def test_importing_the_ops_neither_imports_numba_nor_compiles():
    command = "import sys, blockscale.ops; print('numba' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(("strips", "threads"), [(1, 4), (7, 2), (100, 3), (16, 16)])
def test_every_strip_is_worked_on_once(strips, threads):
    parts = dispatch.run_strips(lambda part: list(range(*part)), strips, 1 << 30, threads)
    assert sorted(strip for part in parts for strip in part) == list(range(strips))


def test_an_error_reaches_the_caller_when_all_threads_have_stopped():
    both = threading.Barrier(2)
    release = threading.Event()
    finished = []

    def work(part):
        both.wait(timeout=30)
        if threading.current_thread() is threading.main_thread():
            threading.Timer(0.1, release.set).start()
            raise RuntimeError("broken strip")
        release.wait(timeout=30)
        finished.append(part)

    with pytest.raises(RuntimeError, match="broken strip"):
        dispatch.run_strips(work, 2, 1 << 30, 2)
    assert len(finished) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_helping_threads_of_its_own():
    def on_two_threads():
        both = threading.Barrier(2)
        dispatch.run_strips(lambda part: both.wait(timeout=10), 2, 1 << 30, 2)

    on_two_threads()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            on_two_threads()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


_X = torch.zeros((4, 4), dtype=torch.bfloat16)
_CODES = torch.zeros((4, 4), dtype=torch.float8_e4m3fn)
_SCALE = torch.ones(1, 1)
_BAD_CALLS = {
    "quantize_weight: weight: bad dtype": lambda: ops.quantize_weight(_X.double()),
    "quantize_weight: weight: wrong shape": lambda: ops.quantize_weight(_X[0]),
    r"quantize_weight: out\[0\]: unusable output .*float8_e4m3fn \[4, 4\]": lambda: ops.quantize_weight(
        _X, out=(_X, _SCALE)
    ),
    r"quantize_weight: out\[1\]: unusable output .*\[1, 1\] on cpu, got contiguous torch.float32 \[2, 1\]": (
        lambda: ops.quantize_weight(_X, out=(_CODES, torch.ones(2, 1)))
    ),
    r"quantize_weight: out\[0\]: unusable output .*got non-contiguous": lambda: ops.quantize_weight(
        _X, out=(_CODES.t(), _SCALE)
    ),
    r"quantize_weight: out: bad argument \(expected \(codes, scale\)": lambda: ops.quantize_weight(
        _X, out=(_CODES,)
    ),
    "quantize_weight: threads: bad value .*got 0": lambda: ops.quantize_weight(_X, threads=0),
    "quantize_weight: backend: unknown backend .*got 'cuda'": lambda: ops.quantize_weight(_X, backend="cuda"),
    "quantize_weight: backend: backend numba works on CPU": lambda: ops.quantize_weight(
        _X.to("meta"), backend="numba"
    ),
    "dequantize_weight: codes: bad dtype": lambda: ops.dequantize_weight(_X, _SCALE),
    "dequantize_weight: scale: wrong shape": lambda: ops.dequantize_weight(_CODES, torch.ones(2, 1)),
    "dequantize_weight: scale: on another device": lambda: ops.dequantize_weight(_CODES, _SCALE.to("meta")),
    "dequantize_weight: dtype: bad dtype": lambda: ops.dequantize_weight(_CODES, _SCALE, dtype=torch.float64),
    "dequantize_weight: out: unusable output": lambda: ops.dequantize_weight(_CODES, _SCALE, out=_X[:2]),
    "quantize_activation: group_size: bad group size": lambda: ops.quantize_activation(_X, 0),
    "quantize_activation: x: bad dtype": lambda: ops.quantize_activation(_CODES),
    "find_nonfinite: x: bad dtype": lambda: ops.find_nonfinite(torch.ones(3, dtype=torch.int8)),
}


@pytest.mark.parametrize("message", _BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(BlockscaleError, match=message):
        _BAD_CALLS[message]()
