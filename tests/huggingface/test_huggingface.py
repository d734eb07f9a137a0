"""Checkpoints in FP8 as models of transformers: against transformers alone on the same numbers."""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blockscale import huggingface, ops, reference
from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from blockscale.metrics import calc_diff
from tests import data
from tests.huggingface import checkpoints
from tests.huggingface.checkpoints import MODELS, logits, transformers

RECIPES = {
    "float32": {},
    "ue8m0": {"scale_fmt": "ue8m0"},
    "narrow": {"block_size": (64, 32)},
    "mixed": {"exclude": ["*o_proj*", "*layers.0.mlp*"]},
}


CASES = [
    ("llama", "float32"),
    ("llama", "narrow"),
    ("llama", "mixed"),
    ("qwen3_moe", "ue8m0"),
    ("deepseek_v3", "float32"),
    ("deepseek_v3", "narrow"),
]
ROUNDING = 1e-4  # of logits with a standard deviation of 2


@dataclass(frozen=True)
class Case:
    """An FP8 checkpoint, the model that reads it, and its dequantized weights in transformers alone."""

    source: Path
    recipe: str
    fp8: Path
    model: Any
    wide: Any


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {name: checkpoints.make(tmp_path_factory.mktemp("bf16") / name, name) for name in MODELS}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, sources, tmp_path_factory):
    name, recipe = request.param
    folder = tmp_path_factory.mktemp("fp8")
    fp8 = checkpoints.quantize(sources[name], folder / "fp8", **RECIPES[recipe])
    return Case(sources[name], recipe, fp8, load(fp8), checkpoints.dequantized(fp8, folder / "wide"))


def load(folder, compute="auto"):
    return huggingface.load_model(folder, huggingface.BlockscaleConfig(compute), dtype=torch.float32)


@contextmanager
def computing(model, compute):
    """The model with another way to compute."""
    layers = [module for module in model.modules() if hasattr(module, "compute")]
    before = layers[0].compute
    for layer in layers:
        layer.compute = compute
    yield model
    for layer in layers:
        layer.compute = before


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_it_is_transformers_on_dequantized_weights_and_fake_quantized_activations(case):
    expected = logits(checkpoints.fake_quantized(case.wide, case.fp8))
    assert calc_diff(expected, logits(case.wide)) > 1e-4
    torch.testing.assert_close(logits(case.model), expected, rtol=0, atol=ROUNDING)
    with computing(case.model, "fp8") as model:
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)


def test_high_is_transformers_on_dequantized_weights(case):
    torch.testing.assert_close(logits(load(case.fp8, "high")), logits(case.wide), rtol=0, atol=ROUNDING)


def test_the_layers_in_fp8_are_those_of_the_checkpoint_and_the_config_says_so(case):
    stored = {name for name, each in data.read(case.fp8).items() if each.dtype == torch.float8_e4m3fn}
    found = set(huggingface.quantized_layers(case.model))
    fused = {name for name in found if ".experts." in name}
    assert found - fused == {name for name in stored if ".experts." not in name}
    of_layers = {name.split(".experts.")[0] for name in stored if ".experts." in name}
    assert fused == {f"{each}.experts.{leaf}" for each in of_layers for leaf in ("gate_up_proj", "down_proj")}
    record = case.model.config.quantization_config
    on_disk = data.read_config(case.fp8)["quantization_config"]
    assert (record.quant_method, record.compute) == ("blockscale", "auto")
    assert record.weight_block_size == on_disk["weight_block_size"]
    assert record.scale_fmt == on_disk.get("scale_fmt", "float32")
    kept = {path for path, each in case.model.named_modules() if isinstance(each, torch.nn.Linear)}
    assert set(record.modules_to_not_convert) == kept
    assert json.loads(case.model.config.to_json_string())["quantization_config"] == record.to_dict()
    assert (
        f"{len(kept)} in float32, {len(stored)} in float8_e4m3fn; FP8 blocks of"
        in huggingface.format_summary(case.model)
    )
    assert not any(each.requires_grad for each in case.model.parameters() if each.element_size() == 1)


def test_quantizing_at_load_gives_the_codes_and_scales_of_the_written_checkpoint(case):
    stored = case.model.state_dict()
    config = huggingface.BlockscaleConfig(quantize=RECIPES[case.recipe] or True)
    made = huggingface.load_model(case.source, config, dtype=torch.float32)
    assert made.state_dict().keys() == stored.keys()
    assert all(same_bits(value, stored[name]) for name, value in made.state_dict().items())
    assert torch.equal(logits(made), logits(case.model))
    record, written = made.config.quantization_config, case.model.config.quantization_config
    assert record.modules_to_not_convert == written.modules_to_not_convert
    assert record.fmt == written.fmt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_quantized_at_load_from_what_is_stored_not_from_the_dtype_of_the_model(tmp_path, dtype):
    source = checkpoints.make(tmp_path / "source", "deepseek_v3", dtype)
    fp8 = checkpoints.quantize(source, tmp_path / "fp8")
    stored = huggingface.load_model(fp8, dtype=torch.bfloat16).state_dict()
    made = huggingface.load_model(
        source, huggingface.BlockscaleConfig(quantize=True), dtype=torch.bfloat16
    ).state_dict()
    assert all(same_bits(value, stored[name]) for name, value in made.items())
    assert made["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn


def test_transformers_takes_the_config_itself_for_a_checkpoint_that_is_not_quantized(sources):
    config = huggingface.BlockscaleConfig("high", Recipe(include=("*down_proj*",)))
    loader = transformers.LlamaForCausalLM
    model = loader.from_pretrained(sources["llama"], quantization_config=config, dtype=torch.float32)
    ours = huggingface.load_model(sources["llama"], config, dtype=torch.float32)
    assert huggingface.quantized_layers(model) == tuple(
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)
    )
    assert torch.equal(logits(model), logits(ours))
    assert config.modules_to_not_convert == []  # the user's own object may load another model


