"""Precision set when a model is loaded: equal to what a conversion writes, by option and by config file."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
from blockscale.checkpoint.names import role_of
from blockscale.checkpoint.precision import parse_precision
from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import BlockscaleError
from blockscale.model.config import ModelConfig, load_config
from blockscale.model.load import load_model
from blockscale.model.model_args import MODEL_ARGS
from blockscale.model.prefill import prefill
from tests import data
from tests.model import models
from tests.model.configs import BAD, refusal

# Widths that no block of 128 divides.
SHAPE = {"hidden_size": 256, "q_lora_rank": 256, "kv_lora_rank": 80, "intermediate_size": 336}
PROMPTS = [[7, 300, 2, 45, 118, 9], [31, 5], [250, 250, 1, 0, 66, 12, 199, 84, 3]]


def load(folder, precision=None, compute="fp8", **options):
    asked = None if precision is None else parse_precision(precision)
    return load_model(folder, device="cpu", dtype=torch.float32, compute=compute, precision=asked, **options)


def logits(model):
    return prefill(model, model.cache(len(PROMPTS), 16), PROMPTS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    models.make(folder, rope_parameters=models.YARN, **SHAPE)
    return folder


@pytest.fixture(scope="module")
def fp8(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "model"
    quantize_checkpoint(source, folder)
    return folder


def write(folder, **values):
    (folder / "mixed.json").write_text(json.dumps(values))
    return folder / "mixed.json"


@pytest.mark.parametrize("compute", ["fp8", "high"])
@pytest.mark.parametrize(
    "precision",
    [
        {"experts": "fp8"},
        {"default": "fp8"},
        {"default": "fp8", "experts": "bf16", "head": "fp8"},
        {"attention": "fp8", "*.layers.1.*": "bf16"},
        {"shared_experts": "fp8", "dense_mlp": "fp8"},
    ],
    ids=str,
)
def test_quantized_at_load_is_quantized_by_a_conversion(source, tmp_path, precision, compute):
    quantize_checkpoint(source, tmp_path / "fp8", Recipe(precision=precision))
    expected = logits(load(tmp_path / "fp8", compute=compute))
    got = logits(load(source, precision, compute))
    assert torch.equal(got, expected)
    assert not torch.equal(got, logits(load(source)))


def test_what_is_stored_is_quantized_and_not_what_the_model_makes_of_it(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "fp8", Recipe(precision={"experts": "fp8"}))
    expected = load_model(tmp_path / "fp8", device="cpu", compute="high")
    asked = parse_precision({"experts": "fp8"})
    got = load_model(source, device="cpu", compute="high", precision=asked)
    assert torch.equal(logits(got), logits(expected))


@pytest.mark.parametrize("role", ["attention", "experts", "dense_mlp", "shared_experts"])
def test_dequantized_at_load_is_dequantized_by_a_conversion(fp8, tmp_path, role):
    dequantize_checkpoint(fp8, tmp_path / "wide", dtype="F32")
    tensors, wide = (load_file(folder / "model.safetensors") for folder in (fp8, tmp_path / "wide"))
    mixed = {name: tensor for name, tensor in tensors.items() if role_of(name) != role}
    mixed |= {name: tensor for name, tensor in wide.items() if role_of(name) == role}
    save_file(mixed, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(fp8 / "config.json", tmp_path)
    got = logits(load(fp8, {role: "bf16"}))
    assert torch.equal(got, logits(load(tmp_path)))
    assert not torch.equal(got, logits(load(fp8)))


def test_the_log_says_what_was_converted(source, fp8, caplog):
    def line(*arguments, **options):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            load(*arguments, **options)
        return caplog.records[-1].message

    experts, others = 2 * 16 * 3, 3 * 5 + 3 + 2 * 3
    assert line(source, {"experts": "fp8"}) == (
        f"linear layers: {others + 1} in float32, {experts} in float8_e4m3fn; FP8 blocks of 128x128, "
        f"float32 scales; {experts} quantized at load"
    )
    assert line(fp8, {"experts": "bf16", "head": "fp8"}) == (
        f"linear layers: {experts} in float32, {others + 1} in float8_e4m3fn; FP8 blocks of 128x128, "
        f"float32 scales; {experts} dequantized at load; 1 quantized at load"
    )
    assert line(fp8, {"experts": "fp8", "default": "fp8"}).endswith("float32 scales")
    assert line(fp8, {"default": "bf16"}) == (
        f"linear layers: {others + experts + 1} in float32; {others + experts} dequantized at load"
    )


def test_a_file_of_precisions_goes_on_top_of_the_checkpoints_own_config(source, fp8, tmp_path):
    article = write(tmp_path, dtype="bf16", moe_inter_dim="fp8")
    own = load_config(source)
    config = load_config(article, own)
    assert config.precision == parse_precision({"default": "bf16", "experts": "fp8"})
    assert config.model_copy(update={"precision": own.precision}) == own
    for folder in (source, fp8):
        got = logits(load(folder, config=article))
        assert torch.equal(got, logits(load(folder, {"default": "bf16", "experts": "fp8"})))
    assert torch.equal(logits(load(source, config=article)), logits(load(source, {"experts": "fp8"})))


@pytest.mark.parametrize(
    ("values", "precision"),
    [
        ({"moe_inter_dim": "fp8"}, {"experts": "fp8"}),
        ({"dtype": "fp8", "moe_inter_dim": "bf16"}, {"default": "fp8", "experts": "bf16"}),
        ({"inter_dim": "fp8", "moe_inter_dim": "bf16"}, {"dense_mlp": "fp8", "experts": "bf16"}),
        ({"dtype": "bf16"}, {"default": "bf16"}),
        ({"dtype": "fp8", "scale_fmt": "ue8m0"}, {"default": "fp8"}),
    ],
)
def test_what_a_file_of_precisions_may_say(source, tmp_path, values, precision):
    config = load_config(write(tmp_path, **values), load_config(source))
    assert sorted(config.precision.spelled()) == sorted("=".join(entry) for entry in precision.items())
    assert config.scale_fmt == values.get("scale_fmt", "float32")
    assert (config.dtype, config.weight_block_size) == ("bf16", None), "how the weights are stored"


def test_its_scale_format_is_that_of_what_is_quantized(source, fp8, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", Recipe("ue8m0", precision={"experts": "fp8"}))
    file = write(tmp_path, moe_inter_dim="fp8", scale_fmt="ue8m0")
    assert torch.equal(logits(load(source, config=file)), logits(load(tmp_path / "out")))
    with pytest.raises(BlockscaleError, match="scale_fmt of the given config is not that of the checkpoint"):
        load(fp8, config=file)


def test_a_whole_config_with_a_precision_takes_the_missing_size_from_the_checkpoint(fp8, tmp_path):
    own = load_config(fp8)
    values = {
        name: getattr(own, field)
        for name, (field, _) in MODEL_ARGS.items()
        if field in ModelConfig.model_fields
    }
    values |= {"max_seq_len": 512, "mscale": 0.8, "rope_factor": 8.0, "original_seq_len": 64}
    whole = load_config(write(tmp_path, **values), own)
    mixed = load_config(write(tmp_path, **{**values, "dtype": "bf16", "moe_inter_dim": "fp8"}), own)
    assert mixed.precision == parse_precision({"default": "bf16", "experts": "fp8"})
    assert mixed == whole.model_copy(update={"precision": mixed.precision})
    assert mixed.moe_intermediate_size == own.moe_intermediate_size
    load(fp8, config=mixed)


def test_an_option_counts_before_the_config(source, tmp_path):
    file = write(tmp_path, dtype="bf16", moe_inter_dim="fp8")
    got = logits(load(source, {"experts": "bf16", "attention": "fp8"}, config=file))
    assert torch.equal(got, logits(load(source, {"attention": "fp8"})))


BESIDE = (
    "and sizes are missing (expected a config.json beside the weights, which has them, got none); "
    "put it there, or give the sizes here and the precision by --precision"
)


def test_without_a_config_there_are_no_sizes(source, tmp_path):
    shutil.copy(source / "model.safetensors", tmp_path)
    for values, name in (
        ({"dtype": "bf16", "moe_inter_dim": "fp8"}, "moe_inter_dim"),
        ({"dim": 256, "n_layers": 3, "inter_dim": "bf16"}, "inter_dim"),
        ({"dtype": "fp8"}, "dtype"),
    ):
        file = write(tmp_path, **values)
        line = f"{file}: {name} is a precision, {BESIDE}"
        assert refusal(lambda file=file: load(tmp_path, config=file)) == line


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"moe_inter_dim": "fp8", "dtype": "int8"}, f"bad dtype (expected 'bf16' or 'fp8', got 'int8'){BAD}"),
        (
            {"moe_inter_dim": "fp8", "scale_fmt": "e8m0"},
            f"unknown scale_fmt (expected float32 | ue8m0 | uf8m0 | null, got 'e8m0'){BAD}",
        ),
        ({"moe_inter_dim": "int4"}, f"bad moe_inter_dim (expected a valid integer, got 'int4'){BAD}"),
        ({"moe_inter_dim": "fp8", "dim": "fp8"}, f"bad dim (expected a valid integer, got 'fp8'){BAD}"),
        (
            {"moe_inter_dim": "fp8", "n_layer": 3},
            "unknown key n_layer (expected names of DeepSeek's ModelArgs); did you mean n_layers?",
        ),
    ],
)
def test_a_file_of_precisions_that_cannot_be_honoured(source, tmp_path, values, line):
    file = write(tmp_path, **values)
    assert refusal(lambda: load_config(file, load_config(source))) == f"{file}: {line}"


@pytest.mark.parametrize(
    ("precision", "line"),
    [
        ({"*.q_porj": "bf16"}, "'*.q_porj': pattern matches no tensor (got "),
        (
            {"*.mlp.gate": "fp8"},
            "precision *.mlp.gate=fp8: nothing becomes FP8 by it (expected linear weights, "
            "got model.layers.1.mlp.gate.weight: router); ",
        ),
        (
            {"head": "fp8", "lm_head.weight": "bf16"},
            "precision head=fp8: nothing becomes FP8 by it (expected linear weights, "
            "got lm_head.weight: set to bf16); ",
        ),
        ({"*.experts.3.*": "fp8"}, "model.layers.1.mlp.experts.3: experts of a layer differ in format ("),
    ],
)
def test_what_cannot_be_given_is_refused(source, precision, line):
    assert refusal(lambda: load(source, precision)).startswith(line)


def test_a_model_without_experts_has_none_to_quantize(tmp_path):
    models.make(tmp_path, first_k_dense_replace=3)
    line = refusal(lambda: load(tmp_path, config=write(tmp_path, dtype="bf16", moe_inter_dim="fp8")))
    assert line.startswith("precision experts=fp8: nothing becomes FP8 by it (")


def test_a_weight_that_is_not_finite_cannot_be_quantized(source, tmp_path):
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 4] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", tmp_path)
    assert refusal(lambda: load(tmp_path, {"attention": "fp8"})) == (
        f"{name}: 1 NaN or Inf, which FP8 scales cannot represent; leave it out of the precision"
    )
    load(tmp_path, {"attention": "fp8", "model.layers.2.*": "bf16"})


@pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")
def test_the_articles_config_on_a_trained_model(tmp_path):
    file = write(tmp_path, dtype="bf16", moe_inter_dim="fp8")
    quantize_checkpoint(data.TINY_DEEPSEEK, tmp_path / "out", Recipe(precision={"experts": "fp8"}))
    prompts = [[501, 1911, 4287, 279, 2386], [1362, 265, 2455], [51, 1774, 647, 263, 606, 484, 327]]

    def answers(*arguments, **options):
        model = load_model(*arguments, device="cpu", compute="fp8", **options)
        return prefill(model, model.cache(3, 8), prompts)

    got = answers(data.TINY_DEEPSEEK, config=file)
    assert torch.equal(got, answers(tmp_path / "out"))
    plain = answers(data.TINY_DEEPSEEK)
    divergence = (plain.softmax(-1) * (plain.log_softmax(-1) - got.log_softmax(-1))).sum(-1)
    assert 0 < divergence.max() < 0.05
