"""How far one tensor is from another: the figures shared by tests, evaluation and report.

Sums run in float64 over bounded pieces, so a tensor of any size and dtype costs a few megabytes:

    calc_diff(x, y)      = 1 - 2 * sum(x * y) / sum(x^2 + y^2)         0 when equal, about 0.5 * 10^(-SQNR/10)
    relative_error(x, y) = |x - y| / |y|                               Frobenius norms, y is the truth
    sqnr_db(x, y)        = 20 * log10(|y| / |x - y|)                   decibels, higher is better
    saturation(codes)    = share of codes at +-448
"""

from __future__ import annotations

import math

import torch

from blockscale.errors import BlockscaleError

_PIECE = 1 << 20  # elements converted to float64 at a time
_E4M3_MAX_CODE = 0x7E


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2 * sum(x * y) / sum(x^2 + y^2) in float64, symmetric; 0.0 for equal (or both zero) tensors.

    Source: the acceptance metric of DeepGEMM's tests. NaN anywhere gives NaN.
    """
    squares_x, squares_y, squares_error = _sums(x, y)
    total = squares_x + squares_y
    # 1 - 2xy / (x^2 + y^2) = (x - y)^2 / (x^2 + y^2), without the cancellation of the left form.
    return 0.0 if total == 0.0 else squares_error / total


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """Frobenius norm of x - y over that of y; 0.0 for equal tensors, inf if only y is zero."""
    _, squares_y, squares_error = _sums(x, y)
    if squares_error == 0.0:
        return 0.0
    return math.inf if squares_y == 0.0 else math.sqrt(squares_error / squares_y)


def sqnr_db(x: torch.Tensor, y: torch.Tensor) -> float:
    """Signal to quantization noise ratio of x against the truth y in decibels; inf for equal tensors."""
    error = relative_error(x, y)
    if error == 0.0:
        return math.inf
    return -math.inf if error == math.inf else -20.0 * math.log10(error)


def saturation(codes: torch.Tensor) -> float:
    """Share of E4M3 codes (any shape) at the largest magnitude, +-448; 0.0 for an empty tensor.

    Every block that is not all zero has at least one with float32 scales: a few per block are normal.
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise BlockscaleError(
            "bad dtype", where="saturation: codes", expected="float8_e4m3fn", got=codes.dtype
        )
    if codes.numel() == 0:
        return 0.0
    pieces = codes.reshape(-1).view(torch.uint8).split(_PIECE)
    return sum(int(((piece & 0x7F) == _E4M3_MAX_CODE).sum()) for piece in pieces) / codes.numel()


def kl_divergence(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL divergence of softmax(other) from softmax(logits), sum p ln(p / q), in nats.

    Args:
        logits: (..., V), of the model that is taken for the truth.
        other: (..., V), of the model it is compared with.

    Returns:
        float32 (...).
    """
    p, q = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _sums(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float, float]:
    """sum(x^2), sum(y^2) and sum((x - y)^2), in float64."""
    if x.shape != y.shape:
        raise BlockscaleError(
            "shapes differ", where="metrics: x, y", expected=f"{tuple(x.shape)}", got=f"{tuple(y.shape)}"
        )
    sums = [0.0, 0.0, 0.0]
    for a, b in zip(x.reshape(-1).split(_PIECE), y.reshape(-1).split(_PIECE), strict=True):
        a64, b64 = a.double(), b.double()
        for index, piece in enumerate((a64, b64, a64 - b64)):
            sums[index] += float(piece.dot(piece))
    return sums[0], sums[1], sums[2]
