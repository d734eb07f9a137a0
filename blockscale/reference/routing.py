"""Which experts a token goes to, and with what weights; all in float32.

Scores are a sigmoid or softmax of the router's logits. A correction bias, where there is one, counts in the
choice and not in the weights. Experts may stand in groups: of a group counts the sum of its best `group_best`
scores, and only experts of the best groups are chosen. Chosen experts stand in order of falling score.

Source: `Gate` of DeepSeek-V3's `inference/model.py`, `DeepseekV2Moe` and `DeepseekV3TopkRouter` of
transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from blockscale.reference import checks


@dataclass(frozen=True)
class Routing:
    """How experts are chosen.

    Attributes:
        topk: experts of a token, besides the shared ones.
        scoring: what makes scores of logits.
        groups: equal groups of neighbouring experts; 1 for none.
        topk_group: groups whose experts can be chosen.
        group_best: 1 or 2, how many scores of a group are added up.
        normalize: divide the weights of the chosen experts by their sum.
        scale: factor of the weights.
        shared: experts behind the routed ones that every token goes to with weight 1.
    """

    topk: int
    scoring: Literal["sigmoid", "softmax"]
    groups: int = 1
    topk_group: int = 1
    group_best: int = 1
    normalize: bool = False
    scale: float = 1.0
    shared: int = 0


def moe_route(
    logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of every token.

    Args:
        logits: float32 (T, E).
        bias: float32 (E,), added to scores for the choice, or None.
        routing: the rule.

    Returns:
        experts, int32 (T, topk + shared), and weights, float32 of the same shape; the shared ones last.
    """
    check_route("moe_route", logits, bias)
    scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if routing.groups > 1:
        grouped = choice.view(len(choice), routing.groups, -1)
        best = grouped.topk(routing.group_best).values.sum(-1)
        chosen = best.topk(routing.topk_group, sorted=False).indices
        out = torch.ones_like(best, dtype=torch.bool).scatter(1, chosen, value=False)
        choice = grouped.masked_fill(out[..., None], -torch.inf).flatten(1)
    experts = choice.topk(routing.topk).indices
    weights = scores.gather(1, experts)
    if routing.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    always = torch.arange(routing.shared, device=logits.device) + logits.shape[1]
    always = always.expand(len(experts), -1)
    experts = torch.cat([experts, always], 1).to(torch.int32)
    return experts, torch.cat([weights * routing.scale, torch.ones_like(always, dtype=torch.float32)], 1)


def check_route(op: str, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Logits (T, E) and bias (E,), float32."""
    checks.check_dtype(f"{op}: logits", logits.dtype, (torch.float32,))
    if bias is not None:
        checks.check_dtype(f"{op}: bias", bias.dtype, (torch.float32,))
        checks.check_shape(f"{op}: bias", tuple(bias.shape), (logits.shape[1],))
