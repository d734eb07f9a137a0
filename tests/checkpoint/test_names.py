"""Roles, keep reasons, sharing groups and MTP prefixes, on tensor names of real checkpoints."""

import pytest

from blockscale.checkpoint.families import family_of, mtp_prefixes, stored_block_size
from blockscale.checkpoint.names import keep_reason, matches, role_of, sharing_groups
from blockscale.errors import BlockscaleError

ATTN, MLP = "model.layers.3.self_attn.", "model.layers.3.mlp."
MTP = "model.layers.61."


def family(model_type):
    return family_of({"model_type": model_type})


def is_quantized(model_type, name, shape=(256, 256), dtype="BF16"):
    return keep_reason(name, shape, dtype, family(model_type)) is None


@pytest.mark.parametrize(
    ("role", "name"),
    [
        ("embedding", "model.embed_tokens.weight"),
        ("embedding", f"{MTP}embed_tokens.weight"),
        ("embedding", "language_model.model.embed_tokens.weight"),
        ("head", "lm_head.weight"),
        ("head", f"{MTP}shared_head.head.weight"),
        ("norm", "model.norm.weight"),
        ("norm", f"{MTP}shared_head.norm.weight"),
        ("norm", f"{MTP}enorm.weight"),
        ("norm", f"{ATTN}kv_a_layernorm.weight"),
        ("norm", f"{ATTN}q_norm.weight"),
        ("norm", f"{ATTN}indexer.k_norm.bias"),
        ("router", f"{MLP}gate.weight"),
        ("router", f"{MLP}gate.e_score_correction_bias"),
        ("router", f"{MLP}shared_expert_gate.weight"),
        ("router", f"{MLP}router.bias"),
        ("router", "model.layers.3.block_sparse_moe.gate.weight"),
        ("router", "model.layers.3.block_sparse_moe.e_score_correction_bias"),
        ("router", "language_model.model.layers.3.feed_forward.router.weight"),
        ("attention", f"{ATTN}kv_a_proj_with_mqa.weight"),
        ("attention", f"{ATTN}indexer.wq_b.weight"),
        ("attention", f"{ATTN}sinks"),
        ("attention", "model.layers.3.linear_attn.in_proj_qkvz.weight"),
        ("dense_mlp", f"{MLP}gate_proj.weight"),
        ("dense_mlp", f"{MLP}gate_up_proj.weight"),
        ("shared_experts", f"{MLP}shared_experts.down_proj.weight"),
        ("shared_experts", f"{MLP}shared_expert.down_proj.weight"),
        ("experts", f"{MLP}experts.17.up_proj.weight"),
        ("experts", f"{MLP}experts.17.up_proj.weight_scale_inv"),
        ("experts", f"{MLP}experts.gate_up_proj"),
        ("experts", f"{MLP}experts.gate_up_proj_scale_inv"),
        ("experts", "model.layers.3.block_sparse_moe.experts.0.w2.weight"),
        ("mtp_projection", f"{MTP}eh_proj.weight"),
        ("mtp_projection", "mtp.fc.weight"),
        ("vision", "vision_tower.encoder.layers.0.self_attn.q_proj.weight"),
        ("vision", "model.visual.blocks.0.attn.qkv.bias"),
        ("vision", "multi_modal_projector.linear_1.weight"),
        ("vision", "mm_projector.proj.0.weight"),
        ("vision", "mlp1.1.weight"),
        ("bias", f"{ATTN}q_proj.bias"),
        ("bias", f"{MLP}experts.down_proj_bias"),
        ("other", "model.rotary.inv_freq"),
    ],
)
def test_role_is_read_from_the_name(role, name):
    assert role_of(name) == role


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", f"{ATTN}q_proj {ATTN}k_proj {ATTN}v_proj {ATTN}o_proj {MLP}gate_proj {MLP}down_proj"),
        ("phi3", f"{ATTN}qkv_proj {ATTN}o_proj {MLP}gate_up_proj {MLP}down_proj"),
        ("glm4", f"{ATTN}q_proj {MLP}gate_up_proj"),
        ("deepseek_v2", f"{ATTN}q_proj {ATTN}kv_b_proj"),
        (
            "deepseek_v3",
            f"{ATTN}q_a_proj {ATTN}q_b_proj {ATTN}kv_a_proj_with_mqa {ATTN}kv_b_proj {ATTN}o_proj",
        ),
        ("deepseek_v3", f"{MLP}experts.0.gate_proj {MLP}shared_experts.up_proj"),
        ("deepseek_v3", f"{MTP}self_attn.o_proj {MTP}mlp.experts.255.down_proj"),
        ("deepseek_v32", f"{ATTN}indexer.wq_b {ATTN}indexer.wk"),
        ("kimi_k2", f"{MLP}experts.383.down_proj"),
        ("qwen2_moe", f"{MLP}shared_expert.gate_proj {MLP}experts.59.up_proj"),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_qkvz mtp.layers.0.self_attn.q_proj"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w1"),
        ("minimax_m2", "model.layers.0.block_sparse_moe.experts.7.w3"),
        ("minimax", "model.layers.0.self_attn.qkv_proj model.layers.0.self_attn.output_gate"),
        ("gemma3", "language_model.model.layers.0.mlp.up_proj"),
        ("llama4", "language_model.model.layers.0.feed_forward.shared_expert.up_proj"),
    ],
)
def test_linear_weights_are_quantized(model_type, names):
    for name in names.split():
        assert keep_reason(f"{name}.weight", (256, 256), "BF16", family(model_type)) is None, name


