"""Which implementation runs a GEMM; the only place that knows.

On a GPU, what a tuning table says for it and the sizes (`tuning_table`: the user's, then the shipped one);
else, by heuristics:
- CPU: dequantize to float32 and multiply ("dequantized").
- Hopper (SM90): CUDA C++, which measured fastest on an H100 (`benchmarks/results/`).
- other GPUs with FP8 arithmetic (SM89, SM100 and later): Triton.
- older GPUs (A100, V100): FP8 is a storage format; dequantize to BF16 and multiply, said once in the log.
What cannot be loaded (no CUDA bindings: Triton; no Triton: dequantized) is passed over for the next, said
once. Nothing is tuned at call time; that is what `blockscale tune` is for.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterable
from typing import Literal

import torch

from blockscale.errors import BlockscaleError
from blockscale.ops.tuning_table import Choice, find_choice

GemmBackend = Literal["auto", "reference", "dequantized", "triton", "cuda", "cublas"]
Op = Literal["fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"]

_MODULES = {
    "reference": "blockscale.reference.gemm",
    "dequantized": "blockscale.ops._dequantized_gemm",
    "triton": "blockscale.ops._triton.gemms",
    "cuda": "blockscale.ops._cuda.fp8_gemm",
    "cublas": "blockscale.ops._cublas",
}
_NEEDS = {  # compute capability: from, below
    "triton": ((8, 9), (99, 0)),
    "cuda": ((9, 0), (10, 0)),
    "cublas": ((9, 0), (10, 0)),
}
_logger = logging.getLogger(__name__)


def implementation(
    op: Op, device: torch.device, sizes: tuple[int, int, int], backend: GemmBackend
) -> Callable[..., torch.Tensor]:
    """The function that computes `op`.

    Args:
        op: name of the operator.
        device: of its tensors.
        sizes: (M, N, K); M of one expert, as expected, for masked rows.
        backend: what the caller asked for.

    Raises:
        BlockscaleError: unknown backend, or one that cannot run on this device or has no such operator.
    """
    if backend not in ("auto", *_MODULES):
        expected = " | ".join(("auto", *_MODULES))
        raise BlockscaleError("unknown backend", where=f"{op}: backend", expected=expected, got=repr(backend))
    if backend == "auto":
        choice = find_choice(op, device, sizes) if device.type == "cuda" else None
        tuned = chosen(op, choice) if choice is not None else None
        return tuned or heuristic(op, device)[1]
    reason = unfit(backend, device)
    found, error = (None, reason) if reason else _load(op, backend)
    if found is None:
        raise BlockscaleError(
            f"backend {backend} is not available", where=f"{op}: backend", got=error, remedy="use 'auto'"
        )
    return found


def chosen(op: Op, choice: Choice) -> Callable[..., torch.Tensor] | None:
    """The function that computes `op` as a tuning table says, or None if its backend cannot be loaded."""
    run, _ = _load(op, choice.backend)
    return run if run is None or choice.tile is None else functools.partial(run, tile=choice.tile)


def heuristic(op: Op, device: torch.device) -> tuple[GemmBackend, Callable[..., torch.Tensor]]:
    """The backend that "auto" takes where no tuning table says another, and its function."""
    for name in _candidates(device):
        run, _ = _load(op, name)
        if run is not None:
            return name, run
    raise AssertionError("the last candidate always loads")


def available(op: Op, device: torch.device, backends: Iterable[str]) -> tuple[str, ...]:
    """Those of `backends` that can run an operator on a device."""
    return tuple(name for name in backends if not unfit(name, device) and _load(op, name)[0] is not None)


def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies FP8 numbers; the others dequantize them first."""
    return device.type == "cuda" and _capability(device) >= (8, 9)


def _candidates(device: torch.device) -> tuple[GemmBackend, ...]:
    """Backends for a device, the best first."""
    if device.type != "cuda":
        return ("dequantized",)
    if not has_fp8(device):
        _say_once(f"{torch.cuda.get_device_name(device)} has no FP8 arithmetic: weights are turned to BF16")
        return ("dequantized",)
    hopper = _capability(device)[0] == 9
    return ("cuda", "triton", "dequantized") if hopper else ("triton", "dequantized")


def unfit(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, or None."""
    if backend not in _NEEDS:
        return None
    if device.type != "cuda":
        # Triton's interpreter takes CPU tensors; the launchers say so themselves where it is off.
        return None if backend == "triton" else f"a {device} tensor"
    first, beyond = _NEEDS[backend]
    capability = _capability(device)
    return None if first <= capability < beyond else f"compute capability {capability[0]}.{capability[1]}"


@functools.cache
def _load(op: str, backend: str) -> tuple[Callable[..., torch.Tensor] | None, str]:
    """The operator of a backend, or None and why there is none."""
    try:
        module = importlib.import_module(_MODULES[backend])
    except ImportError as error:
        _say_once(f"backend {backend} cannot be loaded ({error}): another takes its place, perhaps slower")
        return None, str(error)
    return getattr(module, op, None), f"it has no {op}"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning("%s", message)
