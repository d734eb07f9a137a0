"""Models with weights of fewer than 8 bits: experts multiplied so, the rest dequantized when read."""

import json
import logging

import pytest
import torch

from blockscale import huggingface, ops
from blockscale.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import CorruptCheckpointError
from blockscale.metrics import calc_diff
from blockscale.model.generate import generate
from tests import data
from tests.model import models
from tests.model.test_quantized import PROMPTS, SHAPE, load, logits

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
    _, folder = low
    dequantize_checkpoint(folder, tmp_path / "wide", dtype="F32")
    expected = logits(load(tmp_path / "wide"))
    torch.testing.assert_close(logits(load(folder, "high")), expected, rtol=0, atol=1e-4)


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
