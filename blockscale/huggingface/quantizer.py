"""The quantization method "blockscale" of transformers: FP8 weights read as they are, or made while reading.

The order in which `from_pretrained` calls it:
1. before reading, with the model without storage: the headers of the files and the recipe say which
   parameters become FP8, and their modules are replaced (`targets`, `modules`);
2. the tables by which transformers merges experts get a copy for the scales (`HfQuantizer` does it by
   `serialized_names`);
3. while reading a checkpoint that is not quantized, `_Quantize` makes codes and scales of each parameter;
4. after reading: values that no header shows are checked, and the config says what the model now is.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from blockscale import reference
from blockscale.checkpoint.decide import FP8, Signature, decide_quantize
from blockscale.checkpoint.group_storage import LowBitWeight, activations_note
from blockscale.checkpoint.groups import low_bit_weights
from blockscale.checkpoint.model_config import without_quantization
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.formats import SAFETENSORS_DTYPES
from blockscale.group_spelling import WrittenFormat
from blockscale.huggingface.config import METHOD, METHODS, BlockscaleConfig, not_quantized
from blockscale.huggingface.modules import QuantizedLayer, format_summary, kept_layers, quantized_modules
from blockscale.huggingface.stored import Stored
from blockscale.huggingface.targets import (
    Target,
    check_stored,
    find_targets,
    read_signatures,
    replace_layers,
)

_logger = logging.getLogger(__name__)


class BlockscaleQuantizer(HfQuantizer):
    """Runs a model of transformers on FP8 weights; see `BlockscaleConfig`.

    Attributes:
        failures: errors of weights that could not be quantized, in the order they were read.
        codes: what the checkpoint calls the codes of weights, where that is not "weight".
    """

    requires_calibration = False
    quantization_config: BlockscaleConfig

    def __init__(self, quantization_config: BlockscaleConfig, **kwargs: Any) -> None:
        # The skip list of this model is written to it; the user's own object may serve others.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.failures: list[BlockscaleError] = []
        self.serialized_names: dict[str, list[str]] = {}  # known when the model is
        self.codes: set[str] = set()  # the same

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a checkpoint that is not quantized, and is not to be."""
        if not self.pre_quantized and self.quantization_config.recipe is None:
            raise not_quantized("from_pretrained")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        stored, quantization = read_signatures(checkpoint_files), config.quantization
        low = low_bit_weights(stored, quantization if self.pre_quantized else None)
        # Codes go by the name of their weight, as transformers is told in `update_weight_conversions`.
        self.codes = {f"weight{each.storage.codes}" for each in low.values()} - {"weight"}
        tensors = {low[name].name if name in low else name: each for name, each in stored.items()}
        chosen = self._chosen(tensors, model, low.values())
        groups = {name: group for name, group in chosen.items() if group is not None}
        targets = find_targets(model, tensors, chosen)
        if not targets:
            raise BlockscaleError(
                f"no linear layer of {type(model).__name__} would be FP8",
                expected="FP8 weights that belong to this model",
                got=f"{len(chosen)} of {len(tensors)} tensors, none of which it reads",
            )
        if self.pre_quantized:
            check_stored(targets, stored, quantization, low.values())
            _ignore(model, low.values())
        else:
            _read_unrounded(model, targets, tensors, dtype)
        layout = quantization.layout
        replace_layers(model, targets, config.fmt, config.compute, groups, layout)
        # Experts are merged with their scales if the first kind of scale is that of some experts.
        fused = any(".experts." in name for name in groups)
        ordered = sorted(set(chosen.values()), key=lambda group: (group is None) == fused)
        scales = [Stored(group=group, layout=layout).scale_name("weight") for group in ordered]
        self.serialized_names = {"weight": ["weight", *dict.fromkeys(scales)]}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """See `HfQuantizer`; before all others, codes get the name that weights have."""
        renamed = [WeightRenaming(rf"\.{name}$", ".weight") for name in sorted(self.codes)]
        return [*renamed, *super().update_weight_conversions(weight_conversions, model)]

    def _chosen(
        self, tensors: dict[str, Signature], model: Any, low: Iterable[LowBitWeight]
    ) -> dict[str, WrittenFormat | None]:
        """Tensors that are quantized, or that `blockscale quantize` would; with the format of fewer bits."""
        recipe = self.quantization_config.recipe
        if self.pre_quantized or recipe is None:
            fp8 = [name for name, (dtype, _) in tensors.items() if dtype == FP8]
            return {**dict.fromkeys(fp8), **{each.name: each.fmt for each in low}}
        recipe = replace(recipe, layout="blockscale")  # the one with a place for all that can be run
        decisions = decide_quantize(tensors, without_quantization(model.config.to_dict()), recipe)
        for warning in decisions.warnings:
            _logger.warning("%s", warning)
        return {name: each.group for name, each in decisions.by_name.items() if each.action == "quantize"}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether codes are made of what is read for a parameter."""
        path, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(path)
        return not self.pre_quantized and isinstance(module, QuantizedLayer) and leaf in module.stored

    def get_quantize_ops(self) -> ConversionOps:
        """What makes codes and scales of one parameter."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.failures:
            raise self.failures[0]
        for path, layer in quantized_modules(model):
            layer.requires_grad_(False)
            layer.convert()
            for name, scale in layer.fp8_scales():
                _check_scale(f"{path}.{name}", scale, layer)
        self.quantization_config.modules_to_not_convert = list(kept_layers(model))
        config = self.quantization_config
        note = activations_note(config.quantization, config.compute != "high")
        _logger.info("%s%s", format_summary(model), note)

    def is_serializable(self) -> bool:
        """No: `blockscale quantize` writes checkpoints."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No."""
        return False


