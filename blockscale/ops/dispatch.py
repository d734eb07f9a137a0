"""Which implementation runs an op, how its work is split over threads, and how tensors reach the kernels.

- CPU tensors: numba kernels (`_numba_kernels.py`), loaded and compiled on first use; where numba or the
  processor features are missing, the reference, said once in the log.
- CUDA tensors: Triton kernels (`_triton/`), from compute capability 8.0 on; where Triton is missing, the
  reference, said once in the log.
- every other device: the reference, which is plain PyTorch and runs there.
All give the same bits. The reference works through a tensor in pieces of rows, so its float32 copies stay
small.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import platform
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch

from blockscale.errors import BlockscaleError
from blockscale.reference.fp8 import ScaleLayout, empty_scale

Backend = Literal["auto", "reference", "numba", "triton"]
T = TypeVar("T")

# What the vector code needs to compile without library calls: bytes in 32 lanes, float16 <-> float32.
_NEEDED_FEATURES = {"x86_64": ("avx2", "f16c"), "amd64": ("avx2", "f16c"), "aarch64": ("neon",)}
# How the kernels see each dtype; `_simd.py` documents the convention.
_BITS = {
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.float32: torch.uint32,
    torch.float8_e4m3fn: torch.uint8,
}
_REFERENCE_PIECE = 1 << 22  # values the reference takes at a time
_SINGLE_THREAD_BELOW = 1 << 18  # values for which starting threads costs more than it saves
_PARTS_PER_THREAD = 8  # so that a thread that is held up does not hold up the others
_logger = logging.getLogger(__name__)
_load_lock = threading.Lock()


@functools.cache
def triton_kernels(op: str, name: str, device: torch.device, backend: Backend) -> ModuleType | None:
    """Module `name` of `_triton/` if `backend` and the tensor's device allow it, or None for another backend.

    "auto" takes Triton on CUDA devices only; "triton" also takes CPU tensors in Triton's interpreter.

    Raises:
        BlockscaleError: unknown backend, or "triton" was asked for where it cannot run.
    """
    check_backend(op, backend)
    if backend not in ("auto", "triton") or (backend == "auto" and device.type != "cuda"):
        return None
    reason = _triton_obstacle(device)
    if reason and backend == "triton":
        raise BlockscaleError("backend triton is not available", where=f"{op}: backend", got=reason)
    if reason:
        _say_once(reason)
        return None
    return importlib.import_module(f"blockscale.ops._triton.{name}")


def check_backend(op: str, backend: str) -> None:
    """Refuse what is not a backend."""
    if backend not in get_args(Backend):
        expected = " | ".join(get_args(Backend))
        raise BlockscaleError("unknown backend", where=f"{op}: backend", expected=expected, got=repr(backend))


@functools.cache
def _triton_obstacle(device: torch.device) -> str:
    """Why the Triton kernels cannot run on a device; empty if they can. Imports triton."""
    try:
        from triton import knobs
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device.type == "cpu":
        return "" if knobs.runtime.interpret else "it works on CUDA tensors"
    if device.type != "cuda" or torch.version.hip:
        return f"it has no kernels for a {device} tensor"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def numba_kernels(op: str, device: torch.device, backend: Backend) -> ModuleType | None:
    """The compiled kernels if `backend` and the tensor's device allow them, or None for the reference.

    Raises:
        BlockscaleError: unknown backend, or "numba" was asked for where it cannot run.
    """
    check_backend(op, backend)
    if backend in ("reference", "triton") or (backend == "auto" and device.type != "cpu"):
        return None
    if device.type != "cpu":
        raise BlockscaleError(
            "backend numba works on CPU tensors", where=f"{op}: backend", got=f"a {device} tensor"
        )
    with _load_lock:
        kernels, reason = _load()
        if kernels is None and backend == "auto":
            _say_once(reason)
    if kernels is None and backend == "numba":
        raise BlockscaleError("backend numba is not available", where=f"{op}: backend", got=reason)
    return kernels


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The kernels, or None and why they cannot run here. Imports numba, hence not at import time."""
    try:
        from llvmlite import binding
        from numba import config
    except ImportError as error:
        return None, f"numba cannot be imported ({error})"
    if config.DISABLE_JIT or config.CPU_NAME or config.CPU_FEATURES:
        return None, "a NUMBA_ environment variable turns compilation for this processor off"
    machine = platform.machine().lower()
    if machine not in _NEEDED_FEATURES:
        return None, f"no kernels for the processor {machine}"
    features = binding.get_host_cpu_features()
    missing = [name for name in _NEEDED_FEATURES[machine] if not features.get(name)]
    if missing:
        return None, f"the processor lacks {' and '.join(missing)}"
    from blockscale.ops import _numba_kernels

    return _numba_kernels, ""


@functools.cache
def _say_once(reason: str) -> None:
    _logger.warning("%s: casting with plain PyTorch, same results but many times slower", reason)


