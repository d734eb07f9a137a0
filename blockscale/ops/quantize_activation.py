"""Quantize activations to group-scaled E4M3: the fast form of `blockscale.reference.quantize_activation`."""

from __future__ import annotations

import math

import numpy as np
import torch

from blockscale import reference
from blockscale.formats import BlockFP8, ScaleFmt, activation_format
from blockscale.ops import dispatch, gemm_audit
from blockscale.reference import checks
from blockscale.reference.fp8 import ACTIVATION_AMAX_FLOOR, ScaleLayout, check_floor, empty_scale

_OP = "quantize_activation"


def quantize_activation(
    x: torch.Tensor,
    group_size: int = 128,
    scale_fmt: ScaleFmt = "float32",
    scale_layout: ScaleLayout = "row",
    *,
    amax_floor: float = ACTIVATION_AMAX_FLOOR,
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
        scale_layout: "row" for contiguous scales; "column" for strides (..., 1, Mpad), Mpad the number of
            rows rounded up to a multiple of 4, as the GEMMs read them fastest.
        amax_floor: 1e-4 for activations, 2**-53 for their gradients: from there on, at most 1.
        out: (codes, scale) to write to: float8_e4m3fn of the shape of x, contiguous, and float32 (...,
            ceil(K/G)) in the layout asked for.
        threads: CPU threads of the numba backend; default torch.get_num_threads().
        backend: "auto" takes the fastest that works for the tensor's device.

    Returns:
        (codes, scale); `out` itself if it was given.

    Raises:
        BlockscaleError: wrong dtype or shape, unusable `out`, unknown scale format or backend.
    """
    checks.check_rows(_OP, x, group_size)
    check_floor(_OP, amax_floor)
    fmt = activation_format(group_size, scale_fmt)
    threads = dispatch.check_threads(_OP, threads)
    triton_kernels = dispatch.triton_kernels(_OP, _OP, x.device, backend)
    groups = math.ceil(x.shape[-1] / group_size)
    codes, scale = dispatch.quantizer_outputs(_OP, x, (*x.shape[:-1], groups), out, scale_layout)
    if x.numel() == 0:
        return codes, scale
    k = x.shape[-1]
    if triton_kernels is not None and group_size <= triton_kernels.LARGEST_GROUP:
        q, s = codes.view(-1, k), rows_of_scale(scale)
        triton_kernels.quantize_activation(
            dispatch.as_rows(x), q, s, group_size, fmt.scale_fmt == "ue8m0", amax_floor
        )
        if gemm_audit.current is not None:
            gemm_audit.current.remember(codes, x)
        return codes, scale
    contiguous = scale if scale_layout == "row" else empty_scale(tuple(scale.shape), "row", x.device)
    shape, grid = (1, x.numel() // k, k), (1, x.numel() // k, groups)
    kernels = dispatch.numba_kernels(_OP, x.device, backend)
    if kernels is None:
        _with_reference(x.reshape(shape), codes.view(shape), contiguous.view(grid), fmt, amax_floor)
    else:
        source, target = dispatch.bits(x, shape), dispatch.bits(codes, shape)
        multiplier = contiguous.numpy().reshape(grid)
        floor, pow2 = np.float32(amax_floor), fmt.scale_fmt == "ue8m0"

        def work(strips: tuple[int, int]) -> None:
            kernels.quantize_direct(source, target, multiplier, fmt.block_size, floor, pow2, strips)

        dispatch.run_strips(work, grid[1], x.numel(), threads)
    if scale_layout == "column":
        scale.copy_(contiguous)
    if gemm_audit.current is not None:
        gemm_audit.current.remember(codes, x)
    return codes, scale


def rows_of_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales (..., G) of either layout as (M, G), without a copy."""
    return scale.view(-1, scale.shape[-1]) if scale.dim() != 2 else scale


def _with_reference(
    rows: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, fmt: BlockFP8, amax_floor: float
) -> None:
    """Fill codes (1, M, K) and scale (1, M, G), in pieces of rows."""
    for _, some, _ in dispatch.row_pieces(dispatch.matrix_shape(tuple(rows.shape)), 1):
        piece = reference.quantize_activation(
            rows[0, some], fmt.block_size[1], fmt.scale_fmt, amax_floor=amax_floor
        )
        codes[0, some], scale[0, some] = piece
