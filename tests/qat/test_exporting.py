"""Exported checkpoints: weights and logits of the trained model, verified, with all that lies beside."""

import json

import pytest
import torch

from blockscale import (
    BlockscaleError,
    Recipe,
    RunOptions,
    dequantize_checkpoint,
    quantize_checkpoint,
    verify_checkpoint,
)
from blockscale.errors import NonFiniteError
from blockscale.huggingface import load_model
from blockscale.metrics import calc_diff
from blockscale.qat import QatOptions, export, fake_quantized_weights, prepare
from tests import data
from tests.checkpoint.rounders import StepUp
from tests.qat.models import RECIPES, checkpoints, prepared, train

CASES = [
    ("llama", "fp8", "dynamic"),
    ("llama", "int3", "learned"),
    ("llama", "ue8m0", "frozen"),
    ("qwen3_moe", "w4a8", "dynamic"),
    ("qwen3_moe", "mxfp4", "learned"),
    ("qwen3_moe", "narrow", "frozen"),
    ("deepseek_v3", "ue8m0", "dynamic"),
    ("deepseek_v3", "mxfp4", "dynamic"),
    ("deepseek_v3", "fp8", "learned"),
    ("deepseek_v3", "w4a8", "frozen"),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    names = ["llama", "qwen3_moe", "deepseek_v3"]
    return {name: checkpoints.make(tmp_path_factory.mktemp("bf16") / name, name) for name in names}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, sources, tmp_path_factory):
    """(trained model, its checkpoint, its master weights, report, scales)."""
    name, recipe, scales = request.param
    folder = tmp_path_factory.mktemp("qat")
    model = prepared(sources[name], recipe, scales)
    losses = train(model)
    assert losses[-1] < losses[0]
    report = export(model, folder / "out", masters=folder / "masters")
    return model, folder / "out", folder / "masters", report, scales


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_logits_are_those_of_the_fake_quantized_model(case):
    model, out, *_ = case
    wanted = checkpoints.logits(model)
    found = checkpoints.logits(load_model(out, dtype=torch.float32))
    assert calc_diff(found, wanted) < 1e-10
    reference, other = wanted.log_softmax(-1), found.log_softmax(-1)
    assert float((reference.exp() * (reference - other)).sum(-1).abs().max()) < 1e-6


def test_dequantized_weights_are_those_of_the_last_forward_pass(case, tmp_path):
    model, out, *_ = case
    plain = checkpoints.dequantized(out, tmp_path / "wide")
    for name, value in fake_quantized_weights(model):
        assert same(plain.get_parameter(name).detach(), value), name


def test_all_that_is_not_quantized_is_as_it_was_trained(case, sources):
    model, out, *_ = case
    plain = data.read(out)
    norms = [name for name in plain if name.endswith("norm.weight")]
    assert norms
    assert all(same(plain[name], model.get_parameter(name).detach()) for name in norms)
    assert same(plain["model.embed_tokens.weight"], model.model.embed_tokens.weight.detach())


def test_the_checkpoint_passes_verify_against_the_masters(case):
    _, out, masters, report, scales = case
    quantized = report.tensors["quantize"]
    assert report.calibrated == (0 if scales == "dynamic" else quantized)
    found = verify_checkpoint(out, masters)
    assert found.problems == ()
    assert found.calibrated == report.calibrated
    assert len(found.errors) == quantized
    assert all(error.relative < 0.3 for error in found.errors)


def test_other_masters_are_noticed_by_verify(sources, tmp_path):
    model = prepared(sources["llama"], "fp8")
    export(model, tmp_path / "out", masters=tmp_path / "masters")
    train(model)
    export(model, tmp_path / "later", masters=tmp_path / "trained")
    assert not verify_checkpoint(tmp_path / "out", tmp_path / "trained").ok


