"""Every tensor of an unquantized checkpoint, from config.json alone, so that `plan` needs no download.

With hidden size H, a head dimension D, q heads A and kv heads B, a grouped-query layer holds
q (A*D, H), k and v (B*D, H), o (H, A*D); a multi-head latent attention layer (DeepSeek-V2 section 2.1) holds
q_a (Rq, H), q_b (A*(nope+rope), Rq), kv_a (Rkv+rope, H), kv_b (A*(nope+v), Rkv), o (H, A*v).
Dtypes are BF16, but F32 for what DeepSeek stores so: the router's correction bias, the indexer's key norm.

Sources: modeling files of transformers 5.23, `README_WEIGHTS.md` of DeepSeek-V3 (MTP module).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from blockscale.checkpoint.config_fields import ConfigFields
from blockscale.checkpoint.families import mtp_prefixes
from blockscale.errors import BlockscaleError

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]

_FLOAT32 = (".e_score_correction_bias", ".indexer.k_norm.weight", ".indexer.k_norm.bias")


def parameters_of(config: dict[str, Any]) -> dict[str, tuple[str, Shape]]:
    """Name -> (safetensors dtype, shape) of every tensor of the BF16 checkpoint that a config.json describes.

    Multi-token prediction layers (`num_nextn_predict_layers`) come with the copies of the embedding and the
    head that DeepSeek-V3 and GLM-4.5 store (GLM-4.6, of the same config, left them out). A tied head is
    absent, as on disk.

    Raises:
        BlockscaleError: a `model_type` whose shapes are not known here, or a config key missing or senseless.
    """
    model_type = config.get("model_type")
    layer = _LAYERS.get(str(model_type))
    if layer is None:
        raise BlockscaleError(
            "tensor shapes cannot be computed from config.json for this model_type",
            where="config.json",
            expected=", ".join(sorted(_LAYERS)),
            got=repr(model_type),
            remedy="pass the checkpoint folder instead (only its headers are read)",
        )
    return {name: (_dtype(name), shape) for name, shape in _model(ConfigFields(config), layer)}


def _dtype(name: str) -> str:
    return "F32" if name.endswith(_FLOAT32) else "BF16"


# Tensors of one decoder layer: (config, "model.layers.N.", N) -> names and shapes.
_Layer = Callable[[ConfigFields, str, int], Tensors]


def _model(config: ConfigFields, layer: _Layer) -> Tensors:
    vocabulary = (config.size("vocab_size"), config.hidden)
    yield "model.embed_tokens.weight", vocabulary
    depth = config.size("num_hidden_layers")
    for index in range(depth):
        yield from layer(config, f"model.layers.{index}.", index)
    yield "model.norm.weight", (config.hidden,)
    if not config.flag("tie_word_embeddings"):
        yield "lm_head.weight", vocabulary
    for extra, prefix in enumerate(mtp_prefixes(config.values)):
        yield from _mtp_extras(config, prefix)
        yield from layer(config, prefix, depth + extra)


def _mtp_extras(config: ConfigFields, prefix: str) -> Tensors:
    hidden, vocabulary = config.hidden, config.size("vocab_size")
    yield f"{prefix}embed_tokens.weight", (vocabulary, hidden)
    yield f"{prefix}enorm.weight", (hidden,)
    yield f"{prefix}hnorm.weight", (hidden,)
    yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
    yield f"{prefix}shared_head.norm.weight", (hidden,)
    yield f"{prefix}shared_head.head.weight", (vocabulary, hidden)


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Tensors:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norms(config: ConfigFields, prefix: str) -> Tensors:
    yield f"{prefix}input_layernorm.weight", (config.hidden,)
    yield f"{prefix}post_attention_layernorm.weight", (config.hidden,)


def _grouped_query_attention(
    config: ConfigFields, prefix: str, *, qkv_bias: bool = False, o_bias: bool = False, qk_norm: bool = False
) -> Tensors:
    prefix += "self_attn."
    head_dim, heads = config.head_dim, config.heads
    kv_rows = config.size("num_key_value_heads", heads) * head_dim
    yield from _linear(f"{prefix}q_proj", heads * head_dim, config.hidden, qkv_bias)
    yield from _linear(f"{prefix}k_proj", kv_rows, config.hidden, qkv_bias)
    yield from _linear(f"{prefix}v_proj", kv_rows, config.hidden, qkv_bias)
    yield from _linear(f"{prefix}o_proj", config.hidden, heads * head_dim, o_bias)
    if qk_norm:
        yield f"{prefix}q_norm.weight", (head_dim,)
        yield f"{prefix}k_norm.weight", (head_dim,)


def _latent_attention(config: ConfigFields, prefix: str) -> Tensors:
    prefix += "self_attn."
    hidden, heads, bias = config.hidden, config.heads, config.flag("attention_bias")
    nope, rope = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    value, kv_rank = config.size("v_head_dim"), config.size("kv_lora_rank")
    rank = config.count("q_lora_rank", 0)
    if rank:
        yield from _linear(f"{prefix}q_a_proj", rank, hidden, bias)
        yield f"{prefix}q_a_layernorm.weight", (rank,)
        yield from _linear(f"{prefix}q_b_proj", heads * (nope + rope), rank)
    else:
        yield from _linear(f"{prefix}q_proj", heads * (nope + rope), hidden)
    yield from _linear(f"{prefix}kv_a_proj_with_mqa", kv_rank + rope, hidden, bias)
    yield f"{prefix}kv_a_layernorm.weight", (kv_rank,)
    yield from _linear(f"{prefix}kv_b_proj", heads * (nope + value), kv_rank)
    yield from _linear(f"{prefix}o_proj", hidden, heads * value, bias)


def _sparse_indexer(config: ConfigFields, prefix: str) -> Tensors:
    prefix += "self_attn.indexer."
    heads, head_dim = config.size("index_n_heads"), config.size("index_head_dim")
    yield from _linear(f"{prefix}wq_b", heads * head_dim, config.size("q_lora_rank"))
    yield from _linear(f"{prefix}wk", head_dim, config.hidden)
    yield f"{prefix}k_norm.weight", (head_dim,)
    yield f"{prefix}k_norm.bias", (head_dim,)
    yield from _linear(f"{prefix}weights_proj", heads, config.hidden)


def _mlp(prefix: str, hidden: int, width: int, bias: bool = False) -> Tensors:
    yield from _linear(f"{prefix}gate_proj", width, hidden, bias)
    yield from _linear(f"{prefix}up_proj", width, hidden, bias)
    yield from _linear(f"{prefix}down_proj", hidden, width, bias)


def _dense_mlp(config: ConfigFields, prefix: str, bias: bool = False) -> Tensors:
    yield from _mlp(f"{prefix}mlp.", config.hidden, config.size("intermediate_size"), bias)


def _deepseek_moe(config: ConfigFields, prefix: str, experts: int, correction_bias: bool) -> Tensors:
    prefix += "mlp."
    hidden, width = config.hidden, config.size("moe_intermediate_size")
    shared = config.count("n_shared_experts", 0)
    yield f"{prefix}gate.weight", (experts, hidden)
    if correction_bias:
        yield f"{prefix}gate.e_score_correction_bias", (experts,)
    for expert in range(experts):
        yield from _mlp(f"{prefix}experts.{expert}.", hidden, width)
    if shared:
        yield from _mlp(f"{prefix}shared_experts.", hidden, shared * width)


def _deepseek_feed_forward(config: ConfigFields, prefix: str, index: int, correction_bias: bool) -> Tensors:
    first, every = config.count("first_k_dense_replace", 0), config.size("moe_layer_freq", 1)
    sparse = index >= first and index % every == 0
    experts = config.experts("n_routed_experts") if sparse else 0
    if experts:
        yield from _deepseek_moe(config, prefix, experts, correction_bias)
    else:
        yield from _dense_mlp(config, prefix)


def _deepseek_v2_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    yield from _norms(config, prefix)
    yield from _latent_attention(config, prefix)
    # V2 routes greedily, without a correction bias, unless it borrows V3's method.
    noaux = config.values.get("topk_method") == "noaux_tc"
    yield from _deepseek_feed_forward(config, prefix, index, noaux)


def _deepseek_v3_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    yield from _norms(config, prefix)
    yield from _latent_attention(config, prefix)
    yield from _deepseek_feed_forward(config, prefix, index, True)


def _deepseek_v32_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    yield from _deepseek_v3_layer(config, prefix, index)
    yield from _sparse_indexer(config, prefix)


def _glm4_moe_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    yield from _norms(config, prefix)
    yield from _grouped_query_attention(
        config, prefix, qkv_bias=config.flag("attention_bias"), qk_norm=config.flag("use_qk_norm")
    )
    yield from _deepseek_feed_forward(config, prefix, index, True)


def _llama_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    bias = config.flag("attention_bias")
    yield from _norms(config, prefix)
    yield from _grouped_query_attention(config, prefix, qkv_bias=bias, o_bias=bias)
    yield from _dense_mlp(config, prefix, config.flag("mlp_bias"))


def _mistral_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    yield from _norms(config, prefix)
    yield from _grouped_query_attention(config, prefix)
    yield from _dense_mlp(config, prefix)


def _qwen2_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    yield from _norms(config, prefix)
    yield from _grouped_query_attention(config, prefix, qkv_bias=True)
    yield from _dense_mlp(config, prefix)


def _qwen3_attention(config: ConfigFields, prefix: str) -> Tensors:
    bias = config.flag("attention_bias")
    yield from _norms(config, prefix)
    yield from _grouped_query_attention(config, prefix, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _qwen3_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    yield from _qwen3_attention(config, prefix)
    yield from _dense_mlp(config, prefix)


def _qwen3_moe_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    yield from _qwen3_attention(config, prefix)
    experts = config.experts("num_experts")
    dense = index in config.indices("mlp_only_layers")
    if dense or not experts or (index + 1) % config.size("decoder_sparse_step", 1):
        yield from _dense_mlp(config, prefix)
        return
    hidden, width = config.hidden, config.size("moe_intermediate_size")
    yield f"{prefix}mlp.gate.weight", (experts, hidden)
    for expert in range(experts):
        yield from _mlp(f"{prefix}mlp.experts.{expert}.", hidden, width)


def _mixtral_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    hidden, width = config.hidden, config.size("intermediate_size")
    experts = config.size("num_local_experts")
    yield from _norms(config, prefix)
    yield from _grouped_query_attention(config, prefix)
    yield f"{prefix}block_sparse_moe.gate.weight", (experts, hidden)
    for expert in range(experts):
        path = f"{prefix}block_sparse_moe.experts.{expert}."
        yield f"{path}w1.weight", (width, hidden)
        yield f"{path}w2.weight", (hidden, width)
        yield f"{path}w3.weight", (width, hidden)


def _gpt_oss_layer(config: ConfigFields, prefix: str, index: int) -> Tensors:
    hidden, width = config.hidden, config.size("intermediate_size")
    experts, bias = config.size("num_local_experts"), config.flag("attention_bias", default=True)
    yield from _norms(config, prefix)
    yield from _grouped_query_attention(config, prefix, qkv_bias=bias, o_bias=bias)
    yield f"{prefix}self_attn.sinks", (config.heads,)
    yield from _linear(f"{prefix}mlp.router", experts, hidden, bias=True)
    yield f"{prefix}mlp.experts.gate_up_proj", (experts, hidden, 2 * width)
    yield f"{prefix}mlp.experts.gate_up_proj_bias", (experts, 2 * width)
    yield f"{prefix}mlp.experts.down_proj", (experts, width, hidden)
    yield f"{prefix}mlp.experts.down_proj_bias", (experts, hidden)


_LAYERS: dict[str, _Layer] = {
    "deepseek_v2": _deepseek_v2_layer,
    "deepseek_v3": _deepseek_v3_layer,
    "deepseek_v32": _deepseek_v32_layer,
    "glm4_moe": _glm4_moe_layer,
    "gpt_oss": _gpt_oss_layer,
    "kimi_k2": _deepseek_v3_layer,
    "llama": _llama_layer,
    "mistral": _mistral_layer,
    "mixtral": _mixtral_layer,
    "qwen2": _qwen2_layer,
    "qwen3": _qwen3_layer,
    "qwen3_moe": _qwen3_moe_layer,
}
