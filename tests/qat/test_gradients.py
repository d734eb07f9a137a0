"""Gradients of a step, launched or replayed."""

from contextlib import nullcontext

import pytest
import torch
from transformers import masking_utils

from blockscale.checkpoint.source import open_source
from blockscale.model.ranks import ONE
from blockscale.qat import QatOptions, prepare
from blockscale.qat.arithmetic import arithmetic_of
from blockscale.qat.gradients import Gradients, Objective, one_sequence_a_row
from blockscale.qat.grouped import is_fast
from blockscale.qat.loading import load
from tests.evaluate.models import WORD_COUNT, random_tokens
from tests.qat.jobs import INT3, make_source

BATCH, CONTEXT = 4, 16
KINDS = ["llama", "deepseek_v3", "mtp"]


@pytest.fixture
def make_model(tmp_path):
    def make(name, device="cpu", **options):
        folder = make_source(tmp_path / name, name)
        model = load(open_source(str(folder)), torch.float32, ONE).to(device).train()
        return prepare(model, INT3, QatOptions(**options)) if options else model

    return make


def make_ids(seed, device="cpu"):
    return random_tokens(BATCH * CONTEXT, seed, WORD_COUNT).view(BATCH, CONTEXT).to(device)


def test_micro_batches_give_the_gradients_of_the_whole(make_model):
    ids, found = make_ids(1), []
    for micro_batch in (None, 1):
        model = make_model("llama")
        loss = Objective(model, None, nullcontext, micro_batch).backward(ids)
        found.append([loss, *(each.grad for each in model.parameters())])
    torch.testing.assert_close(*found)


def test_rows_are_one_sequence_without_being_looked_at(make_model, monkeypatch):
    model, ids = make_model("llama"), make_ids(2)
    wanted = model(input_ids=ids, use_cache=False).logits

    def looked(positions):
        raise AssertionError

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked)
    with pytest.raises(AssertionError):
        model(input_ids=ids, use_cache=False)
    with one_sequence_a_row():
        assert model(input_ids=ids, use_cache=False).logits.equal(wanted)
    assert masking_utils.find_packed_sequence_indices is looked


def test_gradients_are_of_one_step_each(make_model):
    model = make_model("llama")
    gradients = Gradients(Objective(model, None, nullcontext, None).backward, model.parameters(), False)
    for seed in (3, 4):
        gradients.clear()
        loss = gradients(make_ids(seed))
    alone = make_model("llama")
    assert loss == Objective(alone, None, nullcontext, None).backward(make_ids(4))
    torch.testing.assert_close(
        [each.grad for each in model.parameters()], [each.grad for each in alone.parameters()]
    )
    assert not gradients.is_captured


def _run(model, captures, steps=4):
    """Losses of a few steps, and whether they were replayed."""
    arithmetic = arithmetic_of(torch.device("cuda"), torch.bfloat16)
    objective = Objective(model, None, arithmetic, 2)
    gradients = Gradients(objective.backward, model.parameters(), captures)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for seed in range(steps):
        losses.append(float(gradients(make_ids(seed, "cuda"))))
        optimizer.step()
        gradients.clear()
    return losses, gradients.is_captured


@pytest.mark.gpu
@pytest.mark.parametrize("scales", ["dynamic", "learned"])
@pytest.mark.parametrize("name", KINDS)
def test_replayed_steps_are_the_launched_ones(name, scales, make_model, caplog):
    options = {"compute": torch.bfloat16, "scales": scales}
    wanted, launched = _run(make_model(name, "cuda", **options), False)
    found, replayed = _run(make_model(name, "cuda", **options), True)
    assert found == pytest.approx(wanted, rel=1e-3)  # sums of BF16 products may be in another order
    # One expert after the other asks the device which are needed.
    assert (launched, replayed) == (False, name == "llama" or is_fast(torch.device("cuda")))
    assert replayed == (not caplog.records)


@pytest.mark.gpu
def test_what_cannot_be_captured_is_launched(make_model, caplog):
    model = make_model("llama", "cuda")
    objective = Objective(model, None, nullcontext, None)

    def backward(ids):
        loss = objective.backward(ids)
        assert loss.item() > 0  # waits for the device
        return loss

    gradients = Gradients(backward, model.parameters(), True)
    found = [float(gradients(make_ids(seed, "cuda"))) or gradients.clear() for seed in (5, 5, 5)]
    assert found[1:] == pytest.approx(found[:1] * 2)
    assert not gradients.is_captured
    (record,) = caplog.records
    assert record.getMessage().startswith("a step cannot be captured, and is launched kernel by kernel: ")
