"""One recipe in every layout: the same model is read from each, and said what engines do otherwise."""

import json
import logging

import pytest
import torch

from blockscale import huggingface
from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.checkpoint.precision import parse_precision
from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import BlockscaleError, MissingScaleError
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.subjects import open_subject
from blockscale.model.generate import generate
from tests import data
from tests.model import models
from tests.model.test_quantized import PROMPTS, SHAPE, load, logits

pytest.importorskip("compressed_tensors")

# Layouts of engines have whole groups: widths between experts are those of w4afp8.
WHOLE = {
    **SHAPE,
    "moe_intermediate_size": 128,
    "intermediate_size": 384,
    "kv_lora_rank": 128,
    "v_head_dim": 32,
}
CASES = {
    "w4afp8": ("w4afp8", {"default": "fp8", "experts": "int4:g128"}),
    "w4afp8-alone": ("w4afp8", {"experts": "int4:g128"}),
    "int4": ("compressed-tensors", {"default": "fp8", "experts": "int4:g128"}),
    "int4-narrow": ("compressed-tensors", {"default": "fp8", "experts": "int4:g32"}),
    "int3": ("compressed-tensors", {"default": "fp8", "experts": "int3:g64"}),
    "mxfp4": ("compressed-tensors", {"default": "fp8", "experts": "mxfp4"}),
    "fp8": ("compressed-tensors", {"default": "fp8"}),
    "several": ("compressed-tensors", {"default": "fp8", "experts": "mxfp4", "dense_mlp": "int4:g64"}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    models.make(folder, rope_parameters=models.YARN, **WHOLE)
    return folder


@pytest.fixture(scope="module", params=CASES)
def both(request, source, tmp_path_factory):
    """(layout, checkpoint in it, the same in our own)."""
    layout, precision = CASES[request.param]
    folder = tmp_path_factory.mktemp("layouts") / request.param
    for each in (layout, "blockscale"):
        quantize_checkpoint(source, folder / each, Recipe(layout=each, precision=precision))
    return layout, folder / layout, folder / "blockscale"


@pytest.mark.parametrize("compute", ["fp8", "high"])
def test_logits_are_those_of_our_own_layout(both, compute):
    _, theirs, ours = both
    expected = logits(load(ours, compute))
    assert torch.equal(logits(load(theirs, compute)), expected)
    assert not torch.equal(expected, logits(load(ours, "high" if compute == "fp8" else "fp8")))


def test_one_text_and_one_judgement(both):
    _, theirs, ours = both
    texts = [generate(load(folder), PROMPTS[:2], max_new_tokens=4, stop=()) for folder in (theirs, ours)]
    assert texts[0] == texts[1]
    ids = torch.tensor([PROMPTS[0]])
    for runtime in ("auto", "transformers"):
        loading = Loading(runtime, "cpu", torch.float32)
        one, other = (open_subject(str(folder), loading).logits(ids) for folder in (theirs, ours))
        assert torch.equal(one, other)


def test_precision_is_asked_for_by_the_names_of_weights(both):
    _, theirs, ours = both
    wanted = parse_precision({"*.experts.*_proj.weight": "fp8", "*.o_proj.weight": "bf16"})
    one, other = (logits(load(folder, precision=wanted)) for folder in (theirs, ours))
    assert torch.equal(one, other)
    assert not torch.equal(one, logits(load(ours)))


def test_the_log_says_what_engines_do_otherwise(both, caplog):
    layout, theirs, ours = both

    def line(folder, compute):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            load(folder, compute)
        return next(each.message for each in caplog.records if "linear layers" in each.message)

    note = f"; activations in FP8 groups of 128, not as engines do by the {layout} layout"
    note = note if data.read_config(ours)["quantization_config"].get("group_formats") else ""
    assert line(theirs, "fp8") == line(ours, "fp8") + note
    assert line(theirs, "high") == line(ours, "high")
    assert "not used" not in line(theirs, "fp8")


@pytest.mark.parametrize("both", [name for name in CASES if name != "fp8"], indirect=True)
def test_scales_that_are_missing_or_do_not_fit(both, tmp_path):
    layout, theirs, _ = both
    scale = "model.layers.1.mlp.experts.3.up_proj.weight_scale" + ("_inv" if layout == "w4afp8" else "")
    for file in theirs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data.rewrite(tmp_path, lambda tensors: tensors.update({scale: tensors[scale].float()}))
    with pytest.raises(BlockscaleError, match="scales do not fit"):
        load(tmp_path)
    data.rewrite(tmp_path, lambda tensors: tensors.pop(scale))
    with pytest.raises(MissingScaleError, match="weight without scales"):
        load(tmp_path)


def test_weights_alone_are_quantized_where_config_says_so(source, tmp_path, caplog):
    """As llm-compressor writes it: INT4 for the class Linear, no FP8, no activations."""
    packed, own = (
        Recipe(layout=layout, precision={"default": "int4:g128"})
        for layout in ("compressed-tensors", "blockscale")
    )
    quantize_checkpoint(source, tmp_path / "packed", packed)
    quantize_checkpoint(source, tmp_path / "own", own)
    only_weights(tmp_path / "packed")
    with caplog.at_level(logging.INFO):
        model = load(tmp_path / "packed", "fp8")
    assert "weights alone are quantized, activations stay as they are" in caplog.text
    assert torch.equal(logits(model), logits(load(tmp_path / "own", "high")))
    assert not torch.equal(logits(model), logits(load(tmp_path / "own", "fp8")))
    theirs = huggingface.load_model(tmp_path / "packed", dtype=torch.float32)
    expected = huggingface.load_model(
        tmp_path / "own", huggingface.BlockscaleConfig(compute="high"), dtype=torch.float32
    )
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, expected(ids).logits)


def only_weights(folder):
    """Name the class Linear in one group without activations, as other programs do."""
    config = data.read_config(folder)
    entry = config["quantization_config"]
    (packed,) = (each for each in entry["config_groups"].values() if each["format"] == "pack-quantized")
    packed = {**packed, "targets": ["Linear"], "input_activations": None}
    del packed["format"]
    entry |= {"config_groups": {"group_0": packed}, "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(config))
