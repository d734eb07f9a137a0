"""Numeric asserts: bitwise equality with a message that shows where, and unbiased rounding."""

from __future__ import annotations

import math

import torch

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bitwise_equal(got: torch.Tensor, expected: torch.Tensor, what: str = "tensor") -> None:
    """Same dtype, shape and bits (so -0 differs from 0, and NaN equals the same NaN)."""
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    differ = _bits(got) != _bits(expected)
    if not bool(differ.any()):
        return
    at = tuple(differ.nonzero()[0].tolist())
    raise AssertionError(
        f"{what}: {int(differ.sum())} of {got.numel()} elements differ, the first at {list(at)}: "
        f"got {_show(got[at])}, expected {_show(expected[at])}"
    )


def assert_quantized_equal(
    got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Same bits in the scales and in the codes; the scales first, because wrong scales make wrong codes."""
    assert_bitwise_equal(got[1], expected[1], "scale")
    assert_bitwise_equal(got[0], expected[0], "codes")


def assert_unbiased(got: torch.Tensor, truth: torch.Tensor, sigmas: float = 4.0) -> None:
    """The mean of got - truth is zero within `sigmas` standard errors: rounding favours no direction."""
    error = (got.double() - truth.double()).flatten()
    mean, standard_error = float(error.mean()), float(error.std()) / math.sqrt(error.numel())
    assert abs(mean) <= sigmas * standard_error, (
        f"mean error {mean:.3e} is {abs(mean) / standard_error:.1f} standard errors from zero"
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def _show(value: torch.Tensor) -> str:
    width = value.element_size()
    bits = int(_bits(value.reshape(1))[0]) & ((1 << 8 * width) - 1)
    return f"{float(value)!r} (0x{bits:0{2 * width}X})"