@pytest.mark.parametrize(
    ("model_type", "name", "reason"),
    [
        ("deepseek_v3", "model.embed_tokens.weight", "embedding"),
        ("deepseek_v3", f"{MTP}embed_tokens.weight", "embedding"),
        ("deepseek_v3", "lm_head.weight", "output head"),
        ("deepseek_v3", f"{MTP}shared_head.head.weight", "output head"),
        ("deepseek_v3", f"{MTP}eh_proj.weight", "MTP input projection"),
        ("deepseek_v3", f"{MLP}gate.weight", "router"),
        ("deepseek_v32", f"{ATTN}indexer.weights_proj.weight", "not a quantized layer of deepseek_v32"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("gpt_oss", f"{MLP}router.weight", "router"),
        ("gpt_oss", f"{MLP}experts.down_proj_bias", "bias"),
        ("gpt_oss", f"{MLP}experts.gate_up_proj_blocks", "not a linear weight"),
        ("qwen2_moe", f"{MLP}shared_expert_gate.weight", "router"),
        ("qwen3_next", "mtp.fc.weight", "MTP input projection"),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_ba.weight", "not a quantized layer of qwen3_next"),
        ("gemma3", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision or audio part"),
        ("mistral3", "multi_modal_projector.linear_1.weight", "vision or audio part"),
        ("llama", f"{ATTN}q_proj.lora_A", "not a linear weight"),
        ("llama", "q_proj.weight", "outside the numbered layers"),
    ],
)
def test_other_matrices_are_kept_with_a_reason(model_type, name, reason):
    assert keep_reason(name, (256, 256), "BF16", family(model_type)) == reason


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((256,), "BF16", "1-D weight"),
        ((64, 1, 4), "BF16", "3-D weight"),
        ((0, 256), "BF16", "empty tensor"),
        ((256, 256), "F8_E4M3", "F8_E4M3 is not a high-precision float"),
        ((256, 256), "I32", "I32 is not a high-precision float"),
    ],
)
def test_a_linear_of_the_wrong_shape_or_dtype_is_kept(shape, dtype, reason):
    assert keep_reason(f"{ATTN}q_proj.weight", shape, dtype, family("llama")) == reason


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_high_precision_float_is_quantized(dtype):
    assert is_quantized("llama", f"{ATTN}q_proj.weight", dtype=dtype)


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [("deepseek_v3", "nk"), ("qwen3_moe", "nk"), ("gpt_oss", "kn"), ("llama4", "kn"), ("qwen3_vl_moe", "kn")],
)
def test_fused_experts_are_quantized_in_the_layout_their_family_declares(model_type, layout):
    assert family(model_type).expert_layout == layout
    for name in ("gate_up_proj", "down_proj"):
        assert is_quantized(model_type, f"{MLP}experts.{name}", shape=(8, 256, 256))


