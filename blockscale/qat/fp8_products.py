"""Products of FP8 in training: the package's block-scaled GEMM forward and for the gradient of the inputs.

    y   = Q(x) Q(w)^T + b       x in 1 x 128 groups, w in 128 x 128 blocks: the codes of the exporter
    dx  = Q(dy) Q(w)            dy in 1 x 128 groups along N; blocks of w^T are those of w, transposed
    dw' = dy^T x'               BF16, x' the values of Q(x), summed in float32; then through the rounding

as DeepSeek-V3 trains (arXiv:2412.19437, section 3.3), whose gradients of weights are FP8 too. y has the bits
of `ops.fp8_gemm_nt`. dx differs from the product with dy itself by the rounding of dy alone: 4 bits with
a scale of its own for every group, 2.6 % of the norm for Gaussian numbers.

Scales of dy are float32, whatever those of x are: nothing stores them. The floor of their amax is that of
gradients, not of activations: with a mean loss over a million tokens dy is far below 1e-4.

Of x the codes are kept for the way back, of w too: half of the memory that BF16 operands take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from blockscale import ops
from blockscale.calibrate.formats import QuantizedFormat
from blockscale.formats import BlockFP8
from blockscale.qat.fake_quant import unshared
from blockscale.qat.products import product, result_dtype, rows_of, weight_gradients
from blockscale.reference.fp8 import GRADIENT_AMAX_FLOOR

_GROUP = 128
_ALIGNMENT = 16  # of N and K, as the GEMM takes them: one is the other's place in dx
_RESULTS = (torch.bfloat16, torch.float32)


def takes_fp8(shape: tuple[int, ...], fmt: QuantizedFormat, inputs: BlockFP8 | None) -> bool:
    """Whether `fp8_linear` takes a weight: a matrix in FP8 blocks of 128 x 128, whose inputs are FP8."""
    if not isinstance(fmt, BlockFP8) or fmt.block_size != (_GROUP, _GROUP) or inputs is None:
        return False
    return len(shape) == 2 and not any(size % _ALIGNMENT for size in shape)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    fmt: BlockFP8,
) -> torch.Tensor:
    """(..., K) -> (..., N), of the dtype of x, or of autocast.

    Args:
        x: BF16, F16 or F32.
        weight: (N, K), such as `takes_fp8` says; BF16, F16 or F32.
        scale: float32 (ceil(N / 128), ceil(K / 128)), storable; None for dynamic ones.
        bias: (N,).
        fmt: of the weight, and for its scale format of the inputs.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    return _FP8Product.apply(x, weight, scale, bias, fmt, result_dtype(x, torch.bfloat16))


def weight_codes(
    weight: torch.Tensor, scale: torch.Tensor | None, fmt: BlockFP8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight as it is exported; nobody waits for the device.

    With dynamic scales NaN or Inf makes all scales NaN, so that the loss tells.
    """
    if scale is not None:
        return ops.quantize_scaled(weight, scale, fmt), scale
    flag = torch.empty(1, dtype=torch.int32, device=weight.device)
    codes, own = ops.quantize_weight(unshared(weight), fmt.block_size, fmt.scale_fmt, flag=flag)
    return codes, own.masked_fill_(flag.bool(), torch.nan)


class _FP8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        fmt: BlockFP8,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        a, a_scale = ops.quantize_activation(rows_of(x), _GROUP, fmt.scale_fmt, "column")
        b, b_scale = weight_codes(weight, scale, fmt)
        ctx.save_for_backward(a, a_scale, b, b_scale, *(() if scale is None else (weight, scale)))
        ctx.fmt, ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = fmt, x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        added = None if bias is None else bias.detach().float()
        y = ops.fp8_gemm_nt(a, a_scale, b, b_scale, bias=added, out_dtype=_result(dtype))
        return y.to(dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, a_scale, b, b_scale, *given = ctx.saved_tensors
        dy = rows_of(grads[0])
        dx = dw = ds = db = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy, b, b_scale, _result(ctx.x_dtype)).to(ctx.x_dtype).view(ctx.x_shape)
        if any(ctx.needs_input_grad[1:3]):
            values = ops.dequantize_weight(a, a_scale, (1, _GROUP), torch.bfloat16)
            of_value = product(dy.bfloat16().t(), values, torch.promote_types(ctx.weight_dtype, values.dtype))
            dw, ds = weight_gradients(ctx, of_value, ctx.fmt, given)
        if ctx.needs_input_grad[3]:
            db = dy.sum(0).to(ctx.bias_dtype)
        return dx, dw, ds, db, None, None


def _input_gradient(
    dy: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Q(dy) (M, N) times the codes (N, K) of a weight."""
    g, g_scale = ops.quantize_activation(dy, _GROUP, "float32", "column", amax_floor=GRADIENT_AMAX_FLOOR)
    across = ops.transpose_codes(b), b_scale.t().contiguous()
    return ops.fp8_gemm_nt(g, g_scale, *across, out_dtype=dtype)


def _result(dtype: torch.dtype) -> torch.dtype:
    """What the GEMM writes on the way to a dtype."""
    return dtype if dtype in _RESULTS else torch.float32
