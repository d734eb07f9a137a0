"""Quantize a weight to E4M3 with one scale per block on the GPU, in one pass over memory.

    scale = max |x| / 448 over a block, at least 2**-126; 1 for a block of zeros      codes = e4m3(x / scale)

x (E, N, K) BF16, F16 or F32 at any strides along E and N, values of a row adjacent; codes (E, N, K) and
scale (E, ceil(N/bn), ceil(K/bk)) contiguous. Rounding: `e4m3.py`. A program holds one block in registers
from the load to the store. A block with NaN or Inf raises a flag on the device, and its codes mean nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import current, next_power_of_2
from blockscale.ops._triton.e4m3 import converts_to_e4m3, magnitude, scaled_weight_codes, weight_scale, widen
from blockscale.ops._triton.launch import quick

# 64 values of a 128 x 128 block a thread; two programs fit on a multiprocessor: one loads, the other stores.
_VALUES_PER_WARP = 2048
_MOST_WARPS = 16
# A block has to fit the registers of one program.
LARGEST_BLOCK = 1 << 16


@quick
@triton.jit
def _quantize_weight_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    bad_ptr,
    n,
    k,
    x_stride_e,
    x_stride_n,
    grid_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    POW2: tl.constexpr,
    NATIVE: tl.constexpr,
):
    CORRECTIONS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1
    block = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    block_n = (block // grid_k).to(tl.int64)
    block_k = (block % grid_k).to(tl.int64)
    down, right = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    row, column = block_n * BLOCK_N + down, block_k * BLOCK_K + right
    mask = ((row < n) & (down < BLOCK_N))[:, None] & ((column < k) & (right < BLOCK_K))[None, :]
    source = x_ptr + expert * x_stride_e + row[:, None] * x_stride_n + column[None, :]  # (HEIGHT, WIDTH)
    x = widen(tl.load(source, mask=mask, other=0.0))
    amax = tl.max(magnitude(x))
    scale = weight_scale(amax, POW2)
    codes = scaled_weight_codes(x, scale, CORRECTIONS, POW2, NATIVE)
    tl.store(codes_ptr + (expert * n + row)[:, None] * k + column[None, :], codes, mask=mask)
    tl.store(scale_ptr + expert * tl.num_programs(0) + block, scale)
    tl.store(bad_ptr, 1, mask=amax >= 0x7F800000)


def quantize_weight(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    block_size: tuple[int, int],
    pow2: bool,
    bad: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill `codes` and `scale`, (E, N, K) and its grid, contiguous; the host waits for nothing.

    Returns:
        int32 (1,) on the device, `bad` if it was given (as zero): 1 if x holds NaN or Inf, else 0.
    """
    experts, n, k = x.shape
    grid_n, grid_k = scale.shape[1:]
    block_n, block_k = block_size
    # A block that reaches past the weight ends with it.
    height = next_power_of_2(min(block_n, n))
    width = next_power_of_2(min(block_k, k))
    bad = torch.zeros(1, dtype=torch.int32, device=x.device) if bad is None else bad
    with current(x.device):
        _quantize_weight_kernel[(grid_n * grid_k, experts)](
            x,
            codes.view(torch.uint8),
            scale,
            bad,
            n,
            k,
            x.stride(0),
            x.stride(1),
            grid_k,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            HEIGHT=height,
            WIDTH=width,
            POW2=pow2,
            NATIVE=converts_to_e4m3(x.device),
            num_warps=min(_MOST_WARPS, max(1, height * width // _VALUES_PER_WARP)),
        )
    return bad


def fits(shape: tuple[int, ...], block_size: tuple[int, int]) -> bool:
    """Whether a block of a weight (..., N, K) fits the registers of a program."""
    height = next_power_of_2(min(block_size[0], shape[-2]))
    return height * next_power_of_2(min(block_size[1], shape[-1])) <= LARGEST_BLOCK
