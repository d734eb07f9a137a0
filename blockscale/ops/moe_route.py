"""The choice of experts: the fast form of `blockscale.reference.routing`."""

from __future__ import annotations

import torch

from blockscale.ops import dispatch
from blockscale.reference import routing as reference
from blockscale.reference.routing import Routing


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
    op = "moe_route"
    reference.check_route(op, logits, bias)
    kernels = dispatch.triton_kernels(op, "route", logits.device, backend)
    if kernels is None or not kernels.fits(logits.shape[1], routing):
        return reference.moe_route(logits, bias, routing)
    shape = logits.shape[0], routing.topk + routing.shared
    experts = torch.empty(shape, dtype=torch.int32, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if experts.numel():
        kernels.moe_route(logits.contiguous(), bias, routing, experts, weights)
    return experts, weights
