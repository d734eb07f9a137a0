"""How transformers is to run a model on this package: the `quantization_config` of method "blockscale"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import pydantic
from transformers.utils.quantization_config import QuantizationConfigMixin

from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8, Layout, parse_block_size, parse_scale_fmt
from blockscale.group_spelling import spell_group_format
from blockscale.huggingface.linear import Compute
from blockscale.quantization_config import Quantization, parse_group_formats, parse_quantization_config

METHOD = "blockscale"
# Of config.json, for which transformers has no quantizer of its own.
METHODS = (METHOD, "w4afp8")
_OPTIONS = ("compute", "quantize")
_RECORD = (
    "layout",
    "weights_only",
    "weight_block_size",
    "scale_fmt",
    "group_formats",
    "modules_to_not_convert",
)
# Of an entry as `blockscale quantize` writes it; they have one value.
_FIXED = ("quant_method", "fmt", "activation_scheme")


class BlockscaleConfig(QuantizationConfigMixin):
    """How FP8 linear layers compute, and what is quantized as it is read.

    After loading, `model.config.quantization_config` is one of these. It then says too what the model is:
    the `layout` it was read from, `weight_block_size` and `scale_fmt` of its FP8 weights, `group_formats` of
    those of fewer than 8 bits, and in `modules_to_not_convert` the full paths of the other linear layers.

    Args:
        compute: what linear layers with FP8 weights do with their input.
            "auto": it is quantized, 1 x 128 groups in the scale format of the weights. GPUs with FP8
            arithmetic multiply codes (`ops.fp8_gemm_nt`); elsewhere, and for what no GEMM takes (blocks other
            than 128 x 128, sizes that 16 does not divide), it is as "fp8".
            "fp8": as "auto", but on every device the codes of both sides are dequantized and multiplied in
            float32: slow, and the same figures wherever it runs.
            "high": it stays as it is, and weights are dequantized to its dtype. Where a checkpoint says that
            weights alone are quantized, it is this in any case.
        quantize: for a checkpoint that is not quantized: a `Recipe`, its fields by name, or True for
            `Recipe()`. Its layout has no meaning here.

    Raises:
        BlockscaleError: an unknown option or value.
    """

    def __init__(
        self, compute: Compute = "auto", quantize: bool | Recipe | Mapping[str, Any] = False, **unknown: Any
    ) -> None:
        if unknown:
            raise BlockscaleError(
                f"unknown option {next(iter(unknown))}",
                where="BlockscaleConfig",
                expected=" | ".join(_OPTIONS),
                remedy="what is to be quantized, and how, is said in quantize=Recipe(...)",
            )
        if compute not in get_args(Compute):
            expected = " | ".join(get_args(Compute))
            raise BlockscaleError(
                "unknown value", where="BlockscaleConfig compute", expected=expected, got=repr(compute)
            )
        recipe = _recipe(quantize)
        # transformers writes all attributes to JSON: they are kept in its types.
        self.quant_method = METHOD
        self.compute: Compute = compute
        self.quantize = False if recipe is None else _spelled(recipe)
        self.weight_block_size = None if recipe is None else list(recipe.fp8.block_size)
        self.scale_fmt = None if recipe is None else recipe.scale_fmt
        self.layout: Layout = "blockscale"
        self.weights_only = False
        self.group_formats: dict[str, list[str]] | None = None
        self.modules_to_not_convert: list[str] = []

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> BlockscaleConfig | tuple[BlockscaleConfig, dict[str, Any]]:
        """What a model's config has as `quantization_config`, its record of the model included."""
        if config_dict.get("quant_method", METHOD) != METHOD:  # as it is in config.json
            quantization = parse_quantization_config({"quantization_config": config_dict})
            assert quantization is not None
            config_dict = cls().of_stored(quantization)
        record = {name: config_dict[name] for name in _RECORD if name in config_dict}
        rest = {name: value for name, value in config_dict.items() if name not in (*record, *_FIXED)}
        config = cls(**rest)
        for name, value in record.items():
            setattr(config, name, value)
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def recipe(self) -> Recipe | None:
        """What to quantize as it is read, or None for a checkpoint that is run as it is stored."""
        return _recipe(self.quantize)

    @property
    def fmt(self) -> BlockFP8:
        """Block size and scale format of the FP8 weights.

        Raises:
            BlockscaleError: they are not known, neither from a checkpoint nor from a recipe.
        """
        where = "quantization_config weight_block_size"
        return BlockFP8(parse_block_size(self.weight_block_size, where), parse_scale_fmt(self.scale_fmt))

    @property
    def quantization(self) -> Quantization:
        """How a checkpoint is stored, as its config.json says."""
        low = parse_group_formats(self.group_formats, "quantization_config")
        return Quantization(
            self.layout,
            self.fmt,
            tuple(self.modules_to_not_convert),
            low=low,
            weights_only=self.weights_only,
        )

    def of_stored(self, quantization: Quantization) -> dict[str, Any]:
        """The entry of a model's config by which this quantizer runs its checkpoint, which is stored so."""
        formats: dict[str, list[str]] = {}
        for each in quantization.low:
            formats.setdefault(spell_group_format(each.fmt), []).extend(each.targets)
        return {
            "quant_method": METHOD,
            "compute": "high" if quantization.weights_only else self.compute,
            "layout": quantization.layout,
            "weights_only": quantization.weights_only,
            "weight_block_size": list(quantization.fmt.block_size),
            "scale_fmt": quantization.fmt.scale_fmt,
            "group_formats": formats or None,
            "modules_to_not_convert": list(quantization.skip),
        }


def not_quantized(where: object) -> BlockscaleError:
    """The error for a checkpoint without FP8 weights and a config without a recipe."""
    return BlockscaleError(
        "checkpoint is not quantized",
        where=where,
        expected="quantization_config in config.json",
        remedy="pass BlockscaleConfig(quantize=True), or load it with transformers alone",
    )


def _recipe(value: object) -> Recipe | None:
    if isinstance(value, Recipe):
        return value
    if isinstance(value, bool):
        return Recipe() if value else None
    where = "BlockscaleConfig quantize"
    if not isinstance(value, Mapping):
        raise BlockscaleError("unknown value", where=where, expected="True or a Recipe", got=repr(value))
    try:
        return pydantic.TypeAdapter(Recipe).validate_python(dict(value))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise BlockscaleError(
            f"bad recipe: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=where,
            expected=f"some of {', '.join(field.name for field in fields(Recipe))}",
        ) from error


def _spelled(recipe: Recipe) -> dict[str, Any]:
    """The fields that have a meaning here, as JSON has them and `_recipe` reads them."""
    return {
        "scale_fmt": recipe.scale_fmt,
        "block_size": list(recipe.fp8.block_size),
        "include": list(recipe.include),
        "exclude": list(recipe.exclude),
        "precision": {key: str(wanted) for key, wanted in recipe.precision.entries},
    }
