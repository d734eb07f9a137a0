"""Launches of Triton kernels that cost the host little.

`kernel[grid](...)` binds, specializes and looks up by text at every launch, which takes 10 to 20 us of a slow
host more than this: as long as many of these kernels run. Here one look at the arguments finds the compiled
kernel, and pointers are handed over as numbers, which spares the driver a question about each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from triton import JITFunction

_INT32 = 1 << 31


def sorted_out(values: Sequence[Any]) -> tuple[list[object], list[Any]]:
    """What of arguments the compiled kernel depends on, and the arguments with pointers as numbers.

    It depends on what Triton specializes for: dtype and alignment to 16 bytes of a tensor, and of an integer
    whether it is 1, a multiple of 16 and fits 32 bits.
    """
    sorts: list[object] = []
    plain = []
    for value in values:
        if isinstance(value, torch.Tensor):
            address = value.data_ptr()
            sorts += value.dtype, address & 15
            plain.append(address)
            continue
        if type(value) is int:
            sorts.append((value == 1) + 2 * (value & 15 == 0) + 4 * (-_INT32 <= value < _INT32))
        else:
            sorts.append(type(value))
        plain.append(value)
    return sorts, plain


class QuickKernel:
    """A Triton kernel whose first parameters are tensors and numbers, the others constants, given by name."""

    def __init__(self, jit: JITFunction[Any]) -> None:
        self._jit = jit
        self._known: dict[object, tuple[Any, tuple[object, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Call the result with the parameters, and with Triton's options by name."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *values: Any, **options: Any) -> None:
        device = torch._C._cuda_getDevice()
        sorts, plain = sorted_out(values)
        sort = (device, *sorts, *options.items())
        known = self._known.get(sort)
        if known is None:
            self._known[sort] = self._jit[grid](*values, **options), self._constants(values, options)
            return
        compiled, constants = known
        # The stream as a number: an object for it takes as long to make as a launch.
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled[(*grid, 1, 1)[:3]](*plain, *constants, stream=stream)

    def _constants(self, values: tuple[Any, ...], options: dict[str, Any]) -> tuple[object, ...]:
        """Values of the parameters behind the first ones."""
        assert all(parameter.is_constexpr for parameter in self._jit.params[len(values) :])
        named = {name: value for name, value in options.items() if name in self._jit.arg_names}
        bound = self._jit.signature.bind(*values, **named)
        bound.apply_defaults()
        return tuple(bound.arguments.values())[len(values) :]


def quick(kernel: Any) -> Any:
    """Decorator above `triton.jit`; in Triton's interpreter the kernel stays as it is."""
    return QuickKernel(kernel) if isinstance(kernel, JITFunction) else kernel
