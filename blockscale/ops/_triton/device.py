"""What launchers ask of the device a tensor lies on."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl

_NOTHING = contextlib.nullcontext()
_INTERPRETED_PROCESSORS = 132  # of an H100, so that the interpreter runs the configurations that ship


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up; Triton's own, which kernels can call too, takes many times longer."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is not less than x."""
    return 1 << (x - 1).bit_length() if x > 1 else 1


@functools.cache
def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of an H100 for CPU tensors, which only Triton's interpreter takes."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the one that Triton launches on."""
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return _NOTHING
    return torch.cuda.device(device)


@functools.cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options, `kernel[grid](..., **these)`, of a kernel that calls `wait_for_previous_kernel`.

    From compute capability 9.0 on its programs are set up while the kernel before still runs.
    """
    overlaps = device.type == "cuda" and capability(device) >= (9, 0)
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps else {"OVERLAPS": False}


@triton.jit
def wait_for_previous_kernel(OVERLAPS: tl.constexpr):
    """Wait until what kernels before wrote can be read, and let the next one be set up."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
