"""How a model trains through its rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from blockscale.errors import BlockscaleError

Scales = Literal["dynamic", "frozen", "learned"]
Activations = Literal["fp8", "high"]
Compute = torch.dtype | Literal["fp8"]
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class QatOptions:
    """How a model trains; the recipe says what becomes of it.

    Attributes:
        scales: of weights. "dynamic": from the largest values, at every step, as `blockscale quantize` gives
            them. "frozen": those of the beginning. "learned": trained along (LSQ).
        activations: "fp8" as they will be when the checkpoint is served, or "high": left as they are, for
            engines that quantize weights alone.
        masters: dtype of the weights that train and are rounded, float32 or bfloat16.
        compute: how products are computed. In float32 operands are exactly those of the checkpoint; in
            bfloat16, which GPUs multiply much faster, only those with power of two scales are, others are
            rounded once more. "fp8" multiplies codes, exactly those of the checkpoint, where a linear layer
            has FP8 blocks of 128 x 128 and FP8 inputs, in the gradient of the inputs too; all others are in
            bfloat16.

    Raises:
        BlockscaleError: an unknown value.
    """

    scales: Scales = "dynamic"
    activations: Activations = "fp8"
    masters: torch.dtype = torch.float32
    compute: Compute = torch.float32

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "scales": get_args(Scales),
            "activations": get_args(Activations),
            "masters": _DTYPES,
            "compute": (*_DTYPES, "fp8"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                expected = " | ".join(map(str, allowed))
                raise BlockscaleError(
                    "unknown value", where=f"QatOptions {name}", expected=expected, got=value
                )
