"""Quantize a weight below 8 bits: `blockscale.reference.quantize_group`, fast and bit for bit."""

from __future__ import annotations

import torch

from blockscale import reference
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.group_formats import MXFP4, GroupFormat, GroupInt, group_scale_shape, packed_shape
from blockscale.ops import dispatch
from blockscale.ops.nonfinite import find_nonfinite
from blockscale.reference import checks
from blockscale.reference.group import check_writable

_OP = "quantize_group"
_SCALE_BITS = {torch.bfloat16: torch.uint16, torch.float8_e8m0fnu: torch.uint8}


def quantize_group(
    weight: torch.Tensor,
    fmt: GroupFormat,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    flag: torch.Tensor | None = None,
    threads: int | None = None,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and the scales of groups along K.

    Args:
        weight: (N, K), or (E, N, K) for fused experts; BF16, F16 or F32; need not be contiguous.
        fmt: `GroupInt` or `MXFP4`; they define the rounding and the layout.
        out: (packed, scale) to write to, contiguous: uint8 (..., N, packed_width(K, bits)), and (..., N,
            ceil(K/G)) of the format's scale dtype. Its content is undefined after an error.
        flag: int32 (1,) on the weight's device. 1 is written to it if the weight holds NaN or Inf, else 0, in
            place of the error: to raise one, the host has to wait for the device.
        threads: CPU threads of the numba backend; default torch.get_num_threads().
        backend: "auto" takes the fastest that works for the tensor's device.

    Returns:
        (packed, scale); `out` itself if it was given.

    Raises:
        NonFiniteError: the weight holds NaN or Inf, and there is no `flag`.
        BlockscaleError: wrong dtype or shape, a format that is only read, unusable `out` or `flag`, unknown
            backend.
    """
    fmt = check_writable(_OP, fmt)
    checks.check_weight(_OP, weight)
    threads = dispatch.check_threads(_OP, threads)
    triton_kernels = dispatch.triton_kernels(_OP, _OP, weight.device, backend)
    kernels = dispatch.numba_kernels(_OP, weight.device, backend)
    packed, scale = _outputs(weight, fmt, out)
    if flag is not None:
        dispatch.check_out(f"{_OP}: flag", flag, weight, (1,), torch.int32)
        flag.zero_()
    if weight.numel() == 0:
        return packed, scale
    if triton_kernels is not None:
        bad = triton_kernels.quantize_group(dispatch.as_matrices(weight), packed, scale, fmt, flag)
        finite = flag is not None or not int(bad)
    elif kernels is None:
        finite = _with_reference(weight, fmt, packed, scale)
    else:
        finite = _with_kernels(weight, fmt, packed, scale, threads)
    if not finite and flag is not None:
        flag.fill_(1)
    elif not finite:
        found = find_nonfinite(weight, threads=threads, backend=backend)
        raise checks.non_finite(_OP, *found, tuple(weight.shape))
    return packed, scale


def _outputs(
    weight: torch.Tensor, fmt: GroupInt | MXFP4, out: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(weight.shape)
    kinds = (
        (packed_shape(shape, fmt), torch.uint8),
        (group_scale_shape(shape, fmt), fmt.scale_dtype),
    )
    if out is None:
        packed, scale = (torch.empty(size, dtype=dtype, device=weight.device) for size, dtype in kinds)
        return packed, scale
    if len(out) != 2:
        raise BlockscaleError(
            "bad argument", where=f"{_OP}: out", expected="(packed, scale)", got=f"{len(out)} values"
        )
    for number, (size, dtype) in enumerate(kinds):
        dispatch.check_out(f"{_OP}: out[{number}]", out[number], weight, size, dtype)
    return out[0], out[1]


def _with_kernels(
    weight: torch.Tensor, fmt: GroupInt | MXFP4, packed: torch.Tensor, scale: torch.Tensor, threads: int
) -> bool:
    """Fill packed and scale; False, with both unfinished, if the weight is not finite."""
    import numpy as np

    from blockscale.ops import _numba_group

    sort = sort_of(fmt)
    rows = weight.numel() // weight.shape[-1]
    x = dispatch.bits(weight, (1, rows, weight.shape[-1]))[0]
    q = packed.view(rows, -1).numpy()
    s = scale.view(_SCALE_BITS[scale.dtype]).view(rows, -1).numpy()

    def work(strips: tuple[int, int]) -> int:
        arguments = sort, fmt.group_size, np.float32(fmt.largest), strips
        return int(_numba_group.quantize(x, q, s, *arguments))

    return not any(dispatch.run_strips(work, rows, weight.numel(), threads))


def sort_of(fmt: GroupFormat) -> int:
    """How the kernels of `_numba_group.py` number the codes of a format."""
    from blockscale.ops import _numba_group

    if not isinstance(fmt, GroupInt):
        return _numba_group.FP4
    return _numba_group.INT4 if fmt.bits == 4 else _numba_group.INT3


def _with_reference(
    weight: torch.Tensor, fmt: GroupInt | MXFP4, packed: torch.Tensor, scale: torch.Tensor
) -> bool:
    """As _with_kernels, in plain PyTorch."""
    shape = dispatch.matrix_shape(tuple(weight.shape))
    x, q, s = (each.reshape(*shape[:2], each.shape[-1]) for each in (weight, packed, scale))
    for expert, rows, _ in dispatch.row_pieces(shape, 1):
        try:
            q[expert, rows], s[expert, rows] = reference.quantize_group(x[expert, rows], fmt)
        except NonFiniteError:
            return False
    return True
