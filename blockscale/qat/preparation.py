"""Make a model train through the rounding of a recipe: its layers are replaced, and nothing else changes.

Which weights a recipe names is decided by the names, shapes and families of checkpoints. So the model is
asked what it would be saved as (experts apart, names as on disk), the decision is the one of
`blockscale quantize`, and what is decided is found again in the model by the tables with which transformers
reads checkpoints.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from blockscale.calibrate.formats import QuantizedFormat, inputs_of_format
from blockscale.checkpoint.decide import Signature, decide_quantize
from blockscale.checkpoint.model_config import without_quantization
from blockscale.checkpoint.recipe import AUTO, Recipe
from blockscale.errors import BlockscaleError
from blockscale.formats import DTYPE_NAMES, BlockFP8
from blockscale.huggingface.modules import quantized_layers
from blockscale.huggingface.targets import Target, find_targets
from blockscale.ops.gemm_dispatch import has_fp8
from blockscale.qat.initial import begin_with
from blockscale.qat.modules import (
    QatOptions,
    Trained,
    check_replaceable,
    fake_quant_layer,
    fake_quant_layers,
    scale_shift_name,
    start_scale_name,
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """A parameter that a recipe quantizes.

    Attributes:
        target: its name in the model, and the tensors of a checkpoint that it is made of.
        fmt: of those.
    """

    target: Target
    fmt: QuantizedFormat


def prepare(
    model: Any,
    recipe: Recipe,
    options: QatOptions | None = None,
    *,
    initial: str | os.PathLike[str] | None = None,
) -> Any:
    """Put layers that train through their rounding in the place of all that a recipe quantizes.

    Parameters keep their names, and are the same objects unless `options.masters` is another dtype than
    theirs: make the optimizer afterwards.

    Args:
        model: causal language model of transformers with unquantized weights; changed in place. After an
            error about the values of a weight or about the initial checkpoint it has to be loaded again.
        recipe: as of `blockscale quantize`; the layout counts where it has no place for a format.
        options: default `QatOptions()`.
        initial: checkpoint that is quantized by the same recipe, calibrated for instance: its codes and
            scales are what training begins with. Scales must be frozen or learned. All that is not quantized
            is the model's.

    Returns:
        The model.

    Raises:
        BlockscaleError: the recipe quantizes nothing, asks for block sizes by the values of weights or has a
            pattern that matches nothing; a weight that it quantizes does not require a gradient, or is in a
            layer that cannot be replaced; a model that is quantized or prepared already; an initial
            checkpoint that does not fit, or scales that are dynamic with one.
        NonFiniteError: a weight whose scales are to be fixed holds NaN or Inf.
    """
    options = QatOptions() if options is None else options
    _check_model(model)
    if initial is not None and options.scales == "dynamic":
        raise BlockscaleError(
            "dynamic scales would replace those of the initial checkpoint",
            where="prepare: scales",
            expected="frozen | learned",
            remedy='pass QatOptions(scales="frozen")',
        )
    chosen = choose(model, recipe)
    _check_trainable(model, chosen)
    if options.compute == "fp8":
        _check_fp8(model, chosen)
    by_module: dict[str, dict[str, Trained]] = {}
    for each in chosen:
        inputs = inputs_of_format(each.fmt, recipe.scale_fmt) if options.activations == "fp8" else None
        trained = Trained(each.target.name, each.fmt, inputs, each.target.parts)
        by_module.setdefault(each.target.path, {})[each.target.leaf] = trained
    for path, parameters in by_module.items():  # before anything is changed
        check_replaceable(model.get_submodule(path), parameters)
    for path, parameters in by_module.items():
        layer = fake_quant_layer(model.get_submodule(path), options, recipe, parameters)
        layer.train(model.get_submodule(path).training)
        model.set_submodule(path, layer)
    if initial is not None:
        begin_with(model, {each.target: each.fmt for each in chosen}, initial)
    return model


def choose(model: Any, recipe: Recipe) -> tuple[Chosen, ...]:
    """The parameters that a recipe quantizes, by the decisions of `blockscale quantize`.

    Args:
        model: of transformers, prepared or not.
        recipe: as of `prepare`.

    Raises:
        BlockscaleError: see `prepare`.
    """
    if recipe.block_size == AUTO:
        raise BlockscaleError(
            "block sizes are not chosen by values that change",
            where="recipe block_size",
            expected="as 128x128",
            got=AUTO,
            remedy="name the block size",
        )
    tensors = saved_signatures(model)
    decisions = decide_quantize(tensors, without_quantization(model.config.to_dict()), recipe)
    for warning in decisions.warnings:
        _logger.warning("%s", warning)
    formats: dict[str, QuantizedFormat] = {}
    for name, each in decisions.by_name.items():
        if each.group is not None:
            formats[name] = each.group
        elif each.block_size is not None:
            formats[name] = BlockFP8(each.block_size, recipe.scale_fmt)
    targets = find_targets(model, tensors, formats)
    lost = sorted(formats.keys() - {name for target in targets for name in target.sources})
    if lost:
        raise BlockscaleError(
            f"{len(lost)} weights that the recipe quantizes are not found in the model again",
            where=lost[0],
            expected="names that transformers reads as it writes them",
            remedy="exclude them in the recipe",
        )
    chosen = []
    for target in targets:
        fmt = formats[target.sources[0]]
        odd = next((name for name in target.sources if formats[name] != fmt), None)
        if odd is not None:
            expected = f"one format for all of {target.name}"
            raise BlockscaleError("has another format than the others", where=odd, expected=expected)
        chosen.append(Chosen(target, fmt))
    return tuple(chosen)


def saved_signatures(model: Any) -> dict[str, Signature]:
    """Name -> (safetensors dtype, shape) of the tensors that a model is saved as."""
    state = saved_state(model, model.state_dict())
    empty = {name: torch.empty_like(each, device="meta") for name, each in state.items()}
    saved = revert_weight_conversion(model, empty)
    return {name: (DTYPE_NAMES[each.dtype], tuple(each.shape)) for name, each in saved.items()}


def saved_state(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a state dict is saved, under the names of transformers: no scales, tied weights once."""
    own = {
        f"{path}.{make(name)}"
        for path, layer in fake_quant_layers(model)
        for name in layer.trained
        for make in (start_scale_name, scale_shift_name)
    }
    known = dict(model.named_parameters(remove_duplicate=False))
    tied = {
        name
        for name, other in model.all_tied_weights_keys.items()
        if name in known and known[name] is known.get(other)
    }
    return {name: tensor for name, tensor in state.items() if name not in own | tied}


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise BlockscaleError(
            "is no model of transformers",
            where="prepare",
            expected="what AutoModelForCausalLM.from_pretrained gives",
            got=type(model).__name__,
            remedy="load it with transformers; blockscale.model has no backward pass, but runs the export",
        )
    remedy = None
    if next(fake_quant_layers(model), None) is not None:
        what, remedy = "model is prepared already", "load it again to prepare it by another recipe"
    elif quantized_layers(model) or getattr(model.config, "quantization_config", None) is not None:
        what, remedy = "model is quantized already", "dequantize the checkpoint, and name it as initial"
    else:
        return
    raise BlockscaleError(what, where="prepare", expected="unquantized weights", remedy=remedy)


def _check_trainable(model: nn.Module, chosen: tuple[Chosen, ...]) -> None:
    names = [each.target.name for each in chosen]
    frozen = [name for name in names if not model.get_parameter(name).requires_grad]
    if frozen:
        raise BlockscaleError(
            f"{len(frozen)} of the {len(names)} weights that the recipe quantizes are frozen",
            where=frozen[0],
            expected="requires_grad=True",
            remedy="unfreeze them, or exclude them in the recipe; freeze what is not to train after prepare",
        )


def _check_fp8(model: nn.Module, chosen: tuple[Chosen, ...]) -> None:
    for each in chosen:
        device = model.get_parameter(each.target.name).device
        if not has_fp8(device):
            raise BlockscaleError(
                "FP8 products need a GPU with FP8 arithmetic",
                where="prepare: compute",
                expected="weights on a GPU of compute capability 8.9 or later",
                got=f"{each.target.name} on {device}",
                remedy="move the model to such a GPU first, or pass QatOptions(compute=torch.bfloat16)",
            )
