"""Dequantize block-scaled E4M3: the fast form of `blockscale.reference.dequantize_weight`, bit for bit."""

from __future__ import annotations

import torch

from blockscale import reference
from blockscale.formats import BlockFP8
from blockscale.ops import dispatch
from blockscale.reference import checks

_OP = "dequantize_weight"


def dequantize_weight(
    codes: torch.Tensor,
    scale: torch.Tensor,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
    threads: int | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """codes * scale in float32, rounded once to `dtype`; a NaN code or scale gives NaN, overflow gives Inf.

    Args:
        codes: (N, K) or (E, N, K), float8_e4m3fn; need not be contiguous.
        scale: (..., ceil(N/block_n), ceil(K/block_k)); float32, bfloat16 or float8_e8m0fnu.
        block_size: (block_n, block_k).
        dtype: of the result: bfloat16, float16 or float32.
        out: tensor to write to, contiguous, of the codes' shape and `dtype`.
        threads: CPU threads of the numba backend; default torch.get_num_threads().
        backend: "auto" takes the fastest that works for the tensor's device.

    Returns:
        The dequantized weight; `out` itself if it was given.

    Raises:
        BlockscaleError: wrong dtype, a scale that is not the grid of the codes, unusable `out`, unknown
            backend.
    """
    block_size = BlockFP8(block_size).block_size
    checks.check_scaled(_OP, codes, scale, block_size)
    checks.check_dtype(f"{_OP}: dtype", dtype, checks.HIGH_PRECISION)
    threads = dispatch.check_threads(_OP, threads)
    triton_kernels = dispatch.triton_kernels(_OP, _OP, codes.device, backend)
    kernels = dispatch.numba_kernels(_OP, codes.device, backend)
    if out is None:
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    else:
        dispatch.check_out(f"{_OP}: out", out, codes, tuple(codes.shape), dtype)
    if codes.numel() == 0:
        return out
    shape, grid = dispatch.matrix_shape(tuple(codes.shape)), dispatch.matrix_shape(tuple(scale.shape))
    if triton_kernels is not None:
        multiplier = scale.detach().to(torch.float32).contiguous().view(grid)
        source = dispatch.as_matrices(codes)
        triton_kernels.dequantize_weight(source, multiplier, out.view(shape), block_size)
        return out
    if kernels is None:
        q, s, x = codes.reshape(shape), scale.reshape(grid), out.view(shape)
        for expert, rows, grid_rows in dispatch.row_pieces(shape, block_size[0]):
            piece = q[expert, rows], s[expert, grid_rows]
            x[expert, rows] = reference.dequantize_weight(*piece, block_size, dtype)
        return out
    factors = scale.detach().to(torch.float32).contiguous().numpy().reshape(grid)
    bits, target = dispatch.bits(codes, shape), dispatch.bits(out, shape)

    def work(strips: tuple[int, int]) -> None:
        kernels.dequantize(bits, factors, target, block_size, strips)

    dispatch.run_strips(work, grid[0] * grid[1], codes.numel(), threads)
    return out
