"""The product of a layer that trains through its rounding, and its gradients, as one step of autograd.

    y = q(x) w'^T + b      dx = dy w'      dw' = dy^T q(x), from there through the rounding      db = sum dy

Rounding and its gradients are those of `fake_quant`. One step rather than one for every factor, because
autograd would hand on dw' in the dtype of w': here BF16 products leave it in float32, as it was summed, which
spares a rounding, a pass over it, and most of what a small layer costs the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from blockscale import ops
from blockscale.calibrate.formats import QuantizedFormat
from blockscale.formats import BlockFP8
from blockscale.qat.fake_quant import rounded


class Rule(NamedTuple):
    """How a product is computed.

    Attributes:
        fmt: of the weight in the checkpoint.
        inputs: of what it is multiplied with; None leaves it as it is.
        compute: dtype of both operands.
    """

    fmt: QuantizedFormat
    inputs: BlockFP8 | None
    compute: torch.dtype


def fake_quant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    rule: Rule,
) -> torch.Tensor:
    """(..., K) -> (..., N), of the dtype of x, or of autocast.

    Args:
        x: BF16, F16 or F32.
        weight: (N, K).
        scale: of its blocks or groups, as of `fake_quantize_scaled`; None for dynamic ones.
        bias: (N,).
        rule: formats and compute.

    Raises:
        BlockscaleError: wrong dtype or shape.
    """
    return _Product.apply(x, weight, scale, bias, rule, result_dtype(x, rule.compute))


def result_dtype(x: torch.Tensor, compute: torch.dtype) -> torch.dtype:
    """Of a product with x: that of x, or of autocast, unless products are to be more exact than that."""
    device = x.device.type
    if compute != torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer on operands of one dtype, whatever autocast says."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return linear(x, weight, bias)
    return linear(x, weight, bias)


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a (M, K) times b (K, N) in `dtype`; on a GPU a float32 result is not rounded to BF16 on its way."""
    if a.is_cuda and dtype == torch.float32 and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """(..., K) as (M, K)."""
    return x.reshape(-1, x.shape[-1])


def weight_gradients(
    ctx: Any, of_value: torch.Tensor, fmt: QuantizedFormat, given: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a weight and its scales, the inputs 1 and 2 of a step, from that of w'.

    Args:
        ctx: of the step; knows `weight_dtype`.
        of_value: dw' (N, K).
        fmt: of the weight.
        given: weight and scales, or nothing if they are dynamic.
    """
    if not given:
        return of_value.to(ctx.weight_dtype), None
    weight, scale = given
    return ops.scaled_gradients(of_value, weight, scale, fmt, of_scale=ctx.needs_input_grad[2])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        rule: Rule,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        fmt, inputs, compute = rule
        a = x.to(compute) if inputs is None else ops.fake_quantize_activation(x, inputs, compute)
        b = rounded(weight, scale, fmt, compute)
        ctx.save_for_backward(a, b, *(() if scale is None else (weight, scale)))
        ctx.rule, ctx.x_dtype, ctx.weight_dtype = rule, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return exact_linear(a, b, None if bias is None else bias.to(compute)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, *given = ctx.saved_tensors
        dy = rows_of(grads[0]).to(b.dtype)
        dx = dw = ds = db = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, b, ctx.x_dtype).view(a.shape)
        if any(ctx.needs_input_grad[1:3]):
            of_value = product(dy.t(), rows_of(a), torch.promote_types(ctx.weight_dtype, b.dtype))
            dw, ds = weight_gradients(ctx, of_value, ctx.rule.fmt, given)
        if ctx.needs_input_grad[3]:
            db = dy.sum(0).to(ctx.bias_dtype)
        return dx, dw, ds, db, None, None
