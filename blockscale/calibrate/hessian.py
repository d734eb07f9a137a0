"""Second moments of a layer's inputs, and the weight that makes up for quantized inputs.

A layer y = W x of the original model becomes Q xq, where xq are the inputs the quantized model feeds it:
quantized activations, computed by the already quantized layers before it. Q is to give, from xq, what W gives
from inputs part of the way back to the original ones, x' = xq + share (x - xq). Over T calibration tokens,
each divided by the root mean square of its xq, so that all tokens count alike,

    second = sum xq xq^T  (K, K)        cross = sum x xq^T  (K, K)

hold everything about the tokens that the summed squared error of the outputs depends on. With the penalty
D = damping * (diagonal of `second` + a tenth of its mean), and H = second + D,

    sum |W x' - Q xq|^2 + tr((W - Q) D (W - Q)^T)  =  tr((W' - Q) H (W' - Q)^T) + constant,
    W' = W + share W (cross - second) H^-1.

So one has to round W', not W, in the norm of H. The penalty pulls columns towards those of W. Its first part,
in proportion to what an input carries, shrinks the correlations between inputs, which differ from text to
text; its second part holds columns of inputs that carry next to nothing here and may carry more elsewhere.

Sources: GPTQ (arXiv:2210.17323) for the norm, GPTAQ (arXiv:2504.02692) and Qronos (arXiv:2505.11695) for the
target that sees the inputs of the original model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blockscale.errors import BlockscaleError

DAMPING = 0.1
# All of the way back (1) makes up for more on the calibration text and for less on other text: the regression
# on noisy inputs also shrinks the outputs.
SHARE = 0.5


@dataclass(frozen=True)
class Moments:
    """Sums over calibration tokens of one layer's inputs; linear layers that share inputs share them.

    Attributes:
        second: float32 (K, K), sum of xq xq^T.
        cross: float32 (K, K), sum of x xq^T.
        tokens: how many were summed.
    """

    second: torch.Tensor
    cross: torch.Tensor
    tokens: int = 0


def no_moments(width: int, device: torch.device | None = None) -> Moments:
    """Moments of no tokens of a layer with `width` inputs."""
    zeros = torch.zeros(width, width, dtype=torch.float32, device=device)
    return Moments(zeros, zeros.clone())


def add_tokens(moments: Moments, x: torch.Tensor, xq: torch.Tensor) -> Moments:
    """Moments with more tokens; the tensors of `moments` are added to in place.

    Args:
        moments: of the tokens so far.
        x: (..., K), inputs in the original model.
        xq: (..., K), inputs of the same tokens in the quantized model, after activation quantization.

    Raises:
        BlockscaleError: x, xq and the moments do not fit each other, or NaN or Inf in the inputs.
    """
    width = moments.second.shape[0]
    if x.shape != xq.shape or x.shape[-1] != width:
        raise BlockscaleError(
            "shapes differ", where="add_tokens: x, xq", expected=f"(..., {width}) twice",
            got=f"{list(x.shape)} and {list(xq.shape)}",
        )  # fmt: skip
    rows, quantized = x.reshape(-1, width).float(), xq.reshape(-1, width).float()
    size = quantized.square().mean(1, keepdim=True).sqrt()
    # A token of zeros adds nothing to either sum, whatever it is divided by.
    size = torch.where(size == 0, torch.ones_like(size), size)
    rows, quantized = rows / size, quantized / size
    moments.second.addmm_(quantized.T, quantized)
    moments.cross.addmm_(rows.T, quantized)
    if not bool((moments.second.diagonal() + moments.cross.diagonal()).isfinite().all()):
        raise BlockscaleError("NaN or Inf in calibration inputs", where="add_tokens: x, xq")
    return Moments(moments.second, moments.cross, moments.tokens + len(rows))


def damped(moments: Moments, damping: float) -> torch.Tensor:
    """H = second + D, float32 (K, K).

    Raises:
        BlockscaleError: a damping that is not positive.
    """
    if not damping > 0:
        raise BlockscaleError("bad damping", where="damping", expected="a positive number", got=damping)
    diagonal = moments.second.diagonal()
    mean = diagonal.mean()
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)
    return moments.second + (damping * (diagonal + mean / 10)).diag()


def target_weight(
    weight: torch.Tensor, moments: Moments, damping: float = DAMPING, share: float = SHARE
) -> torch.Tensor:
    """W', float32 (N, K): the unrounded weight of least output error.

    Args:
        weight: W (N, K), of the original model.
        moments: of its inputs.
        damping: see the module.
        share: how far the inputs that W is thought to see lie from xq (0) to x (1).
    """
    shift = (weight.float() @ (moments.cross - moments.second)).double()
    solved = torch.linalg.solve(damped(moments, damping).double(), shift, left=False)
    return weight.float() + share * solved.float()


def output_error(error: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """float32 (N,): e H e^T of every row e of a weight error (N, K) in the norm H (K, K)."""
    return ((error @ norm) * error).sum(1)