def check_threads(op: str, threads: int | None) -> int:
    """The number of threads to use: `threads`, or PyTorch's own number for None."""
    if threads is None:
        return torch.get_num_threads()
    if not isinstance(threads, int) or threads < 1:
        raise BlockscaleError(
            "bad value", where=f"{op}: threads", expected="a positive integer", got=repr(threads)
        )
    return threads


def check_out(
    where: str, out: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Refuse an output the op cannot write to; `like` is the input, whose device it must share."""
    expected = f"contiguous {dtype} {list(shape)} on {like.device}"
    fits = out.dtype == dtype and tuple(out.shape) == tuple(shape) and out.device == like.device
    if not fits or not out.is_contiguous() or out.data_ptr() % dtype.itemsize:
        layout = "contiguous" if out.is_contiguous() else "non-contiguous"
        got = f"{layout} {out.dtype} {list(out.shape)} on {out.device}"
        raise BlockscaleError("unusable output", where=where, expected=expected, got=got)


def quantizer_outputs(
    op: str,
    x: torch.Tensor,
    grid: tuple[int, ...],
    out: tuple[torch.Tensor, ...] | None,
    scale_layout: ScaleLayout = "row",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) of a quantizer of `x` with scales of shape `grid`: new ones, or `out` if it fits."""
    shape = tuple(x.shape)
    if out is None:
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
        return codes, empty_scale(grid, scale_layout, x.device)
    if len(out) != 2:
        raise BlockscaleError(
            "bad argument", where=f"{op}: out", expected="(codes, scale)", got=f"{len(out)} values"
        )
    check_out(f"{op}: out[0]", out[0], x, shape, torch.float8_e4m3fn)
    if scale_layout == "row":
        check_out(f"{op}: out[1]", out[1], x, grid, torch.float32)
    else:
        _check_column_scale(f"{op}: out[1]", out[1], empty_scale(grid, scale_layout, x.device))
    return out[0], out[1]


def _check_column_scale(where: str, scale: torch.Tensor, like: torch.Tensor) -> None:
    def tell(tensor: torch.Tensor) -> str:
        return f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"

    if tell(scale) != tell(like) or scale.data_ptr() % 4:
        raise BlockscaleError("unusable output", where=where, expected=tell(like), got=tell(scale))


def bits(tensor: torch.Tensor, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """The bit patterns as a C-contiguous NumPy array; copied only if not contiguous or misaligned."""
    tensor = tensor.detach().contiguous()
    if tensor.data_ptr() % tensor.element_size():  # a view into a file at an odd offset
        tensor = tensor.clone()
    return tensor.view(_BITS[tensor.dtype]).numpy().reshape(shape)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(N, K) or (E, N, K) as (E, N, K)."""
    return (1, *shape) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def run_strips(work: Callable[[tuple[int, int]], T], strips: int, values: int, threads: int) -> list[T]:
    """Call `work((first, last))` on consecutive ranges that cover range(strips), on up to `threads` threads.

    The caller's thread works too, and waits for no thread that the system has not got round to starting: on a
    busy machine that alone can take milliseconds. Results come in no particular order.
    """
    if threads == 1 or strips == 1 or values < _SINGLE_THREAD_BELOW:
        return [work((0, strips))]
    step = math.ceil(strips / (threads * _PARTS_PER_THREAD))
    ranges = iter([(first, min(first + step, strips)) for first in range(0, strips, step)])

    def take() -> list[T]:
        return [work(part) for part in ranges]  # the shared iterator hands every range out once

    pool = _pool(threads - 1, os.getpid())
    others = [pool.submit(take) for _ in range(threads - 1)]
    try:
        results = take()
    finally:
        started = [other for other in others if not other.cancel()]
        wait(started)
    return results + [result for other in started for result in other.result()]


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Idle threads to help the caller's; they do not survive a fork, so every process has its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"blockscale-{process}")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., K) as (M, K) with adjacent values in a row; copied only if no strides say that."""
    rows = x.detach().unsqueeze(0) if x.dim() == 1 else x.detach().flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def as_matrices(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) or (E, N, K) as (E, N, K) with adjacent values in a row; copied only if no strides say that."""
    weight = weight.detach()
    matrices = weight if weight.dim() == 3 else weight.unsqueeze(0)
    return matrices if matrices.stride(2) == 1 else matrices.contiguous()


def row_pieces(shape: tuple[int, int, int], block_n: int) -> Iterator[tuple[int, slice, slice]]:
    """(expert, rows, rows of the scale grid) of the pieces the reference works through, whole blocks each."""
    experts, n, k = shape
    step = max(1, _REFERENCE_PIECE // max(1, k * block_n)) * block_n
    for expert in range(experts):
        for first in range(0, n, step):
            last = min(first + step, n)
            yield expert, slice(first, last), slice(first // block_n, math.ceil(last / block_n))
