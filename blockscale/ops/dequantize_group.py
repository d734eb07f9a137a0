"""Dequantize a weight below 8 bits: the fast form of `blockscale.reference.dequantize_group`, bit for bit."""

from __future__ import annotations

import torch

from blockscale import reference
from blockscale.group_formats import GroupFormat
from blockscale.ops import dispatch
from blockscale.ops.quantize_group import sort_of
from blockscale.reference.group import check_packed

_OP = "dequantize_group"


def dequantize_group(
    packed: torch.Tensor,
    scale: torch.Tensor,
    fmt: GroupFormat,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
    threads: int | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """value(code) * scale in float32, rounded once to `dtype`; a NaN scale gives NaN, overflow gives Inf.

    Args:
        packed: uint8 (N, packed_width(K, bits)) or (E, N, ...); need not be contiguous.
        scale: (..., N, ceil(K / G)); float32, bfloat16 or float8_e8m0fnu; of NVFP4: `reference.nvfp4_scale`.
        fmt: `GroupInt`, `MXFP4` or `NVFP4`.
        width: K, which the bytes do not tell.
        dtype: of the result: bfloat16, float16 or float32.
        out: tensor to write to, contiguous, (..., N, K) of `dtype`.
        threads: CPU threads of the numba backend; default torch.get_num_threads().
        backend: "auto" takes the fastest that works for the tensor's device.

    Returns:
        The dequantized weight; `out` itself if it was given.

    Raises:
        BlockscaleError: wrong dtype, packed codes or scales of another shape than the format has for K,
            unusable `out`, unknown backend.
    """
    check_packed(_OP, packed, scale, fmt, width, dtype)
    threads = dispatch.check_threads(_OP, threads)
    triton_kernels = dispatch.triton_kernels(_OP, _OP, packed.device, backend)
    kernels = dispatch.numba_kernels(_OP, packed.device, backend)
    shape = (*packed.shape[:-1], width)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    else:
        dispatch.check_out(f"{_OP}: out", out, packed, shape, dtype)
    if out.numel() == 0:
        return out
    rows = out.numel() // width
    if triton_kernels is None and kernels is None:
        return _with_reference(packed, scale, fmt, out)
    codes = packed.detach().contiguous().view(rows, -1)
    factors = scale.detach().to(torch.float32).contiguous().view(rows, -1)
    if triton_kernels is not None:
        triton_kernels.dequantize_group(codes, factors, out.view(rows, width), fmt)
        return out
    from blockscale.ops import _numba_group

    arrays = codes.numpy(), factors.numpy(), dispatch.bits(out, (1, rows, width))[0]
    kind = sort_of(fmt), fmt.group_size.bit_length() - 1

    def work(strips: tuple[int, int]) -> None:
        _numba_group.dequantize(*arrays, *kind, strips)

    dispatch.run_strips(work, rows, out.numel(), threads)
    return out


def _with_reference(
    packed: torch.Tensor, scale: torch.Tensor, fmt: GroupFormat, out: torch.Tensor
) -> torch.Tensor:
    shape = dispatch.matrix_shape(tuple(out.shape))
    q, s, x = (each.reshape(*shape[:2], each.shape[-1]) for each in (packed, scale, out))
    for expert, rows, _ in dispatch.row_pieces(shape, 1):
        piece = q[expert, rows], s[expert, rows]
        x[expert, rows] = reference.dequantize_group(*piece, fmt, shape[2], out.dtype)
    return out
