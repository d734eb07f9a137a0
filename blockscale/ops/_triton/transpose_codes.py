"""Transpose a matrix of bytes: (N, K) at any strides -> (K, N), contiguous.

A program turns a tile in shared memory, so that both its reads and its writes are of adjacent bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import cdiv, current
from blockscale.ops._triton.launch import quick

_SIDE, _NUM_WARPS = 128, 8  # whole lines of 128 bytes either way, 64 bytes a thread


@quick
@triton.jit
def _transpose_codes_kernel(codes_ptr, out_ptr, n, k, stride_n, stride_k, tiles_k, SIDE: tl.constexpr):
    row = (tl.program_id(0) // tiles_k).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = (tl.program_id(0) % tiles_k).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    mask = (row < n)[:, None] & (column < k)[None, :]
    tile = tl.load(codes_ptr + row[:, None] * stride_n + column[None, :] * stride_k, mask=mask, other=0)
    tl.store(out_ptr + column[:, None] * n + row[None, :], tl.trans(tile), mask=tl.trans(mask))


def transpose_codes(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `out` (K, N), contiguous, from codes (N, K)."""
    n, k = codes.shape
    tiles_k = cdiv(k, _SIDE)
    with current(codes.device):
        _transpose_codes_kernel[(cdiv(n, _SIDE) * tiles_k,)](
            codes.view(torch.uint8),
            out.view(torch.uint8),
            n,
            k,
            codes.stride(0),
            codes.stride(1),
            tiles_k,
            SIDE=_SIDE,
            num_warps=_NUM_WARPS,
        )
