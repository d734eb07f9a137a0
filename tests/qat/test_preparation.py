"""Prepared models: what is replaced, what its gradients are, and what is refused."""

import copy
import json

import pytest
import torch

from blockscale import BlockscaleError, quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import NonFiniteError
from blockscale.qat import QatOptions, fake_quantized_weights, preparation, prepare
from blockscale.qat.modules import FakeQuantExperts, fake_quant_layers
from blockscale.qat.preparation import choose
from tests import data
from tests.qat.models import RECIPES, checkpoints, prepared, train

NAMES = ["llama", "qwen3_moe", "deepseek_v3"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {name: checkpoints.make(tmp_path_factory.mktemp("bf16") / name, name) for name in NAMES}


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", "int3"), ("qwen3_moe", "w4a8"), ("deepseek_v3", "w4a8"), ("llama", "fp8")]
)
def test_weights_and_formats_are_those_that_quantize_decides(sources, tmp_path, name, recipe):
    quantize_checkpoint(sources[name], tmp_path / "out", RECIPES[recipe])
    stored = data.read(tmp_path / "out")
    codes = {key for key, tensor in stored.items() if tensor.element_size() == 1}
    for model in (checkpoints.plain(sources[name]), prepared(sources[name], recipe)):
        chosen = choose(model, RECIPES[recipe])
        assert {source for each in chosen for source in each.target.sources} == codes
        low = {source for each in chosen if hasattr(each.fmt, "bits") for source in each.target.sources}
        assert low == {key for key in codes if stored[key].dtype == torch.uint8}


def test_what_has_no_backward_pass_is_refused_with_what_to_load():
    with pytest.raises(BlockscaleError, match=r"no model of transformers.*got Linear.*load it with"):
        prepare(torch.nn.Linear(8, 8), RECIPES["fp8"])


@pytest.mark.parametrize("scales", ["dynamic", "frozen", "learned"])
def test_parameters_stay_the_same_objects_under_the_same_names(sources, scales):
    model = checkpoints.plain(sources["deepseek_v3"])
    before = dict(model.named_parameters())
    assert prepare(model, RECIPES["fp8"], QatOptions(scales)) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = {name for name in after if name not in before}
    shifts = {f"{name}_scale_shift" for name, _ in fake_quantized_weights(model)}
    assert added == (shifts if scales == "learned" else set())
    assert any(isinstance(layer, FakeQuantExperts) for _, layer in fake_quant_layers(model))
    assert "BlockFP8" in repr(model)


def test_masters_of_another_dtype_are_new_and_the_rest_is_not_touched(sources):
    model = checkpoints.transformers.AutoModelForCausalLM.from_pretrained(
        sources["qwen3_moe"], dtype=torch.bfloat16
    )
    prepare(model, RECIPES["w4a8"])
    trained = {name for name, _ in fake_quantized_weights(model)}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16)
    assert model(checkpoints.TOKENS).logits.dtype == torch.bfloat16
    assert all(loss < 20 for loss in train(model, 1))


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", "int3"), ("deepseek_v3", "w4a8"), ("qwen3_moe", "mxfp4")]
)
@pytest.mark.parametrize("scales", ["dynamic", "frozen"])
def test_gradients_are_those_of_the_rounded_weights_in_the_model_of_transformers(
    sources, name, recipe, scales
):
    model = prepared(sources[name], recipe, scales, activations="high")
    plain = checkpoints.plain(sources[name])
    with torch.no_grad():
        for key, value in fake_quantized_weights(model):
            plain.get_parameter(key).copy_(value)
    losses = []
    for each in (model, plain):
        loss = each(checkpoints.TOKENS, labels=checkpoints.TOKENS).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for key, parameter in plain.named_parameters():
        found = model.get_parameter(key).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5, msg=key)


def test_inputs_of_gate_up_and_down_are_rounded_and_gradients_pass(sources):
    rounded = prepared(sources["qwen3_moe"], "fp8")
    high = prepared(sources["qwen3_moe"], "fp8", activations="high")
    experts = [model.model.layers[1].mlp.experts for model in (rounded, high)]
    x = torch.randn(7, 160, generator=torch.Generator().manual_seed(0)).requires_grad_()
    index, weights = torch.randint(6, (7, 2)), torch.rand(7, 2)
    outputs = [each(x, index, weights) for each in experts]
    relative = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
    assert 0.005 < float(relative.detach()) < 0.1
    outputs[0].sum().backward()
    assert bool((x.grad != 0).all())


def test_products_in_bfloat16_have_the_exact_operands_where_scales_are_powers_of_two(sources):
    for recipe, exact in (("ue8m0", True), ("mxfp4", True), ("fp8", False)):
        # Inputs as they are: of such as are a little different, FP8 makes other codes here and there.
        wide = prepared(sources["llama"], recipe, activations="high")
        narrow = prepared(sources["llama"], recipe, activations="high", compute=torch.bfloat16)
        pairs = [*zip(fake_quantized_weights(wide), fake_quantized_weights(narrow), strict=True)]
        assert all(found.dtype == torch.bfloat16 for _, (_, found) in pairs)
        assert all(torch.equal(found.float(), value) for (_, value), (_, found) in pairs) == exact
        difference = checkpoints.logits(narrow) - checkpoints.logits(wide)
        relative = float(difference.norm() / checkpoints.logits(wide).norm())
        assert 0 < relative < 0.03, relative


