"""Losses and their gradients against float64, however many rows are looked at together."""

import pytest
import torch
import torch.nn.functional as F

from blockscale.qat import losses
from blockscale.qat.losses import divergence, next_token_loss

SHAPE = (3, 5, 11)


def logits(seed, dtype=torch.float32):
    return (3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))).to(dtype)


def exact(loss, *arguments):
    """Value and gradient in float64."""
    first = arguments[0].detach().double().requires_grad_()
    value = loss(first, *arguments[1:])
    value.backward()
    return value.detach(), first.grad


@pytest.fixture(params=[1, 110, 1 << 20], ids=lambda values: f"{values} values at a time")
def at_a_time(request, monkeypatch):
    monkeypatch.setattr(losses, "_VALUES", request.param)


def check(loss, reference, first, *others):
    first.requires_grad_()
    found = loss(first, *others)
    (7 * found).backward()
    value, gradient = exact(reference, first, *others)
    torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-6)
    # Rounded as it is made and again when it is multiplied: half a step of 8 bits each.
    bound = 1e-6 if first.dtype == torch.float32 else 2 * 2**-8
    torch.testing.assert_close(first.grad.double(), 7 * gradient, rtol=bound, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("at_a_time")
def test_next_token_is_cross_entropy_shifted_by_one(dtype):
    ids = torch.randint(11, SHAPE[:2], generator=torch.Generator().manual_seed(2))
    check(
        next_token_loss,
        lambda x, ids: F.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        logits(0, dtype),
        ids,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("at_a_time")
def test_divergence_is_that_of_the_model_from_the_teacher(dtype):
    check(
        divergence,
        lambda x, t: F.kl_div(
            x.log_softmax(-1).flatten(0, 1), t.double().log_softmax(-1).flatten(0, 1), reduction="batchmean",
            log_target=True,
        ),
        logits(0, dtype),
        logits(1, dtype),
    )  # fmt: skip


def test_the_last_position_of_a_window_has_no_target_and_no_gradient():
    first = logits(0).requires_grad_()
    next_token_loss(first, torch.zeros(SHAPE[:2], dtype=torch.int64)).backward()
    assert not first.grad[:, -1].any()
    assert first.grad[:, :-1].any()


def test_where_no_gradient_is_wanted_none_is_made(monkeypatch):
    def fail(*_):
        raise AssertionError("memory for a gradient")

    monkeypatch.setattr(torch, "empty_like", fail)
    monkeypatch.setattr(torch, "zeros_like", fail)
    assert divergence(logits(0), logits(0)) == 0
    assert next_token_loss(logits(0), torch.zeros(SHAPE[:2], dtype=torch.int64)) > 0
