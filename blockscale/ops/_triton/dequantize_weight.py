"""Dequantize block-scaled E4M3 on the GPU: x = codes * scale in float32, rounded once.

codes (E, N, K) at any strides along E and N, values of a row adjacent; scale (E, ceil(N/bn), ceil(K/bk))
float32 contiguous; x (E, N, K) BF16, F16 or F32, contiguous. Every NaN of the result is the canonical one.

A program takes a tile of one block, so its scale is one number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blockscale.ops._triton.device import cdiv, current, next_power_of_2
from blockscale.ops._triton.e4m3 import converts_to_e4m3, e4m3_value, narrow_canonical
from blockscale.ops._triton.launch import quick

# 32 values a thread: a quarter of a 128 x 128 block, rows of 128 codes (whole sectors of memory).
_TILE_VALUES = 4096
_NUM_WARPS = 4


# Block sizes are arguments, not constants: a block may be cut into tiles of any size.
@quick
@triton.jit
def _dequantize_weight_kernel(
    codes_ptr,
    scale_ptr,
    x_ptr,
    n,
    k,
    codes_stride_e,
    codes_stride_n,
    grid_n,
    grid_k,
    block_n,
    block_k,
    TILES_N: tl.constexpr,
    TILES_K: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    NATIVE: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    tile_n, tile_k = tile // (grid_k * TILES_K), tile % (grid_k * TILES_K)
    scale = tl.load(scale_ptr + (expert * grid_n + tile_n // TILES_N) * grid_k + tile_k // TILES_K)
    down = tile_n % TILES_N * HEIGHT + tl.arange(0, HEIGHT)
    right = tile_k % TILES_K * WIDTH + tl.arange(0, WIDTH)
    row = (tile_n // TILES_N).to(tl.int64) * block_n + down
    column = (tile_k // TILES_K).to(tl.int64) * block_k + right
    mask = ((row < n) & (down < block_n))[:, None] & ((column < k) & (right < block_k))[None, :]
    source = codes_ptr + expert * codes_stride_e + row[:, None] * codes_stride_n + column[None, :]
    value = e4m3_value(tl.load(source, mask=mask, other=0), NATIVE) * scale  # (HEIGHT, WIDTH)
    target = x_ptr + (expert * n + row)[:, None] * k + column[None, :]
    tl.store(target, narrow_canonical(value, x_ptr.dtype.element_ty), mask=mask)


def dequantize_weight(
    codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, block_size: tuple[int, int]
) -> None:
    """Fill x (E, N, K), contiguous, from codes with unit stride along K and contiguous float32 scales."""
    experts, n, k = codes.shape
    grid_n, grid_k = scale.shape[1:]
    block_n, block_k = min(block_size[0], n), min(block_size[1], k)
    width = min(next_power_of_2(block_k), _TILE_VALUES)
    height = min(next_power_of_2(block_n), _TILE_VALUES // width)
    tiles_n, tiles_k = cdiv(block_n, height), cdiv(block_k, width)  # of a block
    with current(codes.device):
        _dequantize_weight_kernel[(grid_n * tiles_n * grid_k * tiles_k, experts)](
            codes.view(torch.uint8),
            scale,
            x,
            n,
            k,
            codes.stride(0),
            codes.stride(1),
            grid_n,
            grid_k,
            block_n,
            block_k,
            TILES_N=tiles_n,
            TILES_K=tiles_k,
            HEIGHT=height,
            WIDTH=width,
            NATIVE=converts_to_e4m3(codes.device),
            num_warps=max(1, _NUM_WARPS * height * width // _TILE_VALUES),
        )
