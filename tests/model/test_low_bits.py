"""Models with weights of fewer than 8 bits: experts multiplied so, the rest dequantized when read."""

import json
import logging

import pytest
import torch

from blockscale import huggingface, ops
from blockscale.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import CorruptCheckpointError
from blockscale.metrics import calc_diff, kl_divergence
from blockscale.model import moe
from blockscale.model.decode import decode
from blockscale.model.gemm_names import gemm_names
from blockscale.model.generate import generate
from blockscale.model.prefill import prefill
from tests import data
from tests.model import models
from tests.model.test_quantized import PROMPTS, SHAPE, load, logits, tokens

RECIPES = {
    "int4": {"default": "fp8", "experts": "int4:g128"},
    "mxfp4": {"default": "fp8", "experts": "mxfp4"},
    "int4-narrow": {"default": "fp8", "experts": "int4:g32"},
    "int3": {"default": "fp8", "experts": "int3:g64"},
    "int4-alone": {"experts": "int4:g128"},
    "mxfp4-alone": {"experts": "mxfp4"},
    "everywhere": {"default": "int4:g128"},
}
PREPARED = ("int4", "mxfp4", "int4-alone", "mxfp4-alone", "everywhere")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    models.make(folder, rope_parameters=models.YARN, **SHAPE)
    return folder


@pytest.fixture(scope="module", params=RECIPES)
def low(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("low") / request.param
    recipe = Recipe(layout="blockscale", precision=RECIPES[request.param], scale_fmt="ue8m0")
    quantize_checkpoint(source, folder, recipe)
    return request.param, folder


def test_without_quantized_activations_it_is_the_dequantized_model(low, tmp_path):
    """Which our runtime and transformers read alike: the same logits, and the same text."""
    _, folder = low
    dequantize_checkpoint(folder, tmp_path / "wide", dtype="F32")
    model = load(folder, "high")
    got = logits(model)
    torch.testing.assert_close(got, logits(load(tmp_path / "wide")), rtol=0, atol=1e-4)
    theirs = models.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    expected = torch.stack([models.logits(theirs, prompt)[-1] for prompt in PROMPTS])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    written = theirs.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=5, do_sample=False)
    assert (
        generate(model, PROMPTS[:1], max_new_tokens=5, stop=())[0] == written[0, len(PROMPTS[0]) :].tolist()
    )


@pytest.mark.parametrize("low", ["int4", "mxfp4"], indirect=True)
def test_a_step_continues_what_was_read_at_once(low):
    """Masked experts after contiguous ones, against contiguous ones alone."""
    _, folder = low
    model, prompt = load(folder), tokens(150, 3)
    assert len(prompt) > moe._FEW_TOKENS
    cache = model.cache(1, 160)
    prefill(model, cache, [prompt[:140]])
    for length in range(141, 151):
        step = decode(model, cache, [0], torch.tensor([prompt[length - 1]]), [length])
    whole = prefill(model, model.cache(1, 160), [prompt])
    assert kl_divergence(whole, step).mean() < 0.01


@pytest.mark.parametrize("low", ["int4", "mxfp4"], indirect=True)
def test_an_audit_sees_the_products_of_experts(low):
    _, folder = low
    model = load(folder)
    with ops.audit_gemms(names=gemm_names(model), limits=ops.GemmLimits(calc_diff=1e-6)) as audit:
        generate(model, [tokens(150)], max_new_tokens=2)
    seen = {(record.site, record.op) for record in audit.records if "w4a8" in record.op}
    assert seen == {
        (f"layers.{layer}.mlp.{part}", f"m_grouped_w4a8_gemm_nt_{form}")
        for layer in (1, 2)
        for part in ("gate_up", "down")
        for form in ("contiguous", "masked")
    }
    experts = [record for record in audit.records if "w4a8" in record.op]
    assert all(1e-5 < record.activations.calc_diff < 1e-2 for record in experts)
    assert any(record.op == "fp8_gemm_nt" for record in audit.records)


@pytest.mark.parametrize("low", ["int4-alone", "mxfp4-alone"], indirect=True)
def test_with_them_it_is_what_transformers_computes_on_our_layers(low):
    """Experts alone are quantized: where others are, activations that differ a little round differently."""
    _, folder = low
    model = huggingface.load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    got = logits(load(folder))
    assert calc_diff(got, logits(load(folder, "high"))) > 1e-5  # activations count
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_experts_stay_in_four_bits(low, monkeypatch):
    name, folder = low
    calls = []
    for each in ("masked", "contiguous"):
        full = f"m_grouped_w4a8_gemm_nt_{each}"
        real = getattr(ops, full)
        monkeypatch.setattr(
            ops, full, lambda *args, real=real, each=each, **more: calls.append(each) or real(*args, **more)
        )
    model = load(folder)
    generate(model, PROMPTS[:2], max_new_tokens=3)
    assert bool(calls) == (name in PREPARED)
    if name in PREPARED:
        assert set(calls) == {"masked"}


def test_the_log_says_what_was_found(low, caplog):
    name, folder = low
    with caplog.at_level(logging.INFO):
        load(folder)
    line = next(each.message for each in caplog.records if "linear layers" in each.message)
    spelled = RECIPES[name].get("experts", "int4:g128")
    assert f" in {spelled}" in line if name in PREPARED else f"dequantized from {spelled} at load" in line
    assert "not used" not in line


@pytest.mark.parametrize("low", ["int4"], indirect=True)
def test_experts_of_one_layer_in_two_formats(low, tmp_path):
    _, folder = low
    config = data.read_config(folder)
    entry = config["quantization_config"]["group_formats"]
    key = next(each for each in entry["int4:g128"] if "up_proj" in each)
    config["quantization_config"]["group_formats"] = {
        "int4:g128": [each for each in entry["int4:g128"] if each != key],
        "mxfp4": [key],
    }
    for file in folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptCheckpointError, match=r"up_proj.*experts of a layer differ in format"):
        load(tmp_path)
