"""A multi-token prediction layer trains with its model, and the runtime drafts with what is exported."""

import math
from contextlib import nullcontext

import pytest
import torch

from blockscale import BlockscaleError, verify_checkpoint
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.source import open_source
from blockscale.evaluate.subjects import RuntimeSubject
from blockscale.huggingface.mtp import has_mtp
from blockscale.model.ranks import ONE
from blockscale.qat import QatOptions, RunLimits, export, prepare, train
from blockscale.qat.arithmetic import first_not_finite
from blockscale.qat.gradients import Objective
from blockscale.qat.loading import load
from blockscale.qat.losses import MTP_WEIGHT, divergence, next_token_loss
from blockscale.qat.sharding import layers_of
from tests import data
from tests.evaluate.models import random_tokens, save_tokenizer
from tests.model import models
from tests.model.test_mtp import drafts, expected_drafts
from tests.model.test_mtp import load as load_runtime
from tests.qat.jobs import make_text, training

W4A8 = Recipe(layout="blockscale", precision={"default": "fp8", "experts": "int4:g32"})
LAYER = f"model.layers.{models.SMALL['num_hidden_layers']}."
SIZES = {"moe_intermediate_size": 96, "initializer_range": 0.05}
SEQUENCE = random_tokens(40, 3, 320)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint with the layer, and what transformers and the equations make of it."""
    folder = tmp_path_factory.mktemp("mtp") / "source"
    parts = models.make_mtp(folder, **SIZES)
    save_tokenizer(folder)
    return folder, parts


@pytest.fixture
def source(made):
    return made[0]


def load_model(folder):
    return load(open_source(str(folder)), torch.float32, ONE)


def predicted(model):
    with torch.no_grad():
        return model(input_ids=SEQUENCE[None], use_cache=False, drafts=True)


def test_drafts_are_those_of_the_equations_and_the_model_is_as_without(made):
    folder, parts = made
    model = load_model(folder).eval()
    found = predicted(model)
    torch.testing.assert_close(found.drafts[0], expected_drafts(*parts, SEQUENCE), rtol=0, atol=1e-5)
    plain = parts[0](SEQUENCE[None]).logits
    assert found.logits.equal(plain)
    assert model(SEQUENCE[None]).logits.equal(plain)
    assert model(SEQUENCE[None], labels=SEQUENCE[None]).loss > 0


@pytest.mark.parametrize(
    ("recipe", "activations"), [(Recipe(), "fp8"), (W4A8, "high")], ids=["fp8", "w4a8 on unquantized inputs"]
)
def test_the_runtime_has_the_logits_and_drafts_of_the_fake_quantized_model(
    source, tmp_path, recipe, activations
):
    model = prepare(load_model(source), recipe, QatOptions("learned", activations)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        Objective(model, None, nullcontext, None).backward(SEQUENCE.view(2, 20))
        optimizer.step()
        optimizer.zero_grad()
    export(model.eval(), tmp_path / "out", masters=tmp_path / "masters")
    found = predicted(model)
    runtime = load_runtime(tmp_path / "out", mtp=True, compute=activations)
    torch.testing.assert_close(
        RuntimeSubject("", runtime).logits(SEQUENCE[None]), found.logits, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(drafts(runtime, SEQUENCE, False), found.drafts[0], rtol=0, atol=1e-4)
    assert verify_checkpoint(tmp_path / "out", tmp_path / "masters").ok


def test_what_is_trained_and_exported_is_all_that_the_checkpoint_has(source, tmp_path):
    text = make_text(tmp_path / "text.txt")
    job = training(source, text, recipe=W4A8, steps=2, context=12)
    train(job, tmp_path / "out", RunLimits(masters=tmp_path / "masters"))
    before, after = data.read(source), data.read(tmp_path / "masters")
    assert after.keys() == before.keys()
    kept = {name for name, each in before.items() if name.startswith(LAYER) and after[name].equal(each)}
    experts = {name for name in before if name.startswith(f"{LAYER}mlp.experts.")}
    assert kept - experts == {f"{LAYER}mlp.gate.e_score_correction_bias"}, "the layer did not train"
    assert len(kept & experts) < len(experts) / 2  # an expert may get no token
    router = f"{LAYER}mlp.gate.weight"
    assert after[router].equal(before[router].bfloat16())
    for copy, own in {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}.items():
        assert after[f"{LAYER}{copy}.weight"].equal(after[f"{own}.weight"])
    out = data.read(tmp_path / "out")
    assert out[f"{LAYER}mlp.experts.0.up_proj.weight"].dtype == torch.uint8
    assert out[f"{LAYER}self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    config = data.read_config(tmp_path / "out")
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["num_nextn_predict_layers"] == 1


def test_the_layer_is_sharded_as_the_others_are(source):
    model = load_model(source)
    assert layers_of(model) == list(model.model.layers)
    assert len(model.model.layers) == models.SMALL["num_hidden_layers"] + 1


def test_of_a_quantized_head_there_is_no_copy(source, tmp_path):
    model = prepare(load_model(source), Recipe(precision={"head": "fp8"}), QatOptions("learned"))
    export(model, tmp_path / "out")
    names = data.read(tmp_path / "out").keys()
    assert "lm_head.weight_scale_inv" in names
    assert f"{LAYER}shared_head.head.weight" not in names
    assert f"{LAYER}embed_tokens.weight" in names
    drafts(load_runtime(tmp_path / "out", mtp=True), SEQUENCE, False)


def test_the_copy_of_a_tied_head_is_the_embedding(tmp_path):
    models.make_mtp(tmp_path / "tied", tie_word_embeddings=True, **SIZES)
    model = prepare(load_model(tmp_path / "tied"), Recipe())
    export(model, tmp_path / "out")
    tensors = data.read(tmp_path / "out")
    assert "lm_head.weight" not in tensors
    assert tensors[f"{LAYER}shared_head.head.weight"].equal(model.model.embed_tokens.weight)


def test_a_context_with_nothing_to_draft_is_refused(source, tmp_path):
    text = make_text(tmp_path / "text.txt")
    with pytest.raises(BlockscaleError, match=r"context: too short .*expected at least 3, got 2"):
        train(training(source, text, context=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    short = train(training(source, text, recipe=W4A8, steps=1, context=3, distill=None), tmp_path / "short")
    assert math.isfinite(short.steps[0].loss)


def test_the_loss_is_that_of_the_model_and_a_tenth_of_that_of_its_drafts(source):
    model, teacher = load_model(source).eval(), load_model(source)
    ids, found = SEQUENCE[None], predicted(model)
    alone = Objective(model, None, nullcontext, None).backward(ids)
    expected = next_token_loss(found.logits, ids) + MTP_WEIGHT * next_token_loss(found.drafts, ids[:, 1:])
    torch.testing.assert_close(alone, expected)
    distilled = Objective(model, teacher, nullcontext, None).backward(ids)
    # Of the second token after a position the model knows more a position later.
    later = divergence(found.drafts, found.logits[:, 1:])
    torch.testing.assert_close(distilled, MTP_WEIGHT * later)
    assert later > 0.01


def test_a_layer_that_is_not_finite_is_named(source):
    model = load_model(source)
    with torch.no_grad():
        model.model.layers[-1].eh_proj.weight[3, 5] = float("nan")
    objective = Objective(model, None, nullcontext, None)
    assert first_not_finite(model, objective.predicted, (SEQUENCE[None],)) == f"{LAYER}eh_proj"


def test_several_layers_are_refused_and_none_is_no_reason_to(made, tmp_path):
    folder, _ = made
    data.write(
        tmp_path / "two",
        data.Model(data.read(folder), data.read_config(folder) | {"num_nextn_predict_layers": 2}, {}),
    )
    with pytest.raises(BlockscaleError, match=r"several multi-token prediction layers .*expected one, got 2"):
        has_mtp(open_source(str(tmp_path / "two")))
    without = {name: each for name, each in data.read(folder).items() if not name.startswith(LAYER)}
    data.write(tmp_path / "none", data.Model(without, data.read_config(folder), {}))
    assert not has_mtp(open_source(str(tmp_path / "none")))
