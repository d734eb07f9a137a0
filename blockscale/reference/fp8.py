"""Block-scaled E4M3 in plain PyTorch: the truth every faster implementation equals bit for bit.

    scale = max(amax, floor) / 448          amax = max |x| over a block (weights) or a group (activations)
    codes = e4m3(x / scale)                 round to nearest even, saturating at +-448
    x    ~= codes * scale

Weights (N, K) or (E, N, K) share a scale per `block_size` region: scale (..., ceil(N/bn), ceil(K/bk)).
Activations (..., K) share one per 1 x `group_size` run: scale (..., ceil(K/G)). The last block of a ragged
dimension is the remainder. Rounding rules:
- everything is computed in float32, whatever the input; x / scale is a true division (a reciprocal breaks
  ties differently);
- "ue8m0" rounds the scale UP to a power of two before the division, never after;
- every NaN that is written is the canonical one (code 0x7F; sign clear, quiet), so that results do not depend
  on the processor.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn.functional import pad

from blockscale.errors import BlockscaleError
from blockscale.formats import E4M3_MAX, BlockFP8, ScaleFmt
from blockscale.reference import checks

# "row": contiguous. "column": values of a column adjacent and columns 16-byte aligned, as GEMMs read them.
ScaleLayout = Literal["row", "column"]
# Smallest normal float32: a smaller weight scale would lose its own bits.
MIN_WEIGHT_SCALE = 2.0**-126
# DeepSeek's floor on the amax of activations, kept for parity with its kernels.
ACTIVATION_AMAX_FLOOR = 1e-4
# Gradients with respect to activations shrink with the number of tokens that a loss is a mean of. Scales stay
# above 2**-62, down to where the quotients of all implementations are exact.
GRADIENT_AMAX_FLOOR = 2.0**-53
_INF_BITS = 0x7F800000


def quantize_weight(
    weight: torch.Tensor, block_size: tuple[int, int] = (128, 128), scale_fmt: ScaleFmt = "float32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight to E4M3 codes with one scale per block; an all-zero block gets scale 1.0.

    Args:
        weight: (N, K), or (E, N, K) for fused experts; BF16, F16 or F32; any dimension may be ragged or zero.
        block_size: (block_n, block_k).
        scale_fmt: "float32", or "ue8m0" for scales that are powers of two.

    Returns:
        codes, float8_e4m3fn of the weight's shape, and scale, float32 (..., ceil(N/block_n),
        ceil(K/block_k)).

    Raises:
        NonFiniteError: the weight holds NaN or Inf.
        BlockscaleError: wrong dtype or shape, bad block size or scale format.
    """
    fmt = BlockFP8(block_size, scale_fmt)
    checks.check_weight("quantize_weight", weight)
    x = weight.detach().to(torch.float32)
    amax = _block_amax(x, fmt.block_size)
    if not bool(amax.isfinite().all()):
        raise checks.non_finite("quantize_weight", *find_nonfinite(weight), tuple(weight.shape))
    scale = _divide(amax, E4M3_MAX).clamp_min(MIN_WEIGHT_SCALE)
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    if fmt.scale_fmt == "ue8m0":
        scale = round_up_to_power_of_two(scale)
    return _to_e4m3(x / spread_scale(scale, fmt.block_size, x.shape)), scale


