"""Configurations of Hugging Face: every field, what is derived, every refusal; which file is whose."""

import contextlib
import json
import logging
import math
import random

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8
from blockscale.model.config import ModelConfig, from_deepseek, from_huggingface, load_config
from blockscale.model.model_args import MODEL_ARGS
from blockscale.quantization_config import Quantization
from tests import data
from tests.model.configs import BAD, ORIGINAL, changed, refusal


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("blockscale")]


MSCALES = [
    {},
    {"mscale": 1.0},
    {"mscale_all_dim": 1.0},
    {"mscale": 0.707, "mscale_all_dim": 0.707},
    {"mscale": 0.5, "mscale_all_dim": 1.0},
    {"mscale": 0.5, "mscale_all_dim": 0.0},
    {"mscale": 0.5, "mscale_all_dim": 1.0, "attention_factor": 1.25},
]


def _random_values(seed, family):
    """Keyword arguments of a configuration class of transformers."""
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 4])
    in_group = rng.choice([2, 4, 8])
    topk_group = rng.randint(1, groups)
    yarn = {
        "rope_type": "yarn",
        "factor": rng.choice([1.0, 4.0, 40.0]),
        "original_max_position_embeddings": rng.choice([512, 4096]),
        **rng.choice([{}, {"beta_fast": 16.0, "beta_slow": 2.0}]),
        **MSCALES[seed % len(MSCALES)],
    }
    values = {
        "vocab_size": rng.randint(100, 1000),
        "hidden_size": 64,
        "intermediate_size": rng.randint(1, 200),
        "moe_intermediate_size": rng.randint(1, 200),
        "num_hidden_layers": rng.randint(1, 6),
        "num_attention_heads": rng.choice([2, 4, 8]),
        "q_lora_rank": rng.choice([None, 32]),
        "kv_lora_rank": rng.randint(8, 64),
        "qk_nope_head_dim": rng.randint(1, 64),
        "qk_rope_head_dim": 2 * rng.randint(1, 32),
        "v_head_dim": rng.randint(1, 64),
        "n_routed_experts": groups * in_group,
        "n_shared_experts": rng.randint(0, 3),
        "num_experts_per_tok": rng.randint(1, topk_group * in_group),
        "n_group": groups,
        "topk_group": topk_group,
        "first_k_dense_replace": rng.randint(0, 3),
        "norm_topk_prob": rng.choice([True, False]),
        "routed_scaling_factor": rng.choice([1.0, 2.5, 16.0]),
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "max_position_embeddings": rng.choice([4096, 163840]),
        "tie_word_embeddings": rng.choice([True, False]),
        "attention_bias": rng.choice([True, False]),
        "bos_token_id": rng.choice([None, 0, 7]),
        "eos_token_id": rng.choice([None, 1, [1, 2]]),
        "rope_parameters": {"rope_theta": rng.choice([1e4, 5e5]), **({} if seed % 5 == 4 else yarn)},
    }
    if family == "deepseek_v2":
        values["topk_method"] = rng.choice(["greedy", "group_limited_greedy"])
    else:
        values |= {"rope_interleave": rng.choice([True, False]), "num_mtp_layers": rng.randint(0, 2)}
    return values


