"""Sensitivities against whole runs with one layer replaced."""

import copy

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.metrics import kl_divergence

pytest.importorskip("transformers")
from blockscale.evaluate.sensitivity import sensitivities
from tests.evaluate.models import random_tokens, tiny_llama

IDS = random_tokens(60).view(2, 30)
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head")


@pytest.fixture
def model():
    return tiny_llama(1)


def noisy(model, name, size):
    module = copy.deepcopy(model.get_submodule(name))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        module.weight += size * torch.randn(module.weight.shape, generator=generator)
    return module


def test_each_is_that_of_a_whole_run_with_one_module_replaced(model):
    state = copy.deepcopy(model.state_dict())
    exact = model(IDS).logits
    changed = {name: noisy(model, name, 0.05) for name in NAMES}
    told = []
    found = sensitivities(model, changed, IDS, told.append)
    assert found == told
    assert [each.name for each in found] == list(NAMES)
    for name, each in zip(NAMES, found, strict=True):
        whole = tiny_llama(1)
        whole.get_submodule(name).weight = changed[name].weight
        with torch.no_grad():
            expected = kl_divergence(exact, whole(IDS).logits)[:, :-1].mean().item()
        assert each.kl == pytest.approx(expected, rel=1e-4)
        assert 10 < each.output_sqnr_db < 40
    # The model is as it was.
    assert torch.equal(model(IDS).logits, exact)
    assert model.state_dict().keys() == state.keys()


def test_layers_before_the_replaced_one_do_not_run(model, monkeypatch):
    runs = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: runs.append(number))
    sensitivities(model, {NAMES[1]: noisy(model, NAMES[1], 0.1)}, IDS)
    assert runs == [0, 1, 1]
    runs.clear()
    sensitivities(model, {NAMES[2]: noisy(model, NAMES[2], 0.1)}, IDS)
    assert runs == [0, 1]


def test_what_changes_nothing_costs_nothing_and_more_noise_costs_more(model):
    same, little, much = (
        sensitivities(model, {NAMES[1]: noisy(model, NAMES[1], size)}, IDS)[0] for size in (0, 0.02, 0.2)
    )
    assert same.kl == 0
    assert same.output_sqnr_db == float("inf")
    assert 0 < little.kl < much.kl
    assert little.output_sqnr_db > much.output_sqnr_db


def test_a_module_that_the_reference_lacks_is_refused(model):
    with pytest.raises(BlockscaleError, match="not in the reference"):
        sensitivities(model, {"model.layers.7.mlp.up_proj": torch.nn.Linear(2, 2)}, IDS)


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(BlockscaleError, match="no decoder layers"):
        sensitivities(torch.nn.Linear(2, 2), {"": torch.nn.Linear(2, 2)}, IDS)