for _method in METHODS:
    register_quantization_config(_method)(BlockscaleConfig)
register_quantizer(METHOD)(BlockscaleQuantizer)


class _Quantize(ConversionOps):
    """One parameter -> its codes and its scale, named as the layer that it is of has them."""

    def __init__(self, quantizer: BlockscaleQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """See `ConversionOps`; `input_dict` has the one parameter by its full name."""
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantizedLayer)
        try:
            codes, scale = layer.quantized(leaf, weight)
        except NonFiniteError as error:
            # transformers makes a report of what is raised here: the error has to wait until all is read.
            self.quantizer.failures.append(NonFiniteError(error.count, error.position, where=name))
            empty = getattr(layer, leaf), getattr(layer, layer.scale_name(leaf))
            codes, scale = (torch.zeros(each.shape, dtype=each.dtype, device=weight.device) for each in empty)
        return {name: codes, f"{path}.{layer.scale_name(leaf)}": scale}


def _ignore(model: Any, low: Iterable[LowBitWeight]) -> None:
    """Have transformers say nothing of what is beside codes and scales; this ends with the model."""
    leaves = {leaf for each in low for leaf in each.storage.more}
    known = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *(rf"\.{leaf}$" for leaf in leaves)}


def _read_unrounded(
    model: Any, targets: Sequence[Target], tensors: Mapping[str, Signature], dtype: torch.dtype
) -> None:
    """Have weights of another dtype than the model's read in float32: they are quantized from what is stored.

    The attribute is the model's list of patterns of what is never rounded; it ends with this model.
    """
    stored = {each.name: {SAFETENSORS_DTYPES[tensors[name][0]] for name in each.sources} for each in targets}
    wider = {re.escape(name) for name, dtypes in stored.items() if dtypes != {dtype}}
    model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict or ()) | wider


def _check_scale(name: str, scale: torch.Tensor, layer: QuantizedLayer) -> None:
    if layer.fmt.scale_fmt == "ue8m0" and not bool(reference.is_power_of_two(scale).all()):
        raise BlockscaleError(
            "scale is no power of two",
            where=name,
            expected="powers of two, as scale_fmt ue8m0 of config.json says",
            got=float(scale[~reference.is_power_of_two(scale)][0]),
            remedy="leave scale_fmt out of config.json if its scales are plain float32",
        )