@pytest.mark.parametrize(
    ("model_type", "shape", "stored"),
    [
        ("gpt_oss", (8, 256, 512), (64, 128)),
        ("gpt_oss", (256, 512), (128, 64)),
        ("qwen3_moe", (8, 256, 512), (128, 64)),
        ("surprise", (8, 256, 512), (128, 64)),
    ],
)
def test_block_sides_swap_only_on_fused_experts_stored_in_by_out(model_type, shape, stored):
    assert stored_block_size((128, 64), shape, family(model_type)) == stored


@pytest.mark.parametrize("model_type", ["llama", "surprise"])
def test_fused_experts_of_undeclared_layout_are_kept(model_type):
    assert family(model_type).expert_layout is None
    reason = keep_reason(f"{MLP}experts.gate_up_proj", (8, 256, 256), "BF16", family(model_type))
    assert reason == "fused experts of undeclared layout"


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "gemma3_text"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "mistral"),
        ({"model_type": "mistral3", "text_config": {"hidden_size": 64}}, "mistral3"),
        ({"model_type": "kimi_vl", "text_config": {"model_type": "deepseek_v3"}}, "deepseek_v3"),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}}, "qwen2"),
        ({"model_type": "deepseek_v32"}, "deepseek_v32"),
    ],
)
def test_family_is_that_of_the_text_part(config, model_type):
    found = family_of(config)
    assert (found.model_type, found.known) == (model_type, True)


@pytest.mark.parametrize(
    "config", [{"model_type": "surprise"}, {}, {"model_type": None}, {"text_config": {}}]
)
def test_an_unknown_type_gets_a_family_that_says_so(config):
    assert not family_of(config).known


def test_an_unknown_family_quantizes_only_layers_with_unmistakable_names():
    for leaf in ("q_proj", "kv_b_proj", "gate_up_proj", "w3", "fc2", "query_key_value"):
        assert is_quantized("surprise", f"transformer.h.0.block.{leaf}.weight"), leaf
    for leaf in ("dt_proj", "weights_proj", "x_proj", "c_attn", "dense", "gate", "token_embed", "proj"):
        assert not is_quantized("surprise", f"transformer.h.0.block.{leaf}.weight"), leaf


@pytest.mark.parametrize(
    ("config", "prefixes"),
    [
        (
            {"model_type": "deepseek_v3", "num_hidden_layers": 61, "num_nextn_predict_layers": 1},
            ("model.layers.61.",),
        ),
        (
            {"model_type": "glm4_moe", "num_hidden_layers": 92, "num_nextn_predict_layers": 2},
            ("model.layers.92.", "model.layers.93."),
        ),
        ({"model_type": "kimi_k2", "num_hidden_layers": 61, "num_nextn_predict_layers": 0}, ()),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 61}, ()),
        ({"model_type": "llama", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}, ()),
        ({"model_type": "qwen3_next", "num_hidden_layers": 48}, ("mtp.",)),
        (
            {
                "model_type": "kimi_vl",
                "text_config": {
                    "model_type": "deepseek_v3",
                    "num_hidden_layers": 27,
                    "num_nextn_predict_layers": 1,
                },
            },
            ("language_model.model.layers.27.", "model.language_model.layers.27."),
        ),
    ],
)
def test_mtp_prefixes(config, prefixes):
    assert mtp_prefixes(config) == prefixes


@pytest.mark.parametrize(
    ("counts", "key"),
    [
        ({"num_nextn_predict_layers": "one", "num_hidden_layers": 61}, "num_nextn_predict_layers"),
        ({"num_nextn_predict_layers": 1}, "num_hidden_layers"),
    ],
)
def test_senseless_layer_counts_are_refused_by_key(counts, key):
    with pytest.raises(BlockscaleError, match=rf"config\.json: .*{key}"):
        mtp_prefixes({"model_type": "deepseek_v3", **counts})


