"""Chains that end in `quantize_activation`, in plain PyTorch: SwiGLU, and RMSNorm with a residual.

    silu_mul   y = silu(gate) * up                                      gate | up = x
    rms_norm   y = h / sqrt(mean(h**2) + eps) * weight                  h = x + residual

Both keep the roundings of the Llama and DeepSeek models in Hugging Face transformers: the norm in float32
whatever the input; the normalized values, their product with `weight` and the residual sum rounded to the
dtype of the input. silu is float32 too, and its product with `up` is rounded once. Where PyTorch leaves a
rounding open (its exp and rsqrt, and the order of a sum, differ from device to device), it is fixed here, so
that every implementation has the same bits:
- exp is a polynomial in fused multiply-adds, within 2 ulps (`_exp`); silu(x) = x / (1 + exp(-x));
- the squares are summed in float64 and rounded to float32 once, where no order of summation shows any more;
- 1 / sqrt is a correctly rounded root and a correctly rounded division.
"""

from __future__ import annotations

import torch

from blockscale.errors import BlockscaleError
from blockscale.formats import ScaleFmt
from blockscale.reference import checks
from blockscale.reference.fp8 import ScaleLayout, quantize_activation

# exp(r) = 1 + r (1 + r q(r)) on |r| <= ln(2) / 2; q minimizes the relative error (3e-9). Highest power first.
_EXP_COEFFICIENTS = (
    0.001381453825160861,
    0.00836874544620514,
    0.04166838899254799,
    0.1666652113199234,
    0.4999999403953552,
)
_LOG2_E = 1.4426950216293335
# ln(2) in two parts; the first has 9 bits, so that its product with the exponent is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -0.00021219444170128554
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, in the low bits of the sum
# Past this the exponential leaves float32's normal numbers, and silu is at its limits.
_SILU_LIMIT = 87.0


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in float32, rounded once to the dtype of x.

    Args:
        x: (..., 2I), gate and up side by side; BF16, F16 or F32.

    Returns:
        (..., I), of the dtype of x.
    """
    check_gate_up("silu_mul", x)
    gate, up = x.detach().to(torch.float32).chunk(2, dim=-1)
    return (silu(gate) * up).to(x.dtype)


def silu_mul_quantize(
    x: torch.Tensor,
    group_size: int = 128,
    scale_fmt: ScaleFmt = "float32",
    scale_layout: ScaleLayout = "row",
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes (..., I) and scales (..., ceil(I/G)) of silu_mul(x), x (..., 2I); as quantize_activation."""
    return quantize_activation(silu_mul(x), group_size, scale_fmt, scale_layout)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) in float32, rounded to the dtype of x, times weight, rounded again.

    Args:
        x: (..., K); BF16, F16 or F32.
        weight: (K,), of the dtype of x.
        eps: added to the mean, in float32.

    Source: LlamaRMSNorm and DeepseekV3RMSNorm of Hugging Face transformers.
    """
    check_norm("rms_norm", x, weight, None)
    hidden = x.detach().to(torch.float32)
    total = hidden.to(torch.float64).square().sum(-1, keepdim=True).to(torch.float32)
    variance = total / torch.full_like(total, x.shape[-1])
    # PyTorch's float32 root is an ulp off at times; from float64 it is the correctly rounded one.
    root = (variance + eps).to(torch.float64).sqrt().to(torch.float32)
    return (hidden * (torch.ones_like(root) / root)).to(x.dtype) * weight.detach()


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_fmt: ScaleFmt = "float32",
    residual: torch.Tensor | None = None,
    scale_layout: ScaleLayout = "row",
) -> tuple[torch.Tensor, ...]:
    """E4M3 codes and scales of rms_norm(x + residual, weight, eps); as quantize_activation.

    Args:
        x: (..., K); BF16, F16 or F32.
        weight: (K,), of the dtype of x.
        eps: added to the mean square, in float32.
        group_size: G, values of a row that share a scale.
        scale_fmt: "float32" or "ue8m0".
        residual: of the shape and dtype of x; added before the norm, rounded to that dtype.
        scale_layout: "row" or "column".

    Returns:
        (codes, scale), or (codes, scale, x + residual) if there is a residual.
    """
    check_norm("rms_norm_quantize", x, weight, residual)
    if residual is None:
        return quantize_activation(rms_norm(x, weight, eps), group_size, scale_fmt, scale_layout)
    hidden = add_residual(x, residual)
    return *quantize_activation(rms_norm(hidden, weight, eps), group_size, scale_fmt, scale_layout), hidden


def add_residual(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """x + residual, rounded to their dtype; every NaN is the canonical one."""
    hidden = x.detach() + residual.detach()
    return hidden.masked_fill(hidden.isnan(), torch.nan)


def silu(x: torch.Tensor) -> torch.Tensor:
    """float32 x / (1 + exp(-x)), within 2 ulps; -0 below -87 and x above 87, NaN of NaN and of -Inf."""
    value = x / (1.0 + _exp(-x))
    return torch.where(x.abs() > _SILU_LIMIT, torch.where(x > 0, x, x * 0.0), value)


def check_gate_up(op: str, x: torch.Tensor) -> None:
    """x (..., 2I), BF16, F16 or F32."""
    checks.check_rows(op, x, 1)
    if x.shape[-1] % 2:
        raise BlockscaleError(
            "wrong shape", where=f"{op}: x", expected="(..., 2I), gate and up", got=list(x.shape)
        )


def check_norm(op: str, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    """x (..., K), weight (K,) and residual (..., K) of one dtype on one device."""
    checks.check_rows(op, x, 1)
    others = [("weight", weight, tuple(x.shape[-1:]))]
    if residual is not None:
        others.append(("residual", residual, tuple(x.shape)))
    for name, tensor, shape in others:
        checks.check_dtype(f"{op}: {name}", tensor.dtype, (x.dtype,))
        checks.check_shape(f"{op}: {name}", tuple(tensor.shape), shape)
        if tensor.device != x.device:
            raise BlockscaleError(
                "on another device", where=f"{op}: {name}", expected=x.device, got=tensor.device
            )


def _exp(x: torch.Tensor) -> torch.Tensor:
    """float32 exp of |x| <= 87: exponent and remainder, polynomial, and the exponent added to the bits."""
    shifted = _fma(x, _LOG2_E, _ROUND)
    n = shifted - _ROUND
    r = _fma(n, -_LN2_LOW, _fma(n, -_LN2_HIGH, x))
    first, *others = _EXP_COEFFICIENTS
    p = torch.full_like(r, first)
    for coefficient in (*others, 1.0, 1.0):
        p = _fma(p, r, coefficient)
    return (p.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)


def _fma(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """float32 a * b + c; the product is exact in float64, and its sum is rounded to float32 once more.

    For every BF16 and F16 argument of silu that gives the bits of a fused multiply-add.
    """
    wide_b = b.to(torch.float64) if isinstance(b, torch.Tensor) else b
    wide_c = c.to(torch.float64) if isinstance(c, torch.Tensor) else c
    return (a.to(torch.float64) * wide_b + wide_c).to(torch.float32)
