"""Weights rounded with scales that are given, and the gradients of that, in plain PyTorch.

With q(x) the nearest number of the format's grid (ties to even, saturating at its largest number L), h the
distance between the two largest numbers, and s the scale of a weight w's block or group:

    w' = s q(w / s)                                            rounded once to the dtype of the result
    dw = dw' m,    m = 1 where |w / s| <= L + h/2, else 0      rounded once to the dtype of w
    ds = sum over the block of dw' (q(w / s) - m w / s)        float32

All in float32, w / s a true division. NaN of w stays in its place. Sources: see `blockscale.qat.fake_quant`.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.reference import checks
from blockscale.reference.fp8 import _canonical_nan, _to_e4m3, spread_scale
from blockscale.reference.grids import block_of, clipping_limit, grid_of
from blockscale.reference.rounding import to_grid


def fake_quantize_scaled(
    weight: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFP8 | GroupInt | MXFP4,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """A weight as a checkpoint with these scales has it.

    Args:
        weight: (N, K) or (E, N, K); BF16, F16 or F32.
        scale: float32 (..., ceil(N / rows), ceil(K / columns)) for the blocks of the format, positive.
        fmt: of the checkpoint.
        dtype: of the result: bfloat16, float16 or float32.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    check_given("fake_quantize_scaled", weight, scale, fmt)
    spread = spread_scale(scale, block_of(fmt), weight.shape)
    codes = to_grid(weight.detach().float() / spread, grid_of(fmt))
    # Integers have one zero.
    value = (codes + 0.0 if isinstance(fmt, GroupInt) else codes) * spread
    return _canonical_nan(value.to(dtype))


def quantize_scaled(weight: torch.Tensor, scale: torch.Tensor, fmt: BlockFP8) -> torch.Tensor:
    """The codes, float8_e4m3fn of the weight's shape, of which `fake_quantize_scaled` gives the values.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    check_given("quantize_scaled", weight, scale, fmt)
    return _to_e4m3(weight.detach().float() / spread_scale(scale, fmt.block_size, weight.shape))


def scaled_gradients(
    grad: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFP8 | GroupInt | MXFP4,
    *,
    of_scale: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the weight and its scales from that of `fake_quantize_scaled`; see the module.

    Args:
        grad: of its result, of its shape; BF16, F16 or F32.
        weight, scale, fmt: its arguments.
        of_scale: whether the scales' is wanted.

    Returns:
        dw, of the dtype of the weight, and ds, float32 of the shape of the scale, or None.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    check_given("scaled_gradients", weight, scale, fmt, grad)
    grad = grad.detach().float()
    quotient = weight.detach().float() / spread_scale(scale, block_of(fmt), weight.shape)
    inside = quotient.abs() <= clipping_limit(fmt)
    of_weight = _canonical_nan((grad * inside).to(weight.dtype))
    if not of_scale:
        return of_weight, None
    each = to_grid(quotient, grid_of(fmt)) - quotient.where(inside, 0.0)
    return of_weight, _sum_blocks(grad * each, block_of(fmt))


def check_given(
    op: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFP8 | GroupInt | MXFP4,
    grad: torch.Tensor | None = None,
) -> None:
    """Refuse a weight, scales of its blocks and a gradient of its values that do not fit each other.

    Raises:
        BlockscaleError: they do not.
    """
    checks.check_weight(op, weight)
    checks.check_dtype(f"{op}: scale", scale.dtype, (torch.float32,))
    (rows, columns), (*lead, n, k) = block_of(fmt), weight.shape
    checks.check_shape(f"{op}: scale", scale.shape, (*lead, math.ceil(n / rows), math.ceil(k / columns)))
    tensors = {"scale": scale}
    if grad is not None:
        checks.check_dtype(f"{op}: grad", grad.dtype, checks.HIGH_PRECISION)
        checks.check_shape(f"{op}: grad", grad.shape, weight.shape)
        tensors["grad"] = grad
    for name, tensor in tensors.items():
        if tensor.device != weight.device:
            raise BlockscaleError(
                "on another device", where=f"{op}: {name}", expected=weight.device, got=tensor.device
            )


def _sum_blocks(values: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Sums over the blocks of (..., N, K): (..., ceil(N / rows), ceil(K / columns))."""
    (rows, columns), (height, width) = block, values.shape[-2:]
    padded = pad(values, (0, -width % columns, 0, -height % rows))
    grid = padded.shape[-2] // rows, padded.shape[-1] // columns
    return padded.reshape(*values.shape[:-2], grid[0], rows, grid[1], columns).sum(dim=(-3, -1))