def off_nearest(source, folder, recipe):
    """A checkpoint as calibration makes one: some codes are not the nearest, and scales not of the amax."""

    def double(tensors):
        for key in tensors:
            if "_scale" in key and "v_proj" not in key:
                tensors[key] = (2 * tensors[key].float()).to(tensors[key].dtype)

    quantize_checkpoint(source, folder, recipe, rounder=StepUp(source, spoil=double))
    return folder


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("llama", "ue8m0"), ("llama", "int3"), ("deepseek_v3", "w4a8"), ("qwen3_moe", "mxfp4")],
)
def test_training_begins_with_the_codes_and_scales_of_a_checkpoint(sources, tmp_path, name, recipe):
    begin = off_nearest(sources[name], tmp_path / "begin", RECIPES[recipe])
    model = prepared(sources[name], recipe, "learned", initial=begin)
    export(model, tmp_path / "out", masters=tmp_path / "masters", dtype=torch.bfloat16)
    before, after = data.read(begin), data.read(tmp_path / "out")
    assert before.keys() == after.keys()
    for key in [key for key in after if key.endswith("e_score_correction_bias")]:
        after[key] = after[key].to(before[key].dtype)  # transformers keeps it in float32
    assert all(same(after[key], before[key]) for key in before)
    # Masters are nearer to the source than the values are, and no nearer than they may be.
    wide = checkpoints.dequantized(begin, tmp_path / "wide")
    source = checkpoints.plain(sources[name])
    moved = 0.0
    for key, value in fake_quantized_weights(model):
        assert same(wide.get_parameter(key).detach(), value)
        ends = [each.get_parameter(key).detach() for each in (model, source)]
        assert bool(((ends[0] - ends[1]).abs() <= (value - ends[1]).abs()).all())
        moved += float((ends[0] - value).abs().sum())
    assert moved > 0


def test_codes_and_scales_of_the_compressed_tensors_layout_are_read_too(sources, tmp_path):
    precision = {"*[qkv]_proj*": "int4:g32", "*o_proj*": "fp8"}
    recipe = Recipe(layout="compressed-tensors", precision=precision)
    out = off_nearest(sources["qwen3_moe"], tmp_path / "begin", recipe)
    model = prepare(checkpoints.plain(sources["qwen3_moe"]), recipe, QatOptions("frozen"), initial=out)
    export(model, tmp_path / "out", dtype=torch.bfloat16)
    before, after = data.read(out), data.read(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same(after[key], before[key]) for key in before)


def test_frozen_scales_are_those_of_the_beginning_after_training(sources, tmp_path):
    begin = off_nearest(sources["llama"], tmp_path / "begin", RECIPES["int3"])
    model = prepared(sources["llama"], "int3", "frozen", initial=begin)
    train(model, rate=0.1)
    export(model, tmp_path / "out")
    before, after = data.read(begin), data.read(tmp_path / "out")
    scales = [name for name in before if name.endswith("_scale")]
    assert len(scales) == 14
    assert all(same(after[name], before[name]) for name in scales)
    assert not any(same(after[name], before[name]) for name in before if name.endswith("q_proj.weight"))


@pytest.mark.parametrize("wrong", ["recipe", "shape", "plain"])
def test_a_beginning_that_does_not_fit_is_refused(sources, tmp_path, wrong):
    begin = tmp_path / "begin"
    if wrong == "recipe":
        quantize_checkpoint(sources["llama"], begin, RECIPES["int3"])
    elif wrong == "shape":
        other = checkpoints.make(tmp_path / "other", "llama", intermediate_size=136)
        quantize_checkpoint(other, begin, RECIPES["fp8"])
    else:
        begin = sources["llama"]
    with pytest.raises(BlockscaleError, match="cannot begin with this checkpoint"):
        prepared(sources["llama"], "fp8", "frozen", initial=begin)


def test_files_go_along_and_config_says_what_the_checkpoint_is(sources, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "tokenizer.json").write_text("{}")
    (files / "config.json").write_text("no config")
    (files / "model.safetensors").write_text("no weights")
    (files / "figures").mkdir()
    (files / "figures" / "one.txt").write_text("1")
    model = prepared(sources["deepseek_v3"], "ue8m0")
    export(model, tmp_path / "out", files=files, dtype=torch.bfloat16)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "figures" / "one.txt").read_text() == "1"
    config = data.read_config(tmp_path / "out")
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"
    stored = data.read(tmp_path / "out")
    kept = {tensor.dtype for name, tensor in stored.items() if tensor.element_size() == 2}
    assert kept == {torch.bfloat16}
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert "lm_head.weight" in stored


