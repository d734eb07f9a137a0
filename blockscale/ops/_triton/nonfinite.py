"""Count NaN and Inf on the GPU and find the first: one pass over memory that leaves two integers there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import cdiv, current
from blockscale.ops._triton.launch import quick

_BLOCK = 8192  # values a program looks at
_NUM_WARPS = 4
# Integers that hold the bits; and from which magnitude on a value is Inf or NaN. E4M3 has no Inf.
_BITS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float8_e4m3fn: (torch.uint8, 0x7F),
}


@quick
@triton.jit
def _find_nonfinite_kernel(
    bits_ptr, found_ptr, size, MASK: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + start + index, mask=start + index < size, other=0).to(tl.int32)
    bad = (bits & MASK) >= LIMIT
    count = tl.sum(bad.to(tl.int32), axis=0)
    if count > 0:
        first = start + tl.min(tl.where(bad, index, BLOCK), axis=0)
        tl.atomic_add(found_ptr, count.to(tl.int64))
        # Counted from the end, so that zero can mean none and the first is the maximum.
        tl.atomic_max(found_ptr + 1, size - first)


def find_nonfinite(x: torch.Tensor) -> tuple[int, int]:
    """How many values of x, contiguous and not empty, are NaN or Inf; flat index of the first, -1 if none."""
    count, from_end = count_nonfinite(x).tolist()
    return count, x.numel() - from_end if count else -1


def count_nonfinite(x: torch.Tensor) -> torch.Tensor:
    """int64 (2,) on the device: how many values of x are NaN or Inf, and how far from the end the first is.

    x is contiguous and not empty. The host waits for nothing.
    """
    integer, limit = _BITS[x.dtype]
    found = torch.zeros(2, dtype=torch.int64, device=x.device)
    with current(x.device):
        _find_nonfinite_kernel[(cdiv(x.numel(), _BLOCK),)](
            x.view(integer),
            found,
            x.numel(),
            MASK=(1 << (8 * x.element_size() - 1)) - 1,
            LIMIT=limit,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
    return found