def _as_published(values):
    """The same config.json as DeepSeek and transformers 4 spell it."""
    rope = dict(values.pop("rope_parameters"))
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", "default")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return values


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("seed", range(14))
def test_every_field_and_scale_is_that_of_transformers(family, seed, tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    version = family[-1]
    config_class = getattr(transformers, f"DeepseekV{version}Config")
    theirs = config_class(**_random_values(seed, family))
    theirs.save_pretrained(tmp_path)
    ours = load_config(tmp_path)
    assert from_huggingface(_as_published(theirs.to_dict())) == ours
    assert not _warnings(caplog)
    rope = theirs.rope_parameters
    expected = {name: getattr(theirs, name) for name in ModelConfig.model_fields if hasattr(theirs, name)}
    eos = expected["eos_token_id"]
    expected |= {
        "dtype": "bf16",
        "eos_token_id": () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        "scoring_func": "softmax" if version == "2" else "sigmoid",
        "topk_method": theirs.topk_method if version == "2" else "noaux_tc",
        "num_nextn_predict_layers": 0 if version == "2" else theirs.num_mtp_layers,
        "rope_interleave": True if version == "2" else theirs.rope_interleave,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "moe_layer_freq": 1,
        "scale_fmt": "float32",
        "weight_block_size": None,
        "precision": {"entries": ()},
        "stored": None,
    }
    attention_factor = 1.0
    if rope["rope_type"] == "yarn":
        optional = ("mscale", "mscale_all_dim", "attention_factor")
        expected["rope_scaling"] = {"beta_fast": 32.0, "beta_slow": 1.0, **dict.fromkeys(optional)}
        expected["rope_scaling"] |= {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
        attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)[1]
    assert ours.model_dump() == expected
    assert ours.qk_head_dim == theirs.qk_head_dim
    assert ours.rope_attention_scale == pytest.approx(attention_factor, rel=1e-15)
    with torch.device("meta"):
        attention = {"2": DeepseekV2Attention, "3": DeepseekV3Attention}[version](theirs, 0)
    assert ours.softmax_scale == pytest.approx(attention.scaling, rel=1e-15)


@pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")
def test_a_trained_model_of_transformers(caplog):
    config = load_config(data.TINY_DEEPSEEK)
    assert not _warnings(caplog)
    assert config == load_config(data.TINY_DEEPSEEK / "config.json")
    sizes = config.hidden_size, config.num_hidden_layers, config.n_routed_experts, config.qk_head_dim
    assert sizes == (384, 6, 16, 96)
    assert config.eos_token_id == (1,)
    assert config.rope_scaling.original_max_position_embeddings == 512
    assert config.softmax_scale == pytest.approx(96**-0.5 * (0.1 * math.log(4) + 1) ** 2)
    assert config.rope_attention_scale == 1.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}),
        ({}, {"num_nextn_predict_layers": 0, "bos_token_id": None, "eos_token_id": (), "moe_layer_freq": 1}),
        ({}, {"routed_scaling_factor": 2.5, "dtype": "bf16", "rope_theta": 10000.0, "rope_interleave": True}),
        ({"n_group": ..., "topk_group": ...}, {"n_group": 8, "topk_group": 4}),
        (
            {"model_type": "deepseek_v2", "n_group": None, "topk_group": None},
            {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False},
        ),
        ({"model_type": "deepseek_v2", "topk_group": None}, {"topk_method": "greedy", "topk_group": 4}),
        ({"model_type": "deepseek_v2"}, {"scoring_func": "softmax", "topk_method": "greedy"}),
        ({"scoring_func": "softmax", "topk_method": "greedy"}, {"scoring_func": "softmax"}),
        ({"topk_method": "greedy", "num_experts_per_tok": 32}, {"num_experts_per_tok": 32}),
        ({"q_lora_rank": 0}, {"q_lora_rank": None}),
        ({"q_lora_rank": None}, {"q_lora_rank": None}),
        ({"n_shared_experts": None}, {"n_shared_experts": 0}),
        ({"n_routed_experts": ..., "num_local_experts": 32}, {"n_routed_experts": 32}),
        ({"n_routed_experts": None, "moe_intermediate_size": ...}, {"n_routed_experts": 0}),
        ({"n_routed_experts": 0, "num_experts_per_tok": None}, {"n_routed_experts": 0}),
        ({"num_mtp_layers": 1}, {"num_nextn_predict_layers": 1}),
        ({"attention_bias": True, "mlp_bias": None, "torch_dtype": "float16"}, {"attention_bias": True}),
        ({"eos_token_id": [3, 1]}, {"eos_token_id": (3, 1)}),
        ({"rope_scaling": None, "rope_theta": 50000}, {"rope_scaling": None, "rope_theta": 50000.0}),
        ({"rope_scaling": {"type": "default"}}, {"rope_scaling": None}),
        ({"dtype": "bfloat16"}, {"dtype": "bf16"}),
    ],
)
def test_what_a_key_or_its_absence_means(values, expected, caplog):
    config = from_huggingface(changed(**values))
    assert {name: getattr(config, name) for name in expected} == expected
    assert not _warnings(caplog)


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("layout", ["deepseek", "compressed-tensors"])
def test_the_quantization_it_declares(layout, scale_fmt):
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    declared = Quantization(layout, BlockFP8((128, 64), scale_fmt)).config()
    config = from_huggingface(changed(quantization_config=declared))
    assert (config.dtype, config.weight_block_size) == ("fp8", (128, 64))
    assert config.scale_fmt == (
        scale_fmt if layout == "deepseek" else "float32"
    )  # the other has no place for it