def weights(*modules):
    return tuple(f"{module}.weight" for module in modules)


def test_attention_and_mlp_weights_that_engines_fuse_form_groups():
    qkv = weights(f"{ATTN}q_proj", f"{ATTN}k_proj", f"{ATTN}v_proj")
    gate_up = weights(f"{MLP}gate_proj", f"{MLP}up_proj")
    names = (*qkv, f"{ATTN}q_proj.bias", *weights(f"{ATTN}o_proj", f"{MLP}down_proj"), *gate_up)
    assert sharing_groups(names) == [qkv, gate_up]


def test_groups_do_not_cross_layers_or_modules():
    names = weights(f"{ATTN}q_proj", "model.layers.4.self_attn.k_proj", f"{MLP}shared_experts.gate_proj")
    assert sharing_groups((*names, f"{MLP}up_proj.weight")) == []


def test_latent_attention_shares_between_q_a_and_kv_a_only():
    fused = weights(f"{ATTN}q_a_proj", f"{ATTN}kv_a_proj_with_mqa")
    names = (*fused, *weights(f"{ATTN}q_b_proj", f"{ATTN}kv_b_proj", f"{ATTN}o_proj"))
    assert sharing_groups(names) == [fused]
    without_q_lora = weights(f"{ATTN}q_proj", f"{ATTN}kv_a_proj_with_mqa")
    assert sharing_groups(without_q_lora) == []


@pytest.mark.parametrize("projections", [("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3")])
def test_all_experts_of_a_layer_are_one_group(projections):
    experts = [
        weights(*(f"model.layers.{layer}.mlp.experts.{e}.{p}" for e in range(3) for p in projections))
        for layer in (3, 4)
    ]
    shared = weights(f"{MLP}shared_experts.gate_proj", f"{MLP}shared_experts.up_proj")
    names = (*experts[0], *shared, f"{MLP}gate.weight", *experts[1])
    assert sharing_groups(names) == [experts[0], shared, experts[1]]


def test_dense_w1_and_w3_share_a_precision():
    names = weights(*(f"transformer.h.0.feed_forward.{leaf}" for leaf in ("w1", "w2", "w3")))
    assert sharing_groups(names) == [(names[0], names[2])]


def test_halves_of_a_gated_delta_net_projection_share_a_precision():
    names = weights(*(f"model.layers.0.linear_attn.in_proj_{part}" for part in ("qkv", "z", "a", "b")))
    assert sharing_groups(names) == [names[:2]]


def test_fused_expert_parameters_are_one_group():
    fused = (f"{MLP}experts.gate_up_proj", f"{MLP}experts.down_proj")
    names = (*fused, f"{MLP}experts.gate_up_proj_bias", f"{MLP}router.weight")
    assert sharing_groups(names) == [fused]


def test_vision_towers_and_already_fused_layers_form_no_group():
    names = weights("vision_tower.layers.0.q_proj", "vision_tower.layers.0.k_proj", f"{ATTN}qkv_proj")
    assert sharing_groups(names) == []


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        ("*.q_proj", ["a.q_proj", "a.q_proj.weight"], ["a.q_proj.bias", "a.q_proj.weight.weight", "q_proj"]),
        ("*.weight", ["a.weight", "a.weight.weight"], ["a.bias", "weight"]),
        ("a?[0-9]", ["a.1", "a.1.weight", "ab3"], ["a.x", "A.1", "a.1\n"]),
        ("a*b*c", ["abc", "abbcbc.weight", "a.b\nb.c"], ["acb", "abcd", "abc.weigh"]),
        ("a[1", ["a[1", "a[1.weight"], ["a1", "a1.weight"]),
    ],
)
def test_a_pattern_matches_whole_names_and_module_paths(pattern, matched, others):
    assert all(matches(name, pattern) for name in matched)
    assert not any(matches(name, pattern) for name in others)
