"""transformers runs checkpoints in block-scaled FP8 on the operators of this package.

    from blockscale.huggingface import BlockscaleConfig, load_model

    model = load_model("my-model-fp8")                                 # a checkpoint as it is stored
    model = load_model("my-model", BlockscaleConfig(quantize=True))    # BF16, quantized as it is read

The latter is the same as `AutoModelForCausalLM.from_pretrained("my-model", quantization_config=...)`.

The names are loaded on first use: transformers is an optional dependency. Importing one of them registers the
quantization methods "blockscale" and "w4afp8" with transformers.

A stored checkpoint goes through `load_model`: its config.json names the method "fp8" or "compressed-tensors",
as engines want it, for which transformers accepts the config classes of its own quantizers only. It has none
for "w4afp8" and "blockscale": those it leaves to this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockscale.errors import BlockscaleError

if TYPE_CHECKING:
    from blockscale.huggingface.config import BlockscaleConfig
    from blockscale.huggingface.load import load_model
    from blockscale.huggingface.modules import format_summary, quantized_layers

_MODULES = {
    "BlockscaleConfig": "config",
    "format_summary": "modules",
    "load_model": "load",
    "quantized_layers": "modules",
}

__all__ = ["BlockscaleConfig", "format_summary", "load_model", "quantized_layers"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'blockscale.huggingface' has no attribute {name!r}")
    try:
        import_module("blockscale.huggingface.quantizer")  # registers the method
    except ImportError as error:
        raise BlockscaleError(
            "cannot run models by transformers",
            where="blockscale.huggingface",
            expected="transformers 5",
            got=error,
            remedy="pip install 'blockscale[eval]'",
        ) from error
    return getattr(import_module(f"blockscale.huggingface.{_MODULES[name]}"), name)