def test_keys_that_are_not_known_are_told_once_and_those_without_meaning_never(caplog):
    values = changed(aux_loss_alpha=0.001, ep_size=1, blockscale={}, sparse_topk=4, scale_fmt="ue8m0")
    values["rope_scaling"] = {**ORIGINAL["rope_scaling"], "twist": 1}
    with caplog.at_level(logging.WARNING):
        from_huggingface(values, where="some/config.json")
    assert _warnings(caplog) == [
        "some/config.json: keys that are not known here are ignored: rope twist, scale_fmt, sparse_topk"
    ]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"hidden_size": ...}, "key hidden_size is missing; add it"),
        ({"hidden_size": None}, "key hidden_size is missing; add it"),
        ({"q_lora_rank": ...}, "key q_lora_rank is missing; add it"),
        ({"n_routed_experts": ...}, "key n_routed_experts is missing; add it"),
        ({"moe_intermediate_size": ...}, "key moe_intermediate_size is missing; add it"),
        ({"vocab_size": -1}, f"bad vocab_size (expected greater than 0, got -1){BAD}"),
        ({"vocab_size": True}, f"bad vocab_size (expected a valid integer, got True){BAD}"),
        ({"vocab_size": "8"}, f"bad vocab_size (expected a valid integer, got '8'){BAD}"),
        ({"rms_norm_eps": math.inf}, f"bad rms_norm_eps (expected a finite number, got inf){BAD}"),
        ({"eos_token_id": [1, -2]}, f"bad eos_token_id.1 (expected greater than or equal to 0, got -2){BAD}"),
        (
            {"num_hidden_layers": 0, "v_head_dim": 1.5, "topk_method": "best"},
            f"bad num_hidden_layers (expected greater than 0, got 0){BAD} (2 more problems)",
        ),
        (
            {"scoring_func": "tanh"},
            f"bad scoring_func (expected 'sigmoid' or 'softmax', got 'tanh'){BAD}",
        ),
        (
            {"n_routed_experts": ..., "num_local_experts": -4},
            f"bad num_local_experts (expected greater than or equal to 0, got -4){BAD}",
        ),
        (
            {"num_local_experts": 8},
            "two values of n_routed_experts (expected one, got 32 and 8); keep one of its spellings",
        ),
        (
            {"model_type": "llama"},
            "model_type has no runtime here (expected deepseek_v2 or deepseek_v3, got 'llama'); "
            "its checkpoint can be quantized, inspected and verified all the same",
        ),
        (
            {"hidden_act": "gelu"},
            "hidden_act cannot be honoured (expected 'silu', got 'gelu'); "
            "no published DeepSeek-V2 or V3 has it; the runtime does not",
        ),
        (
            {"qk_rope_head_dim": 5},
            f"bad qk_rope_head_dim (expected an even number, to turn in pairs, got 5){BAD}",
        ),
        ({"n_group": 5}, f"bad n_group (expected a divisor of 32 experts, got 5){BAD}"),
        (
            {"n_group": 32},
            "bad n_group (expected two experts in each group of 32, for noaux_tc adds up two, got 32)"
            f"{BAD} (1 more problem)",
        ),
        ({"topk_group": 5}, f"bad topk_group (expected at most 4, the number of groups, got 5){BAD}"),
        (
            {"n_group": 1, "topk_group": ...},
            f"bad topk_group (expected at most 1, the number of groups, got the default 4){BAD}",
        ),
        (
            {"num_experts_per_tok": 17},
            f"bad num_experts_per_tok (expected 1 to 16, the experts of the chosen groups, got 17){BAD}",
        ),
        (
            {"num_experts_per_tok": 0},
            f"bad num_experts_per_tok (expected 1 to 16, the experts of the chosen groups, got 0){BAD}",
        ),
        (
            {"moe_intermediate_size": 0},
            f"bad moe_intermediate_size (expected a positive size for 32 experts, got 0){BAD}",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "config.json quantization_config: quantization method is not block FP8 "
            "(expected quant_method fp8, compressed-tensors, w4afp8 or blockscale, got 'awq'); "
            "start from an unquantized (BF16) or block FP8 checkpoint",
        ),
    ],
)
def test_a_config_that_cannot_be_honoured(values, line):
    where = "" if line.startswith("config.json") else "model/config.json: "
    assert refusal(lambda: from_huggingface(changed(**values), where="model/config.json")) == where + line


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type cannot be honoured (expected yarn or default, got 'linear'); "
            "name one of these in rope_scaling or rope_parameters",
        ),
        (
            {"rope_scaling": {"factor": 2.0}},
            "rope_type cannot be honoured (expected yarn or default, got None); "
            "name one of these in rope_scaling or rope_parameters",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling is not a JSON object (got 'yarn')"),
        (
            {"rope_scaling": {**YARN, "factor": 0.5}},
            f"bad rope_scaling.factor (expected greater than or equal to 1, got 0.5){BAD}",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, None),
        (
            {"rope_scaling": ..., "rope_parameters": {**YARN, "beta_slow": 64.0}},
            f"bad rope_parameters.beta_fast (expected at least beta_slow 64.0, got 32.0){BAD}",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 8.0}},
            "two values of factor (expected one, got 4.0 and 8.0); keep one of its spellings",
        ),
        (
            {"rope_scaling": YARN, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "two values of rope_theta (expected one, got 10000.0 and 500000.0); keep one of its spellings",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor cannot be honoured (expected 1.0, got 0.5); "
            "no published DeepSeek-V2 or V3 has it; the runtime does not",
        ),
        ({"rope_theta": 1}, f"bad rope_theta (expected greater than 1, got 1){BAD}"),
    ],
)
def test_rotary_embeddings_that_cannot_be_honoured(values, line):
    missing = "key rope_scaling.original_max_position_embeddings is missing; add it"
    assert refusal(lambda: from_huggingface(changed(**values))) == f"config.json: {line or missing}"


