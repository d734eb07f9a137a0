"""What launchers ask of the device a tensor lies on."""

from __future__ import annotations

import contextlib
import functools

import torch

_INTERPRETED_PROCESSORS = 132  # of an H100, so that the interpreter runs the configurations that ship


def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors."""
    return _cuda_processors(device) if device.type == "cuda" else _INTERPRETED_PROCESSORS


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of an H100 for CPU tensors, which only Triton's interpreter takes."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _cuda_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
