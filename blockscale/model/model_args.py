"""Reads the architecture of a model from the config file of DeepSeek's own `inference` folder.

Source: `ModelArgs`, its defaults and its uses, in DeepSeek-V3 `inference/model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from blockscale.checkpoint.precision import Precision
from blockscale.errors import BlockscaleError
from blockscale.model.architecture import ModelConfig, checked_config

# Name -> (path in ModelConfig, default). `max_batch_size` sizes the cache of the reference only.
MODEL_ARGS: dict[str, tuple[str, Any]] = {
    "max_batch_size": ("", 8),
    "max_seq_len": ("max_position_embeddings", None),
    "dtype": ("dtype", "bf16"),
    "scale_fmt": ("scale_fmt", None),
    "vocab_size": ("vocab_size", 102400),
    "dim": ("hidden_size", 2048),
    "inter_dim": ("intermediate_size", 10944),
    "moe_inter_dim": ("moe_intermediate_size", 1408),
    "n_layers": ("num_hidden_layers", 27),
    "n_dense_layers": ("first_k_dense_replace", 1),
    "n_heads": ("num_attention_heads", 16),
    "n_routed_experts": ("n_routed_experts", 64),
    "n_shared_experts": ("n_shared_experts", 2),
    "n_activated_experts": ("num_experts_per_tok", 6),
    "n_expert_groups": ("n_group", 1),
    "n_limited_groups": ("topk_group", 1),
    "score_func": ("scoring_func", "softmax"),
    "route_scale": ("routed_scaling_factor", 1.0),
    "q_lora_rank": ("q_lora_rank", 0),
    "kv_lora_rank": ("kv_lora_rank", 512),
    "qk_nope_head_dim": ("qk_nope_head_dim", 128),
    "qk_rope_head_dim": ("qk_rope_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
    "original_seq_len": ("rope_scaling.original_max_position_embeddings", 4096),
    "rope_theta": ("rope_theta", 10000.0),
    "rope_factor": ("rope_scaling.factor", 40.0),
    "beta_fast": ("rope_scaling.beta_fast", 32),
    "beta_slow": ("rope_scaling.beta_slow", 1),
    "mscale": ("rope_scaling.mscale_all_dim", 1.0),
}
# Sizes in whose place a file may give the precision of the layers that have them. Shared experts, which are
# `n_shared_experts` times as wide as a routed one, go with the rest of the model.
SIZED_ROLES = {"moe_inter_dim": "experts", "inter_dim": "dense_mlp"}
# What a file may say in place of a size.
_PRECISIONS = ("fp8", "bf16")
_NO_SIZES = {"dtype", "scale_fmt"}
_NAMES = {path: name for name, (path, _) in MODEL_ARGS.items()}


def from_deepseek(
    values: Mapping[str, Any], *, max_seq_len: int = 16384, where: object = "config"
) -> ModelConfig:
    """The architecture that a parsed config file of DeepSeek's `inference` folder describes.

    As there, YaRN applies where the longest context is past the original one; sigmoid scores are normalized
    over the chosen experts and softmax scores are not; cos and sin are not scaled. Sigmoid scores go with a
    correction bias, which the reference has at one width only.

    Args:
        values: the parsed file, names and defaults those of ModelArgs.
        max_seq_len: longest context in tokens, where the file has no `max_seq_len`.
        where: what messages call the file.

    Raises:
        BlockscaleError: an unknown key, or a value that is wrong or cannot be honoured.
    """
    _check_known(values, where)
    defaults = {name: default for name, (_, default) in MODEL_ARGS.items()}
    args = {**defaults, "max_seq_len": max_seq_len, **values}
    fields: dict[str, Any] = {}
    yarn: dict[str, Any] = {"attention_factor": 1.0}
    for name, (path, _) in MODEL_ARGS.items():
        head, _, rest = path.partition(".")
        if head:
            (yarn if rest else fields)[rest or head] = args[name]
    sigmoid = args["score_func"] == "sigmoid"
    grouped = "greedy" if args["n_expert_groups"] == 1 else "group_limited_greedy"
    fields |= {
        "rope_scaling": yarn,
        "norm_topk_prob": sigmoid,
        "topk_method": "noaux_tc" if sigmoid else grouped,
        "weight_block_size": (128, 128) if args["dtype"] == "fp8" else None,
    }
    given = {MODEL_ARGS[name][0] for name in values} | {"max_position_embeddings"}
    config = checked_config(fields, where, _NAMES, given)
    assert config.rope_scaling is not None
    if config.max_position_embeddings > config.rope_scaling.original_max_position_embeddings:
        return config
    return config.model_copy(update={"rope_scaling": None})


def gives_precision(values: Mapping[str, Any]) -> bool:
    """Whether a parsed file sets precisions: one in place of a size, or nothing but what they are made of."""
    return any(values.get(name) in _PRECISIONS for name in SIZED_ROLES) or (
        "dtype" in values and values.keys() <= _NO_SIZES
    )


def with_precision(values: Mapping[str, Any], own: ModelConfig | None, *, where: object) -> ModelConfig:
    """The architecture of a file that `gives_precision`, as in {"dtype": "bf16", "moe_inter_dim": "fp8"}.

    `dtype`, if it is there, is the precision of all that no size names, `scale_fmt` the format of what is
    quantized. A file without other keys changes the checkpoint's own config; with others it is a whole one,
    and only the sizes that it lacks come from there. How weights are stored, the checkpoint's config says.

    Args:
        values: the parsed file.
        own: what the checkpoint's config.json describes, None if it has none.
        where: what messages call the file.

    Raises:
        BlockscaleError: there is no config.json to take sizes from, or `from_deepseek` refuses the rest.
    """
    roles = {name: role for name, role in SIZED_ROLES.items() if values.get(name) in _PRECISIONS}
    if own is None:
        raise BlockscaleError(
            f"{next(iter(roles), 'dtype')} is a precision, and sizes are missing",
            where=where,
            expected="a config.json beside the weights, which has them",
            got="none",
            remedy="put it there, or give the sizes here and the precision by --precision",
        )
    rest = {name: value for name, value in values.items() if name not in roles}
    if rest.keys() <= _NO_SIZES:
        config = checked_config({**dict(own), **rest}, where, _NAMES, rest.keys())
    else:
        sizes = {name: getattr(own, MODEL_ARGS[name][0]) for name in roles}
        config = from_deepseek({**rest, **sizes}, where=where)
    entries = [("default", rest["dtype"])] if "dtype" in rest else []
    entries += [(role, values[name]) for name, role in roles.items()]
    stored = {name: getattr(own, name) for name in ("dtype", "weight_block_size")}
    if "scale_fmt" not in rest:
        stored["scale_fmt"] = own.scale_fmt
    return config.model_copy(update={**stored, "precision": Precision(tuple(entries))})


def _check_known(values: Mapping[str, Any], where: object) -> None:
    for key in values:
        if key not in MODEL_ARGS:
            close = [_NAMES.get(key), *get_close_matches(key, MODEL_ARGS, 1)]
            guess = next(filter(None, close), None)
            raise BlockscaleError(
                f"unknown key {key}",
                where=where,
                expected="names of DeepSeek's ModelArgs" if guess else ", ".join(MODEL_ARGS),
                remedy=f"did you mean {guess}?" if guess else "remove it",
            )
