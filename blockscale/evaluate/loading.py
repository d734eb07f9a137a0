"""How models that are evaluated are loaded, and on what they run.

DeepSeek-V2 and V3 run on `blockscale.model`, everything else on transformers, with blockscale's own linear
layers where weights are FP8. A recipe quantizes a checkpoint as it is read, to the codes and scales that
`blockscale quantize` writes by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from blockscale.checkpoint.lanes import usable_device
from blockscale.checkpoint.model_config import CONFIG_NAME, read_config
from blockscale.checkpoint.precision import DEFAULT, parse_precision
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.source import Source, open_source
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8
from blockscale.model.config import from_huggingface
from blockscale.model.linear import Compute
from blockscale.model.load import load_model
from blockscale.model.transformer import Transformer
from blockscale.ops.gemm_dispatch import has_fp8
from blockscale.quantization_config import parse_quantization_config

Runtime = Literal["auto", "blockscale", "transformers"]
_OURS = ("deepseek_v2", "deepseek_v3")


@dataclass(frozen=True)
class Loading:
    """How a model is loaded and run.

    Attributes:
        runtime: "auto" takes `blockscale.model` for the architectures it knows.
        device: "cpu", "cuda" or "auto".
        dtype: of activations and of weights that are not FP8; default bfloat16 on GPUs, else float32.
        compute: "fp8" multiplies FP8 weights with quantized activations, "high" with activations as they are;
            None takes "fp8" where the device has FP8 arithmetic.
        recipe: what is quantized as it is read, and how; None leaves the checkpoint as it is stored. Of a
            checkpoint that is quantized, `blockscale.model` dequantizes what its precision says is bf16.
        revision: of a Hub repository.
        batch_size: windows or questions at a time.
    """

    runtime: Runtime = "auto"
    device: str = "auto"
    dtype: torch.dtype | None = None
    compute: Compute | None = "fp8"
    recipe: Recipe | None = None
    revision: str | None = None
    batch_size: int = 1

    def resolved(self) -> Loading:
        """The same with the device, dtype and arithmetic that are taken here.

        Raises:
            BlockscaleError: no such device.
        """
        device = torch.device(usable_device(self.device))
        return replace(
            self,
            device=device.type,
            dtype=self.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32),
            compute=self.compute or ("fp8" if has_fp8(device) else "high"),
        )

    def plain(self) -> Loading:
        """The same for another checkpoint, as it is stored."""
        return replace(self, recipe=None, revision=None)

    def spelled(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {**vars(self), "dtype": str(self.dtype), "recipe": self.recipe and self.recipe.spelled()}


def is_quantized(source: Source) -> bool:
    """Whether a checkpoint's config says that its weights are quantized."""
    return parse_quantization_config(read_config(source)) is not None


def open_model(spec: str, loading: Loading) -> Transformer | torch.nn.Module:
    """Load a checkpoint folder, Hub repository or URL, for the runtime that runs it.

    Raises:
        BlockscaleError: no such model, one that the runtime that was asked for does not know, or a recipe
            that it cannot follow.
    """
    loading = loading.resolved()
    source = open_source(spec, loading.revision)
    family = read_config(source).get("model_type")
    if loading.runtime == "blockscale" and family not in _OURS:
        raise BlockscaleError(
            "not an architecture of this runtime",
            where=f"{spec}: {CONFIG_NAME}: model_type",
            expected=" | ".join(_OURS),
            got=family,
            remedy="--runtime transformers",
        )
    if family in _OURS and loading.runtime != "transformers":
        return _load_ours(source, loading)
    return load_transformers(source, loading).to(loading.device)


def _load_ours(source: Source, loading: Loading) -> Transformer:
    """A model of `blockscale.model`, which has patterns in its precision alone and blocks of one size."""
    assert loading.dtype is not None
    recipe, config, precision = loading.recipe, None, None
    if recipe is not None:
        if recipe.include or recipe.exclude:
            raise BlockscaleError(
                "this runtime follows no include or exclude as it loads",
                where=source.spec,
                remedy="say it as --precision 'PATTERN=bf16', or take --runtime transformers",
            )
        precision = recipe.precision
        if is_quantized(source):
            if recipe.fmt != BlockFP8():
                raise BlockscaleError(
                    "source is already quantized, and keeps its blocks and scales",
                    where=source.spec,
                    remedy="leave --block-size and --scale-fmt out, or name the checkpoint it was made from",
                )
        else:
            fmt = recipe.fmt
            if not precision.quantizes:  # as `quantize`: all but what is named
                precision = precision.over(parse_precision({DEFAULT: "fp8"}))
            own = from_huggingface(read_config(source), where=source.path(CONFIG_NAME))
            quantized = {"weight_block_size": fmt.block_size, "scale_fmt": fmt.scale_fmt}
            config = own.model_copy(update=quantized)
    return load_model(
        source,
        config=config,
        device=loading.device,
        dtype=loading.dtype,
        compute=loading.compute,
        precision=precision,
    )


def load_transformers(source: Source, loading: Loading) -> torch.nn.Module:
    """A model of transformers on the CPU, with this package's layers where weights are or become FP8.

    Raises:
        BlockscaleError: a source that transformers does not read, or weights that do not fit together.
    """
    from transformers.utils import logging

    from blockscale.huggingface import BlockscaleConfig
    from blockscale.huggingface import load_model as load_quantized
    from blockscale.huggingface.load import load_as_stored, local_or_hub

    logging.disable_progress_bar()
    if loading.recipe is None and not is_quantized(source):
        plain: torch.nn.Module = load_as_stored(source, loading.dtype)
        return plain
    place, options = local_or_hub(source)
    compute: Literal["auto", "high"] = "auto" if loading.compute == "fp8" else "high"
    config = BlockscaleConfig(compute, loading.recipe or False)
    quantized: torch.nn.Module = load_quantized(place, config, dtype=loading.dtype, **options)
    return quantized.eval()
