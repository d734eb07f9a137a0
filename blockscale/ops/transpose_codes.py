"""Codes of a weight transposed, as the product that gives the gradient of its inputs reads them.

Blocks of 128 x 128 transpose exactly: codes and scales of the transposed weight are those of the weight,
transposed. PyTorch's own copy moves single bytes; on a GPU the kernel moves 16 at a time.
"""

from __future__ import annotations

import torch

from blockscale.errors import BlockscaleError
from blockscale.ops import dispatch
from blockscale.reference import checks


def transpose_codes(codes: torch.Tensor, *, backend: dispatch.Backend = "auto") -> torch.Tensor:
    """(N, K), float8_e4m3fn, at any strides -> (K, N), contiguous.

    Args:
        codes: of a weight.
        backend: "auto" takes the fastest that works for the tensor's device.

    Raises:
        BlockscaleError: wrong dtype or shape, unknown backend.
    """
    op = "transpose_codes"
    checks.check_dtype(f"{op}: codes", codes.dtype, (checks.CODES,))
    if codes.dim() != 2:
        raise BlockscaleError("wrong shape", where=f"{op}: codes", expected="(N, K)", got=list(codes.shape))
    kernels = dispatch.triton_kernels(op, op, codes.device, backend)
    if kernels is None or not codes.numel():
        return codes.t().contiguous()
    out = torch.empty((codes.shape[1], codes.shape[0]), dtype=codes.dtype, device=codes.device)
    kernels.transpose_codes(codes, out)
    return out