def test_the_output_head_is_quantized_where_it_is_named(sources):
    config = huggingface.BlockscaleConfig(quantize={"precision": {"head": "fp8"}})
    model = huggingface.load_model(sources["deepseek_v3"], config)
    assert huggingface.quantized_layers(model) == ("lm_head.weight",)
    assert logits(model).isfinite().all()


def test_experts_that_are_fused_on_disk_have_blocks_across_gate_and_up(sources, tmp_path):
    tensors = data.read(sources["qwen3_moe"])
    experts = range(checkpoints.QWEN3_MOE["num_experts"])
    prefix = "model.layers.1.mlp.experts."
    gates, ups, downs = (
        torch.stack([tensors.pop(f"{prefix}{expert}.{leaf}_proj.weight") for expert in experts])
        for leaf in ("gate", "up", "down")
    )
    fused = {f"{prefix}gate_up_proj": torch.cat([gates, ups * 9], 1), f"{prefix}down_proj": downs}
    config = data.read_config(sources["qwen3_moe"])
    source = data.write(tmp_path / "source", data.Model(tensors | fused, config))
    fp8 = checkpoints.quantize(source, tmp_path / "fp8")
    stored = load_file(fp8 / "model.safetensors")
    model = load(fp8, "high")
    layer = model.get_submodule(prefix.removesuffix("."))
    name = f"{prefix}gate_up_proj"
    assert torch.equal(layer.gate_up_proj_scale_inv, stored[f"{name}_scale_inv"])
    wide = reference.dequantize_weight(stored[name], stored[f"{name}_scale_inv"], dtype=torch.float32)
    x = torch.randn(3, checkpoints.QWEN3_MOE["hidden_size"])
    torch.testing.assert_close(layer._product("gate_up_proj", 2, x), x @ wide[2].T, rtol=0, atol=1e-5)
    made = huggingface.load_model(
        source, huggingface.BlockscaleConfig("high", quantize=True), dtype=torch.float32
    )
    assert torch.equal(logits(made), logits(model))


def test_on_a_device_with_fp8_arithmetic_the_gemm_multiplies_what_it_can(case, monkeypatch):
    shapes, real, expected = set(), ops.fp8_gemm_nt, logits(case.model)

    def spy(a, a_scale, b, b_scale, **options):
        shapes.add(tuple(b.shape))
        return real(a, a_scale, b, b_scale, **options)

    monkeypatch.setattr("blockscale.huggingface.linear.has_fp8", lambda device: True)
    monkeypatch.setattr(ops, "fp8_gemm_nt", spy)
    with computing(case.model, "fp8") as model:
        assert torch.equal(logits(model), expected)
    assert not shapes
    assert calc_diff(logits(case.model), expected) < 1e-4
    assert all(side % 16 == 0 for shape in shapes for side in shape)
    assert bool(shapes) == (case.model.config.quantization_config.weight_block_size == [128, 128])


@pytest.mark.gpu
def test_on_a_gpu_the_result_is_that_of_the_emulation(case):
    model = huggingface.load_model(case.fp8, device_map="cuda")
    with computing(model, "fp8"):
        expected = model(checkpoints.TOKENS.cuda()).logits
    assert calc_diff(model(checkpoints.TOKENS.cuda()).logits, expected) < 1e-2


def test_text_is_generated_from_the_cache_as_without_it(case):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = checkpoints.TOKENS[:1]
    written = case.model.generate(prompt, **options)
    assert written.shape == (1, prompt.shape[1] + 4)
    assert torch.equal(written, case.model.generate(prompt, use_cache=False, **options))


def test_in_bfloat16_the_result_is_close_to_float32(sources):
    config = huggingface.BlockscaleConfig(quantize=True)
    wide, narrow = (
        huggingface.load_model(sources["llama"], config, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert calc_diff(logits(narrow), logits(wide)) < 1e-2


@pytest.mark.skipif(not data.TINY_DEEPSEEK.exists(), reason="the shared models are not here")
def test_a_trained_model_of_several_shards(tmp_path):
    quantize_checkpoint(data.TINY_DEEPSEEK, tmp_path / "fp8", Recipe(scale_fmt="ue8m0"))
    wide = checkpoints.dequantized(tmp_path / "fp8", tmp_path / "wide")
    model = load(tmp_path / "fp8")
    expected = logits(checkpoints.fake_quantized(wide, tmp_path / "fp8"))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-3)
    with computing(model, "high"):
        torch.testing.assert_close(logits(model), logits(wide), rtol=0, atol=1e-3)
