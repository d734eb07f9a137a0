"""blockscale: block-scaled FP8 for large language models, checkpoints and numerics.

The public names are loaded on first use, so that `blockscale --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockscale.version import __version__

if TYPE_CHECKING:
    from blockscale.checkpoint.convert import (
        ConversionReport,
        RunOptions,
        dequantize_checkpoint,
        quantize_checkpoint,
    )
    from blockscale.checkpoint.inspect import Inspection, inspect_checkpoint
    from blockscale.checkpoint.lint.run import Lint, lint_checkpoint
    from blockscale.checkpoint.recipe import Recipe
    from blockscale.checkpoint.sizing import Parallelism, SizePlan, plan_checkpoint
    from blockscale.checkpoint.verify import Verification, verify_checkpoint
    from blockscale.errors import BlockscaleError
    from blockscale.formats import BlockFP8
    from blockscale.ops.dequantize_weight import dequantize_weight
    from blockscale.ops.quantize_activation import quantize_activation
    from blockscale.ops.quantize_weight import quantize_weight

_MODULES = {
    "BlockFP8": "formats",
    "BlockscaleError": "errors",
    "ConversionReport": "checkpoint.convert",
    "Inspection": "checkpoint.inspect",
    "Lint": "checkpoint.lint.run",
    "Parallelism": "checkpoint.sizing",
    "Recipe": "checkpoint.recipe",
    "RunOptions": "checkpoint.convert",
    "SizePlan": "checkpoint.sizing",
    "Verification": "checkpoint.verify",
    "dequantize_checkpoint": "checkpoint.convert",
    "dequantize_weight": "ops",
    "inspect_checkpoint": "checkpoint.inspect",
    "lint_checkpoint": "checkpoint.lint.run",
    "plan_checkpoint": "checkpoint.sizing",
    "quantize_activation": "ops",
    "quantize_checkpoint": "checkpoint.convert",
    "quantize_weight": "ops",
    "verify_checkpoint": "checkpoint.verify",
}

__all__ = [
    "BlockFP8",
    "BlockscaleError",
    "ConversionReport",
    "Inspection",
    "Lint",
    "Parallelism",
    "Recipe",
    "RunOptions",
    "SizePlan",
    "Verification",
    "__version__",
    "dequantize_checkpoint",
    "dequantize_weight",
    "inspect_checkpoint",
    "lint_checkpoint",
    "plan_checkpoint",
    "quantize_activation",
    "quantize_checkpoint",
    "quantize_weight",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'blockscale' has no attribute {name!r}")
    return getattr(import_module(f"blockscale.{_MODULES[name]}"), name)
