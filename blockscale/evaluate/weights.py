"""An FP8 weight against its source: how much was lost, and whether codes and scales belong together.

With w the source, q = codes * scale, and sums over a block of the scale grid:

    gain        sum(w q) / sum(q^2)                what q would have to be multiplied with to be nearest to w
    alignment   sum(w q)^2 / (sum(w^2) sum(q^2))   1 where codes are right up to a factor

Rounding leaves every block's gain within a few percent of 1. Where codes are right and the gain is not, the
scale is wrong: one corrupted scale, scales that were rounded after the codes were made, or a grid whose
entries stand in each other's places.

Calibrated rounding makes a weight fit the inputs that a quantized model has. Where those differ from the
original ones by noise of a share r of their size, it may shrink the weight, by up to 1 + r^2. At r = 0.5,
made up for altogether, gains of 1.19 and alignments of 0.957 were measured; so they are given more room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from blockscale import ops
from blockscale.metrics import saturation, sqnr_db

Fault = Literal["scale of a block is wrong", "scales were changed after the codes", "scale grid is swapped"]
_OUTLIER = 6.0  # times the root mean square


@dataclass(frozen=True)
class _Limits:
    """What a kind of rounding leaves: the gain is 1 up to this, the alignment of right codes larger."""

    gain: float
    aligned: float


_NEAREST = _Limits(gain=0.05, aligned=0.98)  # of alignment it leaves more than 0.998
_CALIBRATED = _Limits(gain=0.25, aligned=0.94)


@dataclass(frozen=True)
class WeightReport:
    """What quantization did to one weight.

    Attributes:
        amax: largest magnitude of the source.
        outliers: share of the source's values beyond six times its root mean square.
        saturated: share of codes at +-448; those of the largest value of each block are normal.
        flushed: share of values that are not zero and became zero.
        sqnr_db: signal to quantization noise ratio, decibels.
        worst_block: (row, column) in the scale grid of the block with the most noise of its own; an expert's
            number first for (E, N, K).
        worst_sqnr_db: of that block.
        fault: what is wrong with the scales, if anything is.
        evidence: why; empty without a fault.
    """

    amax: float
    outliers: float
    saturated: float
    flushed: float
    sqnr_db: float
    worst_block: tuple[int, ...]
    worst_sqnr_db: float
    fault: Fault | None
    evidence: str


def report_weight(
    codes: torch.Tensor,
    scale: torch.Tensor,
    source: torch.Tensor,
    block_size: tuple[int, int],
    *,
    calibrated: bool = False,
) -> WeightReport:
    """Compare an FP8 weight with its source.

    Args:
        codes: float8_e4m3fn (N, K) or (E, N, K).
        scale: float32 grid of it.
        source: of the same shape; bfloat16, float16 or float32.
        block_size: (bn, bk).
        calibrated: the weight was rounded by calibration, not to the nearest code.
    """
    wide = source.float()
    found = ops.dequantize_weight(codes, scale, block_size, dtype=torch.float32)
    cross, own, truth = (_sums(product, block_size) for product in (wide * found, found**2, wide**2))
    noise = truth - 2 * cross + own
    share = noise / truth.clamp_min(torch.finfo(torch.float32).tiny)
    worst = int(share.argmax())
    rms = wide.square().mean().sqrt()
    fault, evidence = _judge(cross, own, truth, scale, _CALIBRATED if calibrated else _NEAREST)
    return WeightReport(
        amax=wide.abs().max().item(),
        outliers=(wide.abs() > _OUTLIER * rms).float().mean().item(),
        saturated=saturation(codes),
        flushed=((found == 0) & (wide != 0)).float().mean().item(),
        sqnr_db=sqnr_db(found, wide),
        worst_block=tuple(int(place) for place in torch.unravel_index(torch.tensor(worst), share.shape)),
        worst_sqnr_db=_decibels(share.flatten()[worst].item()),
        fault=fault,
        evidence=evidence,
    )


def _sums(values: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """float64 sums over blocks of (..., N, K): (..., ceil(N/bn), ceil(K/bk))."""
    (n, k), (bn, bk) = values.shape[-2:], block_size
    padded = torch.nn.functional.pad(values, (0, -k % bk, 0, -n % bn))
    blocks = padded.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bn))  # (..., gn, bn, gk, bk)
    return blocks.sum((-3, -1), dtype=torch.float64)


def _judge(
    cross: torch.Tensor, own: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor, limits: _Limits
) -> tuple[Fault | None, str]:
    """What sums over blocks say of the scales."""
    filled = (own > 0) & (truth > 0)
    gain = torch.where(filled, cross / own, 1.0)
    aligned = torch.where(filled, cross**2 / (own * truth), 0.0) > limits.aligned
    off = aligned & ((gain - 1).abs() > limits.gain)
    count, total = int(off.sum()), int(filled.sum())
    if count == 0:
        return None, ""
    meant = scale * gain.to(scale.dtype)
    first = off.nonzero()[0].tolist()
    place = f"block {first}: scale {scale[tuple(first)]:.4g}, its codes want {meant[tuple(first)]:.4g}"
    many = f"{count} of {total} blocks; {place}"
    if count > 1 and _same_values(meant[off], scale[off], limits.gain):
        return "scale grid is swapped", many
    if count > max(1, total // 20):
        return "scales were changed after the codes", many
    return "scale of a block is wrong", many


def _same_values(meant: torch.Tensor, stored: torch.Tensor, gain: float) -> bool:
    """Whether these scales are those others in another order, up to what rounding leaves of a gain."""
    pairs = meant.sort().values / stored.sort().values
    return bool(((pairs - 1).abs() < gain).all())


def _decibels(share: float) -> float:
    """Signal to noise ratio of a share of noise."""
    return math.inf if share <= 0 else -10 * math.log10(share)
