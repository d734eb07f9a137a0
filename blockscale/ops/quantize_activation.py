"""Quantize activations to group-scaled E4M3: the fast form of `blockscale.reference.quantize_activation`."""

from __future__ import annotations

import math

import numpy as np
import torch

from blockscale import reference
from blockscale.formats import BlockFP8, ScaleFmt
from blockscale.ops import dispatch
from blockscale.reference import checks
from blockscale.reference.fp8 import ACTIVATION_AMAX_FLOOR

_OP = "quantize_activation"


def quantize_activation(
    x: torch.Tensor,
    group_size: int = 128,
    scale_fmt: ScaleFmt = "float32",
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    threads: int | None = None,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes and float32 scales of 1 x `group_size` runs, scale = max(amax, 1e-4) / 448.

    NaN and Inf are not refused: they make the scale of their group non-finite (see the reference).

    Args:
        x: (..., K); BF16, F16 or F32; need not be contiguous.
        group_size: G; the last group of a row is the remainder.
        scale_fmt: "float32", or "ue8m0" for scales rounded up to powers of two.
        out: (codes, scale) to write to, contiguous: float8_e4m3fn of the shape of x, and float32 (...,
            ceil(K/G)).
        threads: CPU threads of the numba backend; default torch.get_num_threads().
        backend: "auto" takes the fastest that works for the tensor's device.

    Returns:
        (codes, scale); `out` itself if it was given.

    Raises:
        BlockscaleError: wrong dtype or shape, unusable `out`, unknown scale format or backend.
    """
    checks.check_rows(_OP, x, group_size)
    fmt = BlockFP8((1, group_size), scale_fmt)
    threads = dispatch.check_threads(_OP, threads)
    kernels = dispatch.numba_kernels(_OP, x.device, backend)
    groups = math.ceil(x.shape[-1] / group_size)
    codes, scale = dispatch.quantizer_outputs(_OP, x, (*x.shape[:-1], groups), out)
    if x.numel() == 0:
        return codes, scale
    k = x.shape[-1]
    shape, grid = (1, x.numel() // k, k), (1, x.numel() // k, groups)
    if kernels is None:
        rows, q, s = x.reshape(shape), codes.view(shape), scale.view(grid)
        for _, some, _ in dispatch.row_pieces(shape, 1):
            piece = reference.quantize_activation(rows[0, some], group_size, fmt.scale_fmt)
            q[0, some], s[0, some] = piece
        return codes, scale
    source, target = dispatch.bits(x, shape), dispatch.bits(codes, shape)
    multiplier = scale.numpy().reshape(grid)
    floor, pow2 = np.float32(ACTIVATION_AMAX_FLOOR), fmt.scale_fmt == "ue8m0"

    def work(strips: tuple[int, int]) -> None:
        kernels.quantize_direct(source, target, multiplier, fmt.block_size, floor, pow2, strips)

    dispatch.run_strips(work, grid[1], x.numel(), threads)
    return codes, scale
