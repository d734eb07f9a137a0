"""Dequantize prepared four-bit weights: the fast form of `reference.dequantize_w4`, bit for bit."""

from __future__ import annotations

import torch

from blockscale import reference
from blockscale.ops import dispatch
from blockscale.reference import W4Weight, w4
from blockscale.reference.fp4 import e2m1_value

_OP = "dequantize_w4"
_KNOWN = (torch.float32, torch.bfloat16)


def dequantize_w4(weight: W4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight's values, (N, K) or (E, N, K), computed in float32 and rounded once to `dtype`.

    On the CPU a compiled kernel makes float32 and bfloat16, with as many threads as PyTorch has.
    """
    kernels = dispatch.numba_kernels(_OP, weight.words.device, "auto") if dtype in _KNOWN else None
    if kernels is None:
        return reference.dequantize_w4(weight, dtype)
    from blockscale.ops import _numba_w4

    groups, n, size = weight.words.shape[-3:]
    out = torch.empty(weight.shape, dtype=dtype)
    words = w4.plain_words(weight.words).contiguous().view(torch.uint8).view(-1, groups, n, 4 * size).numpy()
    scale = weight.scale.contiguous().view(-1, groups, n).numpy()
    rows = len(words) * n
    values = torch.empty(0)
    if weight.kind == "mxfp4":
        values = e2m1_value(torch.tensor(w4.SWAPPED, dtype=torch.uint8))
    arrays = words, scale, dispatch.bits(out, (1, rows, weight.width))[0], values.numpy()

    def work(strips: tuple[int, int]) -> None:
        _numba_w4.dequantize(*arrays, strips)

    if out.numel():
        dispatch.run_strips(work, rows, out.numel(), torch.get_num_threads())
    return out
