"""One step of autograd for a linear layer: values and gradients are those of its parts."""

import pytest
import torch
from torch.nn.functional import linear

from blockscale.formats import BlockFP8
from blockscale.group_formats import GroupInt
from blockscale.qat.fake_quant import fake_quantize, fake_quantize_input, fake_quantize_scaled
from blockscale.qat.products import Rule, fake_quant_linear

INPUTS = BlockFP8((1, 128))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(device, given, fmt, dtype=torch.float32):
    weight = random(72, 200, seed=1) / 14
    scale = None
    if given:
        size = (72, 2) if isinstance(fmt, GroupInt) else (1, 2)
        scale = torch.full(size, 0.2 / (7 if isinstance(fmt, GroupInt) else 448))
    made = random(2, 9, 200, dtype=dtype), weight, scale, random(72, seed=2)
    return [each if each is None else each.to(device).requires_grad_() for each in made]


def by_parts(x, weight, scale, bias, rule):
    rounded = x.to(rule.compute) if rule.inputs is None else fake_quantize_input(x, rule.inputs, rule.compute)
    if scale is None:
        value = fake_quantize(weight, rule.fmt, rule.compute)
    else:
        value = fake_quantize_scaled(weight, scale, rule.fmt, rule.compute)
    return linear(rounded, value, bias.to(rule.compute)).to(x.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", [False, True], ids=["dynamic", "given"])
@pytest.mark.parametrize("fmt", [BlockFP8(), GroupInt()], ids=["fp8", "int4"])
@pytest.mark.parametrize("inputs", [INPUTS, None], ids=["fp8-inputs", "plain"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_values_and_gradients_are_those_of_its_parts(device, given, fmt, inputs, compute):
    found, wanted = leaves(device, given, fmt), leaves(device, given, fmt)
    rule = Rule(fmt, inputs, compute)
    upstream = random(2, 9, 72, seed=3).to(device)
    results = fake_quant_linear(*found, rule), by_parts(*wanted, rule)
    assert torch.equal(*results)
    for each in results:
        each.backward(upstream)
    # Sums in float32 here, rounded to BF16 there: half an ulp of 8 bits. Of scales it is values that cancel.
    bound = 1e-6 if compute == torch.float32 else 2.0**-8
    for mine, theirs in zip(found, wanted, strict=True):
        if mine is not None:
            size = theirs.grad.norm()
            assert mine.grad.dtype == theirs.grad.dtype
            assert float((mine.grad - theirs.grad).norm() / size) < bound
    if given:
        assert 0 < int((found[1].grad == 0).sum()) < 72 * 100


def test_only_what_trains_gets_a_gradient():
    x, weight, scale, bias = leaves("cpu", True, GroupInt())
    for each in (x, scale, bias):
        each.requires_grad_(False)
    fake_quant_linear(x, weight, scale, bias, Rule(GroupInt(), INPUTS, torch.float32)).sum().backward()
    assert weight.grad is not None
    assert x.grad is scale.grad is bias.grad is None
    fixed = weight.detach()
    x.requires_grad_()
    fake_quant_linear(x, fixed, scale, None, Rule(GroupInt(), INPUTS, torch.float32)).sum().backward()
    assert x.grad is not None


def test_under_autocast_bfloat16_products_stay_in_bfloat16_and_float32_ones_exact():
    tensors = leaves("cpu", False, BlockFP8())
    rules = [Rule(BlockFP8(), INPUTS, compute) for compute in (torch.bfloat16, torch.float32)]
    plain = [fake_quant_linear(*tensors, rule) for rule in rules]
    with torch.autocast("cpu", torch.bfloat16):
        narrow, exact = (fake_quant_linear(*tensors, rule) for rule in rules)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, plain[0].bfloat16())
    assert torch.equal(exact, plain[1])
    narrow.sum().backward()
    assert tensors[1].grad.dtype == torch.float32


def test_no_row_is_a_product_too():
    x, weight, _, bias = leaves("cpu", False, BlockFP8())
    empty = x.detach()[:, :0].requires_grad_()
    y = fake_quant_linear(empty, weight, None, bias, Rule(BlockFP8(), INPUTS, torch.float32))
    y.sum().backward()
    assert y.shape == (2, 0, 72)
    assert int(weight.grad.count_nonzero()) == 0


def test_second_derivatives_are_refused():
    x, weight, _, bias = leaves("cpu", False, BlockFP8())
    y = fake_quant_linear(x, weight, None, bias, Rule(BlockFP8(), INPUTS, torch.float32))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