def test_gradient_checkpointing_changes_no_gradient(sources):
    plain = prepared(sources["deepseek_v3"], "w4a8", "learned").train()
    again = copy.deepcopy(plain)
    again.gradient_checkpointing_enable()
    for model in (plain, again):
        model(checkpoints.TOKENS, labels=checkpoints.TOKENS, use_cache=False).loss.backward()
    found = dict(again.named_parameters())
    assert all(torch.equal(found[key].grad, each.grad) for key, each in plain.named_parameters())
    shifts = [each.grad for key, each in plain.named_parameters() if key.endswith("_scale_shift")]
    assert shifts
    assert all(bool((each != 0).any()) for each in shifts)


def test_learned_scales_move_and_a_state_dict_brings_them_back(sources):
    model = prepared(sources["llama"], "int3", "learned")
    train(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert not torch.equal(layer.scale("weight"), layer.weight_start_scale)
    again = prepared(sources["llama"], "int3", "learned")
    again.load_state_dict(model.state_dict())
    assert torch.equal(checkpoints.logits(again), checkpoints.logits(model))


def refused(model, recipe=None, options=None, **arguments):
    with pytest.raises(BlockscaleError) as caught:
        prepare(model, recipe or Recipe(), options, **arguments)
    assert not [*fake_quant_layers(model)] or "prepared already" in str(caught.value)
    return str(caught.value)


def test_recipes_that_cannot_be_trained_are_refused(sources):
    model = checkpoints.plain(sources["llama"])
    assert "*nothing*" in refused(model, Recipe(include=["*nothing*"]))
    assert "nothing becomes INT4 by it" in refused(model, RECIPES["w4a8"])
    assert "no tensor would be quantized" in refused(model, Recipe(exclude=["*"]))
    assert "block sizes are not chosen" in refused(model, Recipe(block_size="auto"))
    assert "has no place" in refused(model, Recipe(precision={"default": "int4:g128"}))


def test_a_frozen_weight_that_the_recipe_wants_is_refused_unless_it_is_frozen_later(sources):
    model = checkpoints.plain(sources["llama"])
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).requires_grad_(False)
    assert refused(model) == (
        f"{name}: 1 of the 14 weights that the recipe quantizes are frozen (expected requires_grad=True); "
        "unfreeze them, or exclude them in the recipe; freeze what is not to train after prepare"
    )
    prepare(model, Recipe(exclude=["*layers.1.mlp*"]))
    layer = model.model.layers[0].mlp.up_proj.requires_grad_(False)
    model(checkpoints.TOKENS, labels=checkpoints.TOKENS).loss.backward()
    assert layer.weight.grad is None


def test_models_that_are_prepared_or_quantized_are_refused(sources, tmp_path):
    assert "prepared already" in refused(prepared(sources["llama"], "fp8"))
    from blockscale.huggingface import load_model

    quantize_checkpoint(sources["llama"], tmp_path / "fp8")
    assert "quantized already" in refused(load_model(tmp_path / "fp8", dtype=torch.float32))


def test_wrong_options_are_told(sources):
    with pytest.raises(BlockscaleError, match="QatOptions scales: unknown value"):
        QatOptions(scales="static")
    with pytest.raises(BlockscaleError, match="QatOptions masters: unknown value"):
        QatOptions(masters=torch.float16)
    model = checkpoints.plain(sources["llama"])
    assert "dynamic scales would replace" in refused(model, initial=sources["llama"])


def test_a_weight_that_is_not_finite_is_named_or_makes_the_loss_nan(sources):
    model = checkpoints.plain(sources["deepseek_v3"])
    name = "model.layers.1.mlp.experts.down_proj"
    with torch.no_grad():
        model.get_parameter(name)[3, 5, 7] = float("nan")
    own = copy.deepcopy(model)
    with pytest.raises(NonFiniteError, match=rf"^{name}: 1 NaN or Inf value, the first at \[3, 5, 7\]"):
        prepare(model, Recipe(), QatOptions("frozen"))
    assert prepare(own, Recipe())(checkpoints.TOKENS, labels=checkpoints.TOKENS).loss.isnan()


def test_a_layer_that_cannot_be_replaced_is_refused(sources):
    class Own(torch.nn.Linear):
        pass

    model = checkpoints.plain(sources["llama"])
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Own(old.in_features, old.out_features, bias=False)
    assert "Own cannot train through the rounding of its weights" in refused(model)


def test_weights_that_are_not_found_again_are_refused(sources, monkeypatch):
    found = preparation.find_targets
    monkeypatch.setattr(preparation, "find_targets", lambda *arguments: found(*arguments)[1:])
    line = refused(checkpoints.plain(sources["llama"]))
    assert line.startswith(
        "model.layers.0.mlp.down_proj.weight: 1 weights that the recipe quantizes are not found"
    )


def test_config_is_not_touched(sources):
    model = checkpoints.plain(sources["llama"])
    before = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    prepare(model, Recipe())
    assert json.dumps(model.config.to_dict(), sort_keys=True, default=str) == before