def dequantize_weight(
    codes: torch.Tensor,
    scale: torch.Tensor,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """codes * scale in float32, rounded once to `dtype`; a NaN code or scale gives NaN, overflow gives Inf.

    Args:
        codes: (N, K) or (E, N, K), float8_e4m3fn.
        scale: (..., ceil(N/block_n), ceil(K/block_k)); float32, bfloat16 or float8_e8m0fnu.
        dtype: of the result: bfloat16, float16 or float32.

    Raises:
        BlockscaleError: wrong dtype, or the scale's shape is not the grid of the codes.
    """
    block_size = BlockFP8(block_size).block_size
    checks.check_scaled("dequantize_weight", codes, scale, block_size)
    checks.check_dtype("dequantize_weight: dtype", dtype, checks.HIGH_PRECISION)
    product = codes.to(torch.float32) * spread_scale(scale.to(torch.float32), block_size, codes.shape)
    return _canonical_nan(product.to(dtype))


def quantize_activation(
    x: torch.Tensor,
    group_size: int = 128,
    scale_fmt: ScaleFmt = "float32",
    scale_layout: ScaleLayout = "row",
    amax_floor: float = ACTIVATION_AMAX_FLOOR,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the last dimension of `x` to E4M3 in groups; scale = max(amax, amax_floor) / 448.

    A group that holds NaN gets scale NaN and NaN codes; one that holds Inf (and no NaN) gets scale Inf, NaN
    codes where the Infs were and zeros elsewhere. Nothing is raised: looking would cost a device
    synchronization, and the non-finite scale carries the fault on to the result.

    Args:
        x: (..., K); BF16, F16 or F32.
        group_size: G, values of a row that share a scale; the last group of a row is the remainder.
        scale_fmt: "float32", or "ue8m0" for scales that are powers of two.
        scale_layout: of the scale in memory, see empty_scale.
        amax_floor: 1e-4 for activations, 2**-53 for their gradients: from there on, at most 1.

    Returns:
        codes, float8_e4m3fn of the shape of x, and scale, float32 (..., ceil(K/G)).

    Source: DeepSeek-V3 inference code (floor 1e-4, groups of 128).
    """
    checks.check_rows("quantize_activation", x, group_size)
    check_floor("quantize_activation", amax_floor)
    fmt = BlockFP8((1, group_size), scale_fmt)
    rows = x.detach().to(torch.float32).unsqueeze(-2)
    amax = _block_amax(rows, fmt.block_size).clamp_min(amax_floor)
    scale = _canonical_nan(_divide(amax, E4M3_MAX))
    if fmt.scale_fmt == "ue8m0":
        scale = round_up_to_power_of_two(scale)
    codes = _to_e4m3(rows / spread_scale(scale, fmt.block_size, rows.shape))
    result = empty_scale((*scale.shape[:-2], scale.shape[-1]), scale_layout, x.device)
    return codes.squeeze(-2), result.copy_(scale.squeeze(-2))


def check_floor(op: str, amax_floor: float) -> None:
    """Refuse a floor that scales of activations cannot have.

    Raises:
        BlockscaleError: it is not from 2**-53 to 1.
    """
    if not GRADIENT_AMAX_FLOOR <= amax_floor <= 1:
        raise BlockscaleError(
            "bad value", where=f"{op}: amax_floor", expected="2**-53 to 1", got=repr(amax_floor)
        )


def empty_scale(shape: tuple[int, ...], layout: ScaleLayout, device: torch.device) -> torch.Tensor:
    """Uninitialized float32 scales (..., G) of activations.

    Args:
        shape: (..., G); the leading dimensions are the M rows.
        layout: "row", contiguous; or "column", strides (..., 1, Mpad) with Mpad the number of rows rounded up
            to a multiple of 4 (16 bytes), which is what TMA and the GEMMs like.
        device: of the result.
    """
    if layout not in ("row", "column"):
        raise BlockscaleError("unknown scale_layout", expected="row | column", got=repr(layout))
    if layout == "row":
        return torch.empty(shape, dtype=torch.float32, device=device)
    *lead, groups = shape
    padded = -(-math.prod(lead) // 4) * 4
    strides = [math.prod(lead[axis + 1 :]) for axis in range(len(lead))]
    memory = torch.empty(groups * padded, dtype=torch.float32, device=device)
    return memory.as_strided(shape, (*strides, padded))


def dequantize_activation(
    codes: torch.Tensor, scale: torch.Tensor, group_size: int = 128, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """codes (..., K) * scale (..., ceil(K/G)) in float32, rounded once to `dtype`; as dequantize_weight."""
    op = "dequantize_activation"
    checks.check_dtype(f"{op}: codes", codes.dtype, (checks.CODES,))
    checks.check_dtype(f"{op}: scale", scale.dtype, checks.SCALE_DTYPES)
    checks.check_dtype(f"{op}: dtype", dtype, checks.HIGH_PRECISION)
    block_size = BlockFP8((1, group_size)).block_size
    grid = (*codes.shape[:-1], math.ceil(codes.shape[-1] / group_size))
    checks.check_shape(f"{op}: scale", scale.shape, grid)
    rows, row_scale = codes.to(torch.float32).unsqueeze(-2), scale.to(torch.float32).unsqueeze(-2)
    product = rows * spread_scale(row_scale, block_size, rows.shape)
    return _canonical_nan(product.squeeze(-2).to(dtype))


def find_nonfinite(x: torch.Tensor) -> tuple[int, int]:
    """How many values of `x` are NaN or Inf, and the flat index of the first of them (-1 if none).

    Args:
        x: any shape; BF16, F16, F32 or E4M3 (whose only such value is NaN).
    """
    checks.check_dtype("find_nonfinite: x", x.dtype, (*checks.HIGH_PRECISION, checks.CODES))
    if x.dtype == checks.CODES:
        found = (x.view(torch.uint8) & 0x7F) == 0x7F
    else:
        found = ~x.isfinite()
    count = int(found.sum())
    return count, int(found.reshape(-1).to(torch.uint8).argmax()) if count else -1


def round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two not below each positive float32 value; NaN and Inf are kept.

    Works on the bit pattern (exponent + (mantissa != 0)): float32 log2 lands one exponent low for values a
    few ulps above a power of two. Values below 2**-126 become 2**-126, which keeps the result a normal
    number.
    """
    checks.check_dtype("round_up_to_power_of_two: scale", scale.dtype, (torch.float32,))
    bits = scale.contiguous().view(torch.int32)
    rounded = (bits.clamp(max=_INF_BITS) + 0x7FFFFF) & _INF_BITS
    return torch.where(scale.isfinite(), rounded.view(torch.float32), scale)


def is_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Boolean tensor: which values of a float32, bfloat16 or float8_e8m0fnu scale are exact powers of two."""
    checks.check_dtype("is_power_of_two: scale", scale.dtype, checks.SCALE_DTYPES)
    value = scale.to(torch.float32)
    mantissa, _ = torch.frexp(value)
    return (mantissa == 0.5) & value.isfinite()


def _block_amax(x: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """Largest magnitude in every block of x (..., N, K); NaN wins over everything. Padding is zeros."""
    (rows, cols), (block_n, block_k) = x.shape[-2:], block_size
    padded = pad(x.abs(), (0, -cols % block_k, 0, -rows % block_n))
    grid = padded.shape[-2] // block_n, padded.shape[-1] // block_k
    return padded.reshape(*x.shape[:-2], grid[0], block_n, grid[1], block_k).amax(dim=(-3, -1))


def spread_scale(scale: torch.Tensor, block_size: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Every block's scale repeated over the block: (..., ceil(N/bn), ceil(K/bk)) -> (..., N, K)."""
    (*experts, grid_n, grid_k), (block_n, block_k) = scale.shape, block_size
    blocks = scale[..., :, None, :, None].expand(*experts, grid_n, block_n, grid_k, block_k)
    return blocks.reshape(*experts, grid_n * block_n, grid_k * block_k)[..., : shape[-2], : shape[-1]]


def _divide(x: torch.Tensor, divisor: float) -> torch.Tensor:
    # On CUDA, PyTorch multiplies by the reciprocal of a Python number, but divides by a tensor.
    return x / torch.full_like(x, divisor)


def _to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest even, saturating (the bare conversion turns values past 464 into NaN)."""
    return _canonical_nan(x.clamp(-E4M3_MAX, E4M3_MAX)).to(torch.float8_e4m3fn)


def _canonical_nan(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x.isnan(), math.nan)
