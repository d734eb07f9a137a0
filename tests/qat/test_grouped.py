"""Experts by grouped products give what experts one after the other give, gradients too."""

import copy

import pytest
import torch

from blockscale.huggingface.modules import is_experts
from blockscale.qat import grouped
from blockscale.qat.arithmetic import narrow_experts
from blockscale.qat.modules import FakeQuantExperts, fake_quant_layers
from tests.qat.models import checkpoints, prepared, train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
device_of = pytest.mark.parametrize("device", DEVICES)


def layer_of(folder, name="deepseek_v3", recipe="w4a8", scales="dynamic", **options):
    model = prepared(checkpoints.make(folder / name, name), recipe, scales, **options)
    return next(layer for _, layer in fake_quant_layers(model) if isinstance(layer, FakeQuantExperts))


def chosen(layer, tokens=37, choices=3, seed=0, dtype=torch.float32):
    """Hidden states, experts and their weights; the last two experts get no token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, layer.gate_up_proj.shape[-1], generator=generator).to(dtype)
    index = torch.rand(tokens, layer.num_experts - 2, generator=generator).argsort(1)[:, :choices]
    weights = torch.rand(tokens, choices, generator=generator)
    return hidden, index, weights


def gradients(layer, compute, device, dtype):
    """Result and gradients of hidden states, weights of choices, and all parameters."""
    layer.to(device).zero_grad()
    hidden, index, weights = (each.to(device) for each in chosen(layer, dtype=dtype))
    hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
    result = compute(hidden, index, weights)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    result.backward(upstream)
    own = {name: each.grad.clone() for name, each in layer.named_parameters()}
    return {"result": result.detach(), "hidden": hidden.grad, "choices": weights.grad, **own}


@pytest.mark.parametrize("scales", ["dynamic", "learned"])
@pytest.mark.parametrize(
    ("name", "recipe"), [("deepseek_v3", "w4a8"), ("qwen3_moe", "fp8"), ("deepseek_v3", "mxfp4")]
)
def test_grouped_products_are_those_of_the_loop_but_for_the_order_of_sums(tmp_path, name, recipe, scales):
    layer = layer_of(tmp_path, name, recipe, scales)
    wanted = gradients(layer, layer, "cpu", torch.float32)
    found = gradients(layer, layer.all_at_once, "cpu", torch.float32)
    for key, each in wanted.items():
        assert found[key].dtype == each.dtype
        assert float((found[key] - each).norm() / each.norm()) < 2e-6, key
    for key in ("gate_up_proj", "down_proj"):
        assert int(found[key][-2:].count_nonzero()) == 0  # of experts without tokens


@device_of
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_in_bfloat16_both_ways_are_as_near_to_float32(tmp_path, device, dtype):
    wide, layer = layer_of(tmp_path), layer_of(tmp_path, compute=torch.bfloat16)
    exact = gradients(wide, wide, device, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "is_fast", lambda device: False)
        loop = gradients(layer, layer, device, dtype)
    found = gradients(layer, layer.all_at_once, device, dtype)
    for key, each in exact.items():
        theirs, mine = (float((made[key] - each).norm() / each.norm()) for made in (loop, found))
        assert mine < 1.5 * theirs + 1e-4, key
        assert found[key].dtype == loop[key].dtype
    for key in ("gate_up_proj", "down_proj"):
        assert int(found[key][-2:].count_nonzero()) == 0


def test_a_model_takes_the_grouped_way_where_it_is_fast(tmp_path, monkeypatch):
    model = prepared(checkpoints.make(tmp_path / "bf16", "qwen3_moe"), "w4a8", compute=torch.bfloat16)
    plain = copy.deepcopy(model)
    losses = train(plain, steps=2)
    calls = []
    monkeypatch.setattr(grouped, "is_fast", lambda device: True)
    real = grouped.grouped_linear
    monkeypatch.setattr(grouped, "grouped_linear", lambda *each: calls.append(each[1].dtype) or real(*each))
    assert train(model, steps=2) == pytest.approx(losses, rel=0.01)
    assert calls == [torch.bfloat16] * 4


def test_what_grouped_products_do_not_take_is_left_to_the_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(grouped, "is_fast", lambda device: True)
    monkeypatch.setattr(grouped, "grouped_linear", None)
    hidden, index, weights = chosen(layer := layer_of(tmp_path / "f32"))
    layer(hidden, index, weights)  # products in float32
    layer = layer_of(tmp_path / "bf16", compute=torch.bfloat16)
    assert layer(hidden[:0], index[:0], weights[:0]).shape == (0, 160)
    assert not grouped.is_aligned(torch.empty(2, 16, 12))
    assert not grouped.is_aligned(torch.empty(2, 12, 16))


@device_of
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_experts_that_are_not_rounded_multiply_in_bfloat16(tmp_path, monkeypatch, name, device):
    model = checkpoints.plain(checkpoints.make(tmp_path / name, name))
    layer = next(module for module in model.modules() if is_experts(module))
    layer.num_experts = len(layer.gate_up_proj)
    exact = gradients(layer, layer, "cpu", torch.float32)
    monkeypatch.setattr(grouped, "is_fast", lambda device: False)
    narrow_experts(model, torch.device(device))
    assert "forward" not in vars(layer)
    monkeypatch.setattr(grouped, "is_fast", lambda device: True)
    narrow_experts(model, torch.device(device))
    found = gradients(layer, layer, device, torch.float32)
    for key, each in exact.items():
        assert found[key].dtype == each.dtype
        assert 1e-4 < float((found[key].cpu() - each).norm() / each.norm()) < 2**-7, key


@pytest.mark.gpu
def test_the_host_waits_for_nothing(tmp_path):
    layer = layer_of(tmp_path, compute=torch.bfloat16).cuda()
    tensors = [each.cuda() for each in chosen(layer)]
    layer(*tensors).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*tensors).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
