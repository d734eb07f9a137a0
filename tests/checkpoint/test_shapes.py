"""Shapes from config.json alone: against DeepSeek-V3's published size, real headers, transformers' files."""

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from blockscale.checkpoint.families import family_of
from blockscale.checkpoint.names import keep_reason
from blockscale.checkpoint.shapes import parameters_of
from blockscale.errors import BlockscaleError
from blockscale.formats import scale_shape, tensor_nbytes

TINY_DEEPSEEK = Path(__file__).parents[3] / "shared" / "models" / "tiny-deepseek-v3"

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V3_NO_MTP = {**DEEPSEEK_V3, "num_nextn_predict_layers": 0}

# A checkpoint of each type that transformers writes in milliseconds; every size differs from the others.
TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
TINY_LATENT = {
    **TINY,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_nextn_predict_layers": 0,  # transformers drops the MTP module
}
TINY_CONFIGS = {
    "llama": {**TINY, "tie_word_embeddings": True},
    "llama-biases": {**TINY, "attention_bias": True, "mlp_bias": True},
    "mistral": {**TINY, "head_dim": 16},
    "qwen2": TINY,
    "qwen3": {**TINY, "head_dim": 16},
    "qwen3_moe": {
        **TINY,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "mixtral": {**TINY, "num_local_experts": 4},
    "glm4_moe": {
        **TINY,
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {**TINY, "head_dim": 16, "num_local_experts": 4},
    "deepseek_v2": TINY_LATENT,
    "deepseek_v2-no-q-lora": {**TINY_LATENT, "q_lora_rank": None},
    "deepseek_v3": TINY_LATENT,
    "deepseek_v32": {**TINY_LATENT, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4},
}


def _headers(folder):
    """Name -> (dtype, shape) of every tensor in a folder, from the safetensors headers."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                tensors[name] = (part.get_dtype(), tuple(part.get_shape()))
    return tensors


def _bytes(config, quantized):
    """Tensor bytes of a config's checkpoint, as BF16 or with block FP8 linears and float32 scales."""
    family, total = family_of(config), 0
    for name, (dtype, shape) in parameters_of(config).items():
        if quantized and keep_reason(name, shape, dtype, family) is None:
            scales = scale_shape(shape, (128, 128))
            total += tensor_nbytes("F8_E4M3", shape) + tensor_nbytes("F32", scales)
        else:
            total += tensor_nbytes(dtype, shape)
    return total


def test_deepseek_v3_fp8_with_mtp_is_the_official_688_574_839_360_tensor_bytes():
    assert _bytes(DEEPSEEK_V3, quantized=True) == 688_574_839_360


def test_deepseek_v3_without_mtp_has_671_026_419_200_parameters():
    parameters = parameters_of(DEEPSEEK_V3_NO_MTP)
    assert sum(math.prod(shape) for _, shape in parameters.values()) == 671_026_419_200


@pytest.mark.parametrize(("quantized", "gigabytes"), [(False, 1342.05), (True, 673.15)])
def test_deepseek_v3_sizes_without_mtp(quantized, gigabytes):
    assert round(_bytes(DEEPSEEK_V3_NO_MTP, quantized) / 1e9, 2) == gigabytes


def test_deepseek_v3_layer_61_is_the_mtp_module():
    parameters = parameters_of(DEEPSEEK_V3)
    prefix = "model.layers.61."
    extras = set(parameters) - set(parameters_of(DEEPSEEK_V3_NO_MTP))
    assert all(name.startswith(prefix) for name in extras)
    assert parameters[f"{prefix}embed_tokens.weight"] == ("BF16", (129280, 7168))
    assert parameters[f"{prefix}shared_head.head.weight"] == ("BF16", (129280, 7168))
    assert parameters[f"{prefix}eh_proj.weight"] == ("BF16", (7168, 14336))
    for norm in ("enorm", "hnorm", "shared_head.norm", "input_layernorm"):
        assert parameters[f"{prefix}{norm}.weight"] == ("BF16", (7168,))
    assert parameters[f"{prefix}mlp.gate.e_score_correction_bias"] == ("F32", (256,))
    assert parameters[f"{prefix}mlp.experts.255.down_proj.weight"] == ("BF16", (7168, 2048))


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_v3"])
def test_kimi_k2_has_the_tensors_of_deepseek_v3(model_type):
    config = {**DEEPSEEK_V3, "num_hidden_layers": 4}
    assert parameters_of({**config, "model_type": model_type}) == parameters_of(config)


@pytest.mark.parametrize(("topk_method", "present"), [("noaux_tc", True), ("greedy", False)])
def test_deepseek_v2_has_a_correction_bias_only_with_the_routing_method_of_v3(topk_method, present):
    config = {**TINY_LATENT, "model_type": "deepseek_v2", "topk_method": topk_method}
    assert ("model.layers.1.mlp.gate.e_score_correction_bias" in parameters_of(config)) is present


def test_every_nth_layer_is_sparse_with_moe_layer_freq():
    config = {**TINY_LATENT, "model_type": "deepseek_v2", "num_hidden_layers": 6, "moe_layer_freq": 2}
    routers = [name for name in parameters_of(config) if name.endswith("mlp.gate.weight")]
    assert routers == [f"model.layers.{index}.mlp.gate.weight" for index in (2, 4)]


def test_shapes_equal_the_headers_of_a_trained_checkpoint():
    if not TINY_DEEPSEEK.is_dir():
        pytest.skip("../shared/models/tiny-deepseek-v3 is not present")
    config = json.loads((TINY_DEEPSEEK / "config.json").read_text())
    assert parameters_of(config) == _headers(TINY_DEEPSEEK)


@pytest.mark.parametrize("case", TINY_CONFIGS)
def test_shapes_equal_the_checkpoint_that_transformers_writes(case, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.AutoConfig.for_model(case.partition("-")[0], **TINY_CONFIGS[case])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    written = {name: shape for name, (_, shape) in _headers(tmp_path).items()}
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {name: shape for name, (_, shape) in parameters_of(stored).items()} == written


def _complete_config(model_type):
    experts = {"num_local_experts": 4} if model_type == "mixtral" else {"num_experts": 4}
    return {"model_type": model_type, **TINY_LATENT, **experts, "index_head_dim": 16}


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("llama", "hidden_size"),
        ("llama", "num_hidden_layers"),
        ("llama", "vocab_size"),
        ("qwen2", "num_attention_heads"),
        ("mistral", "intermediate_size"),
        ("deepseek_v3", "kv_lora_rank"),
        ("deepseek_v3", "moe_intermediate_size"),
        ("deepseek_v3", "n_routed_experts"),
        ("deepseek_v32", "index_n_heads"),
        ("qwen3_moe", "num_experts"),
        ("mixtral", "num_local_experts"),
    ],
)
@pytest.mark.parametrize("null", [False, True])
def test_a_missing_key_is_one_line_that_names_it(model_type, key, null):
    config = _complete_config(model_type)
    config.pop(key, None)
    if null:
        config[key] = None
    with pytest.raises(BlockscaleError, match=rf"config\.json: key {key} is missing.*{model_type}") as error:
        parameters_of(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [-1, 0, 2.5, "48", True, [48]])
def test_a_senseless_size_is_refused_with_key_and_value(value):
    with pytest.raises(BlockscaleError, match=r"bad hidden_size \(expected an integer >= 1, got "):
        parameters_of({**_complete_config("llama"), "hidden_size": value})


def test_a_senseless_list_of_dense_layers_is_refused():
    with pytest.raises(BlockscaleError, match=r"bad mlp_only_layers \(expected a list, got 3\)"):
        parameters_of({**_complete_config("qwen3_moe"), "mlp_only_layers": 3})


@pytest.mark.parametrize("config", [{"model_type": "gemma3"}, {"model_type": ["llama"]}, {}])
def test_an_unsupported_type_names_the_supported_ones_and_the_remedy(config):
    with pytest.raises(BlockscaleError, match=r"deepseek_v3.*llama.*pass the checkpoint folder"):
        parameters_of(config)