def test_the_same_values_in_both_spellings_of_rope_agree():
    both = changed(
        rope_scaling={**YARN, "type": "yarn"}, rope_theta=5e5, rope_parameters={**YARN, "rope_theta": 5e5}
    )
    one = changed(rope_scaling=..., rope_parameters={**YARN, "rope_theta": 5e5})
    assert from_huggingface(both) == from_huggingface(one)
    assert from_huggingface(both).rope_theta == 5e5


WRONG = [None, True, -1, 0, 1.5, 10**400, math.nan, "", "8", [], [1], [[]], {}, {"type": "yarn"}, {"a": None}]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_no_value_of_a_key_ends_in_anything_but_a_config_or_one_line(value):
    keys = [*ORIGINAL, "quantization_config", "eos_token_id", "rope_parameters", "rope_theta", "num_experts"]
    files = [(from_huggingface, {**ORIGINAL, key: value}) for key in keys]
    files += [(from_huggingface, changed(rope_scaling={**YARN, key: value})) for key in YARN]
    files += [(from_deepseek, {key: value}) for key in MODEL_ARGS]
    for read, values in files:
        with contextlib.suppress(BlockscaleError):
            assert isinstance(read(values), ModelConfig)


def test_a_file_is_told_by_its_keys(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ORIGINAL))
    assert load_config(tmp_path) == load_config(str(file)) == from_huggingface(ORIGINAL)
    file.write_text(json.dumps({"dim": 1024}))
    assert load_config(file) == from_deepseek({"dim": 1024})
    file.write_text('{"dim": 0}')
    assert refusal(lambda: load_config(tmp_path)) == f"{file}: bad dim (expected greater than 0, got 0){BAD}"
    file.write_text('{"vocab_size": 3}')
    assert refusal(lambda: load_config(file)) == (
        f"{file}: not the configuration of a model (expected keys of Hugging Face (model_type, "
        "hidden_size, ...) or of DeepSeek (dim, n_layers, ...), got vocab_size); "
        "pass the model's folder or its config file"
    )
    file.write_text("{")
    assert refusal(lambda: load_config(file)).startswith(f"{file}: is not JSON (")
    file.unlink()
    assert refusal(lambda: load_config(tmp_path)) == (
        f"{file}: cannot be read: No such file or directory; "
        "name the model's folder, its config.json or DeepSeek's config file"
    )
