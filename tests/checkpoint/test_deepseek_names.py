"""Names of DeepSeek's inference shards, two ways, against a list that was written by hand."""

import pytest

from blockscale.checkpoint.deepseek_names import huggingface_name, place_of
from blockscale.errors import CorruptCheckpointError
from tests import data

L, MTP = "model.layers.7", "model.layers.61"
# Hugging Face's name, DeepSeek's, the dimension that is split, whole units, layer, expert.
TABLE = [
    ("model.embed_tokens.weight", "embed.weight", 0, None, None, None),
    ("model.norm.weight", "norm.weight", None, None, None, None),
    ("lm_head.weight", "head.weight", 0, None, None, None),
    (f"{L}.input_layernorm.weight", "layers.7.attn_norm.weight", None, None, 7, None),
    (f"{L}.post_attention_layernorm.weight", "layers.7.ffn_norm.weight", None, None, 7, None),
    (f"{L}.self_attn.q_proj.weight", "layers.7.attn.wq.weight", 0, "heads", 7, None),
    (f"{L}.self_attn.q_a_proj.weight", "layers.7.attn.wq_a.weight", None, None, 7, None),
    (f"{L}.self_attn.q_a_proj.weight_scale_inv", "layers.7.attn.wq_a.scale", None, None, 7, None),
    (f"{L}.self_attn.q_a_proj.bias", "layers.7.attn.wq_a.bias", None, None, 7, None),
    (f"{L}.self_attn.q_a_layernorm.weight", "layers.7.attn.q_norm.weight", None, None, 7, None),
    (f"{L}.self_attn.q_b_proj.weight", "layers.7.attn.wq_b.weight", 0, "heads", 7, None),
    (f"{L}.self_attn.kv_a_proj_with_mqa.weight", "layers.7.attn.wkv_a.weight", None, None, 7, None),
    (f"{L}.self_attn.kv_a_layernorm.weight", "layers.7.attn.kv_norm.weight", None, None, 7, None),
    (f"{L}.self_attn.kv_b_proj.weight_scale_inv", "layers.7.attn.wkv_b.scale", 0, "heads", 7, None),
    (f"{L}.self_attn.o_proj.weight", "layers.7.attn.wo.weight", 1, "heads", 7, None),
    (f"{L}.self_attn.o_proj.weight_scale_inv", "layers.7.attn.wo.scale", 1, "heads", 7, None),
    (f"{L}.self_attn.o_proj.bias", "layers.7.attn.wo.bias", None, "heads", 7, None),
    (f"{L}.mlp.gate_proj.weight", "layers.7.ffn.w1.weight", 0, None, 7, None),
    (f"{L}.mlp.gate_proj.bias", "layers.7.ffn.w1.bias", 0, None, 7, None),
    (f"{L}.mlp.down_proj.weight", "layers.7.ffn.w2.weight", 1, None, 7, None),
    (f"{L}.mlp.up_proj.weight", "layers.7.ffn.w3.weight", 0, None, 7, None),
    (f"{L}.mlp.gate.weight", "layers.7.ffn.gate.weight", None, None, 7, None),
    (f"{L}.mlp.gate.e_score_correction_bias", "layers.7.ffn.gate.bias", None, None, 7, None),
    (f"{L}.mlp.experts.12.gate_proj.weight", "layers.7.ffn.experts.12.w1.weight", None, "experts", 7, 12),
    (f"{L}.mlp.experts.0.down_proj.weight_scale_inv", "layers.7.ffn.experts.0.w2.scale",
     None, "experts", 7, 0),
    (f"{L}.mlp.experts.3.up_proj.weight", "layers.7.ffn.experts.3.w3.weight", None, "experts", 7, 3),
    (f"{L}.mlp.shared_experts.gate_proj.weight", "layers.7.ffn.shared_experts.w1.weight", 0, None, 7, None),
    (f"{L}.mlp.shared_experts.down_proj.weight", "layers.7.ffn.shared_experts.w2.weight", 1, None, 7, None),
    (f"{L}.mlp.shared_experts.up_proj.weight", "layers.7.ffn.shared_experts.w3.weight", 0, None, 7, None),
    (f"{MTP}.embed_tokens.weight", "layers.61.embed.weight", 0, None, 61, None),
    (f"{MTP}.enorm.weight", "layers.61.enorm.weight", None, None, 61, None),
    (f"{MTP}.hnorm.weight", "layers.61.hnorm.weight", None, None, 61, None),
    (f"{MTP}.eh_proj.weight", "layers.61.eh_proj.weight", None, None, 61, None),
    (f"{MTP}.shared_head.norm.weight", "layers.61.shared_head.norm.weight", None, None, 61, None),
    (f"{MTP}.shared_head.head.weight", "layers.61.shared_head.head.weight", 0, None, 61, None),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_where_a_tensor_goes_and_back(row):
    name, there, dim, unit, layer, expert = row
    place = place_of(name)
    assert (place.name, place.dim, place.unit, place.layer, place.expert) == (there, dim, unit, layer, expert)
    assert huggingface_name(there) == name


def test_every_tensor_of_both_architectures_and_back():
    for model in (data.in_fp8(data.deepseek_v3()), data.deepseek_v2()):
        places = {name: place_of(name).name for name in model.tensors}
        assert len(set(places.values())) == len(places)
        assert {name: huggingface_name(there) for name, there in places.items()} == {n: n for n in places}


def test_the_scale_of_the_other_layout_goes_to_the_same_place():
    assert place_of(f"{L}.mlp.up_proj.weight_scale").name == "layers.7.ffn.w3.scale"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.1.w1.weight",
        "model.layers.0.mlp.gate.bias",
        "model.layers.0.mlp.up_proj.weight_packed",
        "model.layers.0.mlp.gate.e_score_correction_bias_scale",
        "model.layers.x.mlp.up_proj.weight",
        "model.layers.#.mlp.up_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "weight",
        "",
    ],
)
def test_a_tensor_without_a_place(name):
    line = data.told(place_of, name)
    assert line is not None
    assert line.startswith(f"{name}: has no place in DeepSeek's inference shards")


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "layers.0.attn.wk.weight",
        "layers.0.attn.wq.qweight",
        "freqs",
        "layers.#.hnorm.weight",
    ],
)
def test_a_name_that_is_not_of_a_shard(name):
    with pytest.raises(CorruptCheckpointError, match="is no tensor of DeepSeek's inference shards"):
        huggingface_name(name)
