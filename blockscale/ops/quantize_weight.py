"""Quantize a weight to block-scaled E4M3: `blockscale.reference.quantize_weight`, fast and bit for bit."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from blockscale import reference
from blockscale.errors import NonFiniteError
from blockscale.formats import BlockFP8, ScaleFmt
from blockscale.ops import dispatch
from blockscale.ops.nonfinite import find_nonfinite
from blockscale.reference import checks

_OP = "quantize_weight"


def quantize_weight(
    weight: torch.Tensor,
    block_size: tuple[int, int] = (128, 128),
    scale_fmt: ScaleFmt = "float32",
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    flag: torch.Tensor | None = None,
    threads: int | None = None,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes and float32 scales, scale = max|x| / 448 over each block.

    Args:
        weight: (N, K), or (E, N, K) for fused experts; BF16, F16 or F32; need not be contiguous.
        block_size: (block_n, block_k); the last block of a ragged dimension is the remainder.
        scale_fmt: "float32", or "ue8m0" for scales rounded up to powers of two.
        out: (codes, scale) to write to, contiguous: float8_e4m3fn of the weight's shape, and float32
            (..., ceil(N/block_n), ceil(K/block_k)). Its content is undefined after an error.
        flag: int32 (1,) on the weight's device. 1 is written to it if the weight holds NaN or Inf, else 0, in
            place of the error: to raise one, the host has to wait for the device.
        threads: CPU threads of the numba backend; default torch.get_num_threads().
        backend: "auto" takes the fastest that works for the tensor's device.

    Returns:
        (codes, scale); `out` itself if it was given.

    Raises:
        NonFiniteError: the weight holds NaN or Inf, and there is no `flag`.
        BlockscaleError: wrong dtype or shape, unusable `out` or `flag`, unknown scale format or backend.
    """
    fmt = BlockFP8(block_size, scale_fmt)
    checks.check_weight(_OP, weight)
    threads = dispatch.check_threads(_OP, threads)
    triton_kernels = dispatch.triton_kernels(_OP, _OP, weight.device, backend)
    kernels = dispatch.numba_kernels(_OP, weight.device, backend)
    codes, scale = dispatch.quantizer_outputs(_OP, weight, fmt.scale_shape(tuple(weight.shape)), out)
    if flag is not None:
        dispatch.check_out(f"{_OP}: flag", flag, weight, (1,), torch.int32)
        flag.zero_()
    if weight.numel() == 0:
        return codes, scale
    if triton_kernels is not None and triton_kernels.fits(tuple(weight.shape), fmt.block_size):
        shape, grid = dispatch.matrix_shape(tuple(weight.shape)), dispatch.matrix_shape(tuple(scale.shape))
        x = dispatch.as_matrices(weight)
        q, s, pow2 = codes.view(shape), scale.view(grid), fmt.scale_fmt == "ue8m0"
        bad = triton_kernels.quantize_weight(x, q, s, fmt.block_size, pow2, flag)
        finite = flag is not None or not int(bad)
    elif kernels is None:
        finite = _with_reference(weight, fmt, codes, scale)
    else:
        finite = _with_kernels(kernels, weight, fmt, codes, scale, threads)
    if not finite and flag is not None:
        flag.fill_(1)
    elif not finite:
        found = find_nonfinite(weight, threads=threads, backend=backend)
        raise checks.non_finite(_OP, *found, tuple(weight.shape))
    return codes, scale


def _with_kernels(
    kernels: ModuleType,
    weight: torch.Tensor,
    fmt: BlockFP8,
    codes: torch.Tensor,
    scale: torch.Tensor,
    threads: int,
) -> bool:
    """Fill codes and scale; False, with both unfinished, if the weight is not finite."""
    shape, grid = dispatch.matrix_shape(tuple(weight.shape)), dispatch.matrix_shape(tuple(scale.shape))
    x, q, s = dispatch.bits(weight, shape), dispatch.bits(codes, shape), scale.numpy().reshape(grid)
    block_size, pow2 = fmt.block_size, fmt.scale_fmt == "ue8m0"
    block_values = min(block_size[0], shape[1]) * min(block_size[1], shape[2])
    large = block_values >= kernels.TABLE_MIN_BLOCK
    use_table = kernels.HAS_TABLE and weight.dtype == torch.bfloat16 and large

    def work(strips: tuple[int, int]) -> int:
        if use_table:
            return int(kernels.quantize_table(x, q, s, block_size, pow2, strips))
        return int(kernels.quantize_direct(x, q, s, block_size, np.float32(0.0), pow2, strips))

    return not any(dispatch.run_strips(work, grid[0] * grid[1], weight.numel(), threads))


def _with_reference(weight: torch.Tensor, fmt: BlockFP8, codes: torch.Tensor, scale: torch.Tensor) -> bool:
    """As _with_kernels, in plain PyTorch."""
    shape = dispatch.matrix_shape(tuple(weight.shape))
    x, q, s = weight.reshape(shape), codes.view(shape), scale.view(dispatch.matrix_shape(tuple(scale.shape)))
    for expert, rows, grid_rows in dispatch.row_pieces(shape, fmt.block_size[0]):
        try:
            piece = reference.quantize_weight(x[expert, rows], fmt.block_size, fmt.scale_fmt)
        except NonFiniteError:
            return False
        q[expert, rows], s[expert, grid_rows] = piece
    return True
