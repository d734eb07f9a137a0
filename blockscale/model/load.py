"""From a checkpoint folder to a model that runs."""

from __future__ import annotations

import logging
import os
from typing import Literal

import torch

from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.lanes import usable_device
from blockscale.checkpoint.model_config import CONFIG_NAME, parse_config
from blockscale.checkpoint.names import role_of
from blockscale.checkpoint.precision import AS_STORED, Precision, check_followed
from blockscale.checkpoint.source import Source, open_source
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8
from blockscale.model.architecture import ModelConfig
from blockscale.model.config import from_huggingface, load_config
from blockscale.model.linear import Compute
from blockscale.model.transformer import Transformer
from blockscale.model.weights import Files, Store, Weights
from blockscale.ops.gemm_dispatch import has_fp8

_logger = logging.getLogger(__name__)


def load_model(
    path: str | os.PathLike[str],
    *,
    config: ModelConfig | str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    compute: Compute | None = None,
    on_missing_scale: Literal["error", "keep"] = "error",
    precision: Precision | None = None,
    revision: str | None = None,
) -> Transformer:
    """Read a Hugging Face checkpoint of the DeepSeek-V2/V3 architecture, quantized or not.

    Args:
        path: local folder, Hub repository id or fsspec URL.
        config: instead of the folder's config.json: a file, or what was read of one.
        device: "cpu", "cuda" for the current GPU, or "auto" for a GPU that is there.
        dtype: of activations and of weights that are not FP8; bfloat16 or float32.
        compute: "fp8" multiplies FP8 weights with quantized activations, "high" with activations as they
            are. Default "fp8" on GPUs that have FP8 arithmetic, else "high", said in the log.
        on_missing_scale: refuse an FP8 weight without a scale, or use its values as they are and say so.
        precision: what linear layers are quantized or dequantized to as they are read; counts before the
            config's.
        revision: of a Hub repository.

    Raises:
        BlockscaleError: a config or checkpoint that is damaged, or not of this architecture; a precision that
            cannot be given.
    """
    source = open_source(path, revision)
    own = _own_config(source)
    if isinstance(config, (str, os.PathLike)):
        config = load_config(config, own)
    if config is None and own is None:
        raise BlockscaleError(
            "no config", where=source.spec, expected=CONFIG_NAME, remedy="name a config file"
        )
    if config is not None and own is not None:
        _check_agreement(config, own, source.spec)
    config = config or own
    assert config is not None
    place = torch.device(usable_device(device))
    store = Store(read_index(source).tensors, Files(source).bytes_of)
    weights = Weights(
        store,
        device=place,
        dtype=dtype,
        fmt=BlockFP8(config.weight_block_size or (128, 128), config.scale_fmt),
        compute=compute or ("fp8" if has_fp8(place) else "high"),
        on_missing_scale=on_missing_scale,
        precision=_checked((precision or AS_STORED).over(config.precision), store),
    )
    model = Transformer(config, weights)
    _logger.info("%s", weights.summary())
    if compute is None and weights.has_fp8 and not has_fp8(place):
        name = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
        _logger.warning("%s has no FP8 arithmetic: products run on dequantized weights", name)
    return model


def _own_config(source: Source) -> ModelConfig | None:
    if not source.exists(CONFIG_NAME):
        return None
    where = source.path(CONFIG_NAME)
    return from_huggingface(parse_config(source.read(CONFIG_NAME), where), where=where)


def _checked(precision: Precision, store: Store) -> Precision:
    """Itself, if it can be given."""

    def reason(name: str) -> str | None:
        wanted = precision.precision_of(name)
        return None if wanted == "fp8" else "set to bf16" if wanted else role_of(name)

    check_followed(precision, store.tensors, reason)
    return precision


def _check_agreement(given: ModelConfig, own: ModelConfig, where: str) -> None:
    """Refuse a config that names other quantization parameters than the checkpoint's own."""
    if own.dtype != "fp8":
        return
    for name in ("scale_fmt", "weight_block_size"):
        ours, theirs = getattr(given, name), getattr(own, name)
        if ours != theirs:
            raise BlockscaleError(
                f"{name} of the given config is not that of the checkpoint",
                where=where,
                expected=f"{theirs}, as its {CONFIG_NAME} says",
                got=ours,
                remedy=f"correct the given config, or leave it out to use {CONFIG_NAME}",
            )
