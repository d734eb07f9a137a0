"""The choice of experts: the fast form of `blockscale.reference.routing`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from blockscale.ops import dispatch
from blockscale.reference import routing as reference
from blockscale.reference.routing import Routing

_FEW_TOKENS = 128  # up to which the inputs of a router's product are shared out among programs


def moe_choose(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    *,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of every token, from the router's inputs; logits are summed in float32.

    Args:
        x: (T, K), BF16, F16 or F32.
        weight: (E, K), of the router; of the dtype of x, or float32, for which x is widened.
        bias: float32 (E,), added to scores for the choice, or None.
        routing: the rule.
        backend: "auto" takes the fastest that works for the tensors' device.

    Returns:
        As moe_route.

    Raises:
        BlockscaleError: wrong dtype or shape, unknown backend.
    """
    wide = weight.dtype == torch.float32 or backend == "reference"
    kernels = dispatch.triton_kernels("moe_choose", "route", x.device, backend)
    if not wide and kernels is not None and 0 < len(x) <= _FEW_TOKENS:
        return _choose(kernels.logits_of(x, weight.contiguous()), bias, routing, backend)
    if wide or not x.is_cuda:
        return moe_route(F.linear(x.float(), weight.float()), bias, routing, backend=backend)
    return moe_route(torch.mm(x, weight.t(), out_dtype=torch.float32), bias, routing, backend=backend)


def moe_route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    *,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of every token; weights within a few ulps of the reference's.

    Args:
        logits: float32 (T, E).
        bias: float32 (E,), added to scores for the choice, or None.
        routing: the rule.
        backend: "auto" takes the fastest that works for the tensors' device.

    Returns:
        experts, int32 (T, topk + shared), and weights, float32 of the same shape: the routed ones in order of
        falling score, then the shared ones.

    Raises:
        BlockscaleError: wrong dtype or shape, unknown backend.
    """
    reference.check_route("moe_route", logits, bias)
    return _choose(logits.contiguous()[None], bias, routing, backend)


def _choose(
    parts: torch.Tensor, bias: torch.Tensor | None, routing: Routing, backend: dispatch.Backend
) -> tuple[torch.Tensor, torch.Tensor]:
    """From logits in parts (P, T, E) that are to be added up."""
    _, tokens, count = parts.shape
    kernels = dispatch.triton_kernels("moe_route", "route", parts.device, backend)
    if kernels is None or not kernels.fits(count, routing):
        return reference.moe_route(parts.sum(0), bias, routing)
    shape = tokens, routing.topk + routing.shared
    experts = torch.empty(shape, dtype=torch.int32, device=parts.device)
    weights = torch.empty(shape, dtype=torch.float32, device=parts.device)
    if experts.numel():
        kernels.moe_route(parts, bias, routing, experts, weights)
    return experts, weights
