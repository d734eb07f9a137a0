"""Count NaN and Inf: the fast form of `blockscale.reference.find_nonfinite`; and whether there is any."""

from __future__ import annotations

import math

import torch

from blockscale import reference
from blockscale.ops import dispatch
from blockscale.reference import checks

_OP = "find_nonfinite"
_FLAG_OP = "flag_nonfinite"
_PIECE = 1 << 22  # values searched at a time
# Magnitude bits from which on a value is Inf or NaN; E4M3 has no Inf.
_LIMIT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float8_e4m3fn: 0x7F}


def find_nonfinite(
    x: torch.Tensor, *, threads: int | None = None, backend: dispatch.Backend = "auto"
) -> tuple[int, int]:
    """How many values of `x` are NaN or Inf, and the flat (row-major) index of the first of them, -1 if none.

    Args:
        x: any shape; BF16, F16, F32 or E4M3 (whose only such value is NaN).
        threads: CPU threads of the numba backend; default torch.get_num_threads().
        backend: "auto" takes the fastest that works for the tensor's device.

    Raises:
        BlockscaleError: wrong dtype, unknown backend.
    """
    checks.check_dtype(f"{_OP}: x", x.dtype, (*checks.HIGH_PRECISION, checks.CODES))
    threads = dispatch.check_threads(_OP, threads)
    triton_kernels = dispatch.triton_kernels(_OP, "nonfinite", x.device, backend)
    kernels = dispatch.numba_kernels(_OP, x.device, backend)
    if x.numel() == 0:
        return 0, -1
    if triton_kernels is not None:
        return triton_kernels.find_nonfinite(x.detach().contiguous())
    if kernels is None:
        pieces = x.detach().reshape(-1).split(_PIECE)
        found = [_shifted(reference.find_nonfinite(piece), number) for number, piece in enumerate(pieces)]
    else:
        flat = dispatch.bits(x, (1, 1, x.numel())).reshape(-1)
        limit = _LIMIT[x.dtype]

        def work(strips: tuple[int, int]) -> tuple[int, int]:
            first, last = strips[0] * _PIECE, min(strips[1] * _PIECE, flat.size)
            return kernels.find_nonfinite(flat, limit, first, last)

        found = dispatch.run_strips(work, math.ceil(flat.size / _PIECE), flat.size, threads)
    firsts = [first for _, first in found if first >= 0]
    return sum(count for count, _ in found), min(firsts, default=-1)


def flag_nonfinite(
    x: torch.Tensor, flag: torch.Tensor, *, threads: int | None = None, backend: dispatch.Backend = "auto"
) -> None:
    """Write to `flag` whether `x` holds NaN or Inf; on a GPU the host waits for nothing.

    Args:
        x, threads, backend: as for `find_nonfinite`.
        flag: int32 (1,) on the device of `x`; becomes 1 if a value is NaN or Inf, else 0.

    Raises:
        BlockscaleError: wrong dtype, unusable `flag`, unknown backend.
    """
    checks.check_dtype(f"{_FLAG_OP}: x", x.dtype, (*checks.HIGH_PRECISION, checks.CODES))
    dispatch.check_out(f"{_FLAG_OP}: flag", flag, x, (1,), torch.int32)
    triton_kernels = dispatch.triton_kernels(_FLAG_OP, "nonfinite", x.device, backend)
    if triton_kernels is not None and x.numel():
        flag.copy_(triton_kernels.count_nonfinite(x.detach().contiguous())[:1].clamp_(max=1))
    else:
        flag.fill_(find_nonfinite(x, threads=threads, backend=backend)[0] > 0)


def _shifted(found: tuple[int, int], piece: int) -> tuple[int, int]:
    count, first = found
    return count, first + piece * _PIECE if count else -1
