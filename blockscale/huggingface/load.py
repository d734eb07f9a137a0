"""From a checkpoint to a model of transformers that runs on this package."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from blockscale.checkpoint.source import Source
from blockscale.errors import BlockscaleError
from blockscale.formats import spell_block_size
from blockscale.huggingface.config import BlockscaleConfig, not_quantized
from blockscale.quantization_config import parse_quantization_config

# What says where the files are, and counts for config.json as for the weights.
_HUB_OPTIONS = (
    *("cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder"),
    *("token", "trust_remote_code"),
)


def load_model(
    path: str | os.PathLike[str],
    config: BlockscaleConfig | None = None,
    *,
    auto_class: Any = None,
    **options: Any,
) -> Any:
    """A model of transformers with FP8 linear layers, in evaluation mode.

    A stored checkpoint has the method "fp8" in its config.json, for which transformers accepts no config but
    that of its own quantizer: its config is read here first, and the method in it replaced.

    Args:
        path: local folder, or id of a Hub repository: a checkpoint in any layout that `blockscale quantize`
            writes, or one that is not quantized if `config` says what to quantize.
        config: how to compute and what to quantize; default `BlockscaleConfig()`.
        auto_class: a class with `from_pretrained`; default `transformers.AutoModelForCausalLM`.
        options: passed on to `from_pretrained`: dtype, device_map, revision, ...

    Raises:
        BlockscaleError: the checkpoint is not quantized and `config` says nothing to quantize, or the other
            way round; a format that is not known here; weights whose scales are missing or do not fit.
    """
    config = BlockscaleConfig() if config is None else config
    loader = AutoModelForCausalLM if auto_class is None else auto_class
    model_config = AutoConfig.from_pretrained(
        path, **{name: options[name] for name in _HUB_OPTIONS if name in options}
    )
    entry = getattr(model_config, "quantization_config", None)
    if entry is None:
        if config.recipe is None:
            raise not_quantized(path)
        return loader.from_pretrained(path, quantization_config=config, **options)
    model_config.quantization_config = _stored_entry(path, entry, config)
    return loader.from_pretrained(path, config=model_config, **options)


def load_as_stored(source: Source, dtype: Any = "auto", *, auto_class: Any = AutoModelForCausalLM) -> Any:
    """A model of transformers on the CPU, in evaluation mode, of a checkpoint that is not quantized.

    Args:
        source: local folder or Hub repository.
        dtype: of the weights; by default as they are stored.
        auto_class: a class with `from_pretrained`.

    Raises:
        BlockscaleError: a source that transformers does not read.
    """
    place, options = local_or_hub(source)
    return auto_class.from_pretrained(place, dtype=dtype, **options).eval()


def local_or_hub(source: Source) -> tuple[str, dict[str, str]]:
    """What transformers calls a source: a path, or a repository with the commit that was opened.

    Raises:
        BlockscaleError: it is neither.
    """
    if source.is_local:
        return source.root, {}
    if not source.pinned:
        expected = "a local folder or a Hub repository"
        raise BlockscaleError("transformers reads no URLs", where=source.spec, expected=expected)
    repository, _, rest = source.root.partition("@")
    commit, _, folder = rest.partition("/")
    return repository, {"revision": commit, "subfolder": folder}


def _stored_entry(path: object, entry: Any, config: BlockscaleConfig) -> dict[str, Any]:
    quantization = parse_quantization_config({"quantization_config": entry})
    if config.recipe is not None:
        raise BlockscaleError(
            "source is already quantized",
            where=path,
            expected="no quantization_config in config.json",
            remedy="leave quantize out, or run blockscale dequantize first",
        )
    scheme = entry.get("activation_scheme", "dynamic")
    if quantization is None or scheme != "dynamic":
        raise BlockscaleError(
            "cannot be run on this package",
            where=f"{path} quantization_config",
            expected='activation_scheme "dynamic"',
            got=f"{entry.get('quant_method')}, {scheme}",
            remedy="run blockscale dequantize, then quantize",
        )
    if quantization.groups:
        raise BlockscaleError(
            "model with several block sizes cannot be run",
            where=f"{path} quantization_config",
            expected="one",
            got=", ".join(map(spell_block_size, quantization.block_sizes)),
            remedy="run blockscale dequantize, then quantize with one",
        )
    return config.of_stored(quantization)
