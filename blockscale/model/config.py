"""Reads the architecture of a model from Hugging Face's config.json, or from DeepSeek's own config file.

A value that cannot be honoured is refused where it is read; null counts as missing. In config.json, keys that
decide which tensors there are have no default; how tokens are routed has the family's in transformers.

Sources: `configuration_deepseek_v2.py`, `configuration_deepseek_v3.py` and `modeling_rope_utils.py` of
transformers 5.23.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blockscale.checkpoint.model_config import CONFIG_NAME, parse_config
from blockscale.errors import BlockscaleError
from blockscale.formats import spell_block_size
from blockscale.model.architecture import ModelConfig, Yarn, checked_config
from blockscale.model.model_args import MODEL_ARGS, from_deepseek, gives_precision, with_precision
from blockscale.quantization_config import QUANTIZATION_KEYS, parse_quantization_config

__all__ = ["ModelConfig", "Yarn", "from_deepseek", "from_huggingface", "load_config"]

_logger = logging.getLogger(__name__)

# What a family means by a key that is missing.
_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
    },
    "deepseek_v3": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
    },
}
_DENSE = {
    "n_shared_experts": 0,
    "num_experts_per_tok": 0,
    "moe_intermediate_size": 0,
    "first_k_dense_replace": 0,
}
_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}
# What config.json says under the same name: not of rotary embeddings, and its `dtype` is another.
_COMMON = frozenset(ModelConfig.model_fields) - {
    *("rope_theta", "rope_scaling"),
    *("dtype", "scale_fmt", "weight_block_size", "precision", "stored"),
}
_NULLABLE = frozenset({"q_lora_rank", "n_routed_experts", "n_shared_experts"})
# Keys with one value that can be honoured.
_FIXED: dict[str, object] = {"hidden_act": "silu", "mlp_bias": False, "use_mla": True}
_FIXED_ROPE: dict[str, object] = {"partial_rotary_factor": 1.0, "truncate": True}
# Read apart from the others, or without a meaning for inference.
_OTHER = frozenset(
    [
        "model_type",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "architectures",
        "auto_map",
        "blockscale",
        "_name_or_path",
        "problem_type",
        "transformers_version",
        "attention_dropout",
        "aux_loss_alpha",
        "initializer_range",
        "pretraining_tp",
        "seq_aux",
        "chunk_size_feed_forward",
        "is_decoder",
        "is_encoder_decoder",
        "return_dict",
        "use_cache",
        "dtype",
        "torch_dtype",
        "ep_size",
        "head_dim",
        "num_key_value_heads",
        "qk_head_dim",
        "pad_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "router_aux_loss_coef",
    ]
).union(QUANTIZATION_KEYS)


def load_config(path: str | os.PathLike[str], own: ModelConfig | None = None) -> ModelConfig:
    """Read a Hugging Face config.json, a folder that has one, or DeepSeek's own config file.

    Args:
        path: the file or folder.
        own: of the checkpoint, for a file that says precisions instead of sizes; see `with_precision`.

    Raises:
        BlockscaleError: the file cannot be read, is neither of the two, or says what cannot be honoured.
    """
    file = Path(path) / CONFIG_NAME if Path(path).is_dir() else Path(path)
    try:
        values = parse_config(file.read_bytes(), str(file))
    except OSError as error:
        raise BlockscaleError(
            f"cannot be read: {error.strerror}",
            where=file,
            remedy="name the model's folder, its config.json or DeepSeek's config file",
        ) from error
    if "model_type" in values or "hidden_size" in values:
        return from_huggingface(values, where=file)
    if gives_precision(values):
        return with_precision(values, own, where=file)
    if values.keys() & (MODEL_ARGS.keys() - ModelConfig.model_fields.keys()):
        return from_deepseek(values, where=file)
    raise BlockscaleError(
        "not the configuration of a model",
        where=file,
        expected="keys of Hugging Face (model_type, hidden_size, ...) or of DeepSeek (dim, n_layers, ...)",
        got=", ".join(values) or "no keys",
        remedy="pass the model's folder or its config file",
    )


def from_huggingface(values: Mapping[str, Any], *, where: object = CONFIG_NAME) -> ModelConfig:
    """The architecture that a parsed config.json describes.

    Other keys than those of a configuration of DeepSeek-V2 or V3 are named in one warning and ignored.

    Args:
        values: the parsed file, `rope_scaling` and `rope_parameters` spellings alike.
        where: what messages call it.

    Raises:
        BlockscaleError: another `model_type`, a key missing, or a value that is wrong or cannot be honoured.
    """
    family = _FAMILIES.get(str(values.get("model_type")))
    if family is None:
        raise BlockscaleError(
            "model_type has no runtime here",
            where=where,
            expected=" or ".join(_FAMILIES),
            got=repr(values.get("model_type")),
            remedy="its checkpoint can be quantized, inspected and verified all the same",
        )
    renamed = _merged(((_ALIASES.get(key, key), value) for key, value in values.items()), where)
    _check_fixed(renamed, _FIXED, where)
    known = {
        key: value
        for key, value in renamed.items()
        if key in _COMMON and (value is not None or key in _NULLABLE)
    }
    fields = family | ({} if known.get("n_routed_experts", 1) else _DENSE) | known
    fields.setdefault("topk_group", fields["n_group"])
    rope, unknown_rope = _rope(values, where)
    fields |= rope | _quantization(values)
    unknown = [*(renamed.keys() - _COMMON - _OTHER - _FIXED.keys() - _FIXED_ROPE.keys()), *unknown_rope]
    if unknown:
        _logger.warning("%s: keys that are not known here are ignored: %s", where, ", ".join(sorted(unknown)))
    names = {field: key for key, field in _ALIASES.items() if key in values and field not in values}
    if not values.get("rope_scaling"):
        names["rope_scaling"] = "rope_parameters"
    return checked_config(fields, where, names, known.keys() | rope.keys())


def _merged(entries: Iterable[tuple[str, Any]], where: object) -> dict[str, Any]:
    """Keys that may be spelled in several places; two values of one are refused, null is no value."""
    merged: dict[str, Any] = {}
    for key, value in entries:
        before = merged.get(key)
        if before is None:
            merged[key] = value
        elif value is not None and value != before:
            raise BlockscaleError(
                f"two values of {key}",
                where=where,
                expected="one",
                got=f"{before!r} and {value!r}",
                remedy="keep one of its spellings",
            )
    return merged


def _check_fixed(values: Mapping[str, Any], fixed: Mapping[str, object], where: object) -> None:
    for key, only in fixed.items():
        if values.get(key) is not None and values[key] != only:
            raise BlockscaleError(
                f"{key} cannot be honoured",
                where=where,
                expected=repr(only),
                got=repr(values[key]),
                remedy="no published DeepSeek-V2 or V3 has it; the runtime does not",
            )


def _rope(values: Mapping[str, Any], where: object) -> tuple[dict[str, Any], list[str]]:
    """The rotary fields of ModelConfig from either spelling, and the keys that are not known."""
    entries = [(key, values.get(key)) for key in ("rope_theta", "partial_rotary_factor")]
    for spelling in ("rope_scaling", "rope_parameters"):
        part = values.get(spelling) or {}
        if not isinstance(part, Mapping):
            raise BlockscaleError(f"{spelling} is not a JSON object", where=where, got=repr(part))
        entries += [("rope_type" if key == "type" else key, value) for key, value in part.items()]
    rope = {key: value for key, value in _merged(entries, where).items() if value is not None}
    _check_fixed(rope, _FIXED_ROPE, where)
    yarn = {key: value for key, value in rope.items() if key in Yarn.model_fields}
    kind = rope.pop("rope_type", None if yarn else "default")
    if kind not in ("yarn", "default"):
        raise BlockscaleError(
            "rope_type cannot be honoured",
            where=where,
            expected="yarn or default",
            got=repr(kind),
            remedy="name one of these in rope_scaling or rope_parameters",
        )
    fields = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    if kind == "default":
        return fields, [f"rope {key}" for key in rope.keys() - _FIXED_ROPE.keys()]
    unknown = rope.keys() - yarn.keys() - _FIXED_ROPE.keys()
    return {**fields, "rope_scaling": yarn}, [f"rope {key}" for key in unknown]


def _quantization(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that `quantization_config` declares."""
    quantization = parse_quantization_config(dict(values))
    if quantization is None:
        return {}
    if quantization.groups:
        raise BlockscaleError(
            "model with several block sizes cannot be run",
            where="config.json quantization_config",
            expected="one",
            got=", ".join(map(spell_block_size, quantization.block_sizes)),
            remedy="run blockscale dequantize, then quantize with one",
        )
    fmt = quantization.fmt
    return {
        "dtype": "fp8",
        "scale_fmt": fmt.scale_fmt,
        "weight_block_size": fmt.block_size,
        "stored": quantization,
    }