@pytest.mark.parametrize(("name", "recipe"), [("llama", "int3"), ("deepseek_v3", "w4a8")])
def test_a_model_in_bfloat16_with_wide_masters_has_the_logits_of_its_checkpoint(
    sources, tmp_path, name, recipe
):
    loaded = checkpoints.transformers.AutoModelForCausalLM.from_pretrained(
        sources[name], dtype=torch.bfloat16
    )
    model = prepare(loaded, RECIPES[recipe], QatOptions("learned"))
    train(model)
    export(model, tmp_path / "out", masters=tmp_path / "masters")
    assert verify_checkpoint(tmp_path / "out", tmp_path / "masters").problems == ()
    assert data.read_config(tmp_path / "out")["dtype"] == "bfloat16"
    assert data.read(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16
    found = load_model(tmp_path / "out", dtype=torch.bfloat16)
    assert calc_diff(checkpoints.logits(found), checkpoints.logits(model)) < 1e-10


def test_a_tied_head_is_not_written_twice(sources, tmp_path):
    model = prepared(sources["llama"], "fp8")
    export(model, tmp_path / "out", dtype=torch.bfloat16)
    assert data.read(tmp_path / "out").keys() >= {"model.embed_tokens.weight"}
    assert "lm_head.weight" not in data.read(tmp_path / "out")


def test_a_state_dict_from_elsewhere_is_what_is_exported(sources, tmp_path):
    model, trained = (prepared(sources["deepseek_v3"], "w4a8", "learned") for _ in range(2))
    train(trained)
    export(model, tmp_path / "out", state_dict=trained.state_dict())
    export(trained, tmp_path / "expected")
    out, expected = (data.read(tmp_path / name) for name in ("out", "expected"))
    assert all(same(out[name], expected[name]) for name in expected)


def test_an_interrupted_export_goes_on_where_the_masters_are(sources, tmp_path, monkeypatch):
    model = prepared(sources["llama"], "int3", "frozen")
    export(model, tmp_path / "out", masters=tmp_path / "masters")
    with pytest.raises(BlockscaleError, match="masters: holds files already"):
        export(model, tmp_path / "again", masters=tmp_path / "masters")
    run = RunOptions(overwrite=True)
    export(model, tmp_path / "again", masters=tmp_path / "masters", run=run)
    manifests = [json.loads((tmp_path / name / "blockscale.json").read_text()) for name in ("out", "again")]
    assert manifests[0]["options"]["calibration"] == manifests[1]["options"]["calibration"]
    assert manifests[0]["options"]["calibration"]["method"] == "training"


def test_what_cannot_be_exported_is_refused(sources, tmp_path):
    with pytest.raises(BlockscaleError, match="export: model is not prepared"):
        export(checkpoints.plain(sources["llama"]), tmp_path / "out")
    model = prepared(sources["llama"], "fp8", "frozen")
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[1, 2] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"^{name}.weight: 1 NaN or Inf value, the first at \[1, 2\]"):
        export(model, tmp_path / "out")
    model.set_submodule(name, torch.nn.Linear(192, 200, bias=False))
    with pytest.raises(
        BlockscaleError, match=f"{name}.weight: does not train as the recipe of the model says"
    ):
        export(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_exported_checkpoint_can_be_dequantized_to_any_dtype(sources, tmp_path):
    model = prepared(sources["llama"], "ue8m0")
    export(model, tmp_path / "out")
    dequantize_checkpoint(tmp_path / "out", tmp_path / "wide", dtype="BF16")
    for name, value in fake_quantized_weights(model):
        # Four significant bits and a power of two are BF16 as they are.
        assert torch.equal(data.read(tmp_path / "wide")[name].float(), value)
