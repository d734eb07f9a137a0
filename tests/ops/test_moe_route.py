"""The choice of experts on Triton against the reference: compiled on a GPU, interpreted without."""

import pytest
import torch

from blockscale.ops import moe_choose, moe_route
from blockscale.reference import routing
from blockscale.reference.routing import Routing
from blockscale.testing.asserts import assert_bitwise_equal
from tests.devices import DEVICES, on

pytest.importorskip("triton")
# NumPy's, in the interpreter, about tokens past the last.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

RULES = {
    "softmax": (8, Routing(2, "softmax")),
    "shared": (66, Routing(6, "softmax", scale=16.0, shared=2)),
    "groups by their best": (16, Routing(4, "softmax", groups=4, topk_group=2)),
    "DeepSeek-V3": (256, Routing(8, "sigmoid", 8, 4, 2, normalize=True, scale=2.5, shared=1)),
    "one group": (20, Routing(3, "sigmoid", normalize=True)),
    "groups that do not cut registers": (12, Routing(2, "sigmoid", groups=3, topk_group=2)),
}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [1, 37])
def test_choice_and_weights(device, rule, tokens):
    experts, how = RULES[rule]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=generator)
    bias = torch.randn(experts, generator=generator) if how.scoring == "sigmoid" else None
    expected = routing.moe_route(logits, bias, how)
    got = moe_route(logits.to(device), None if bias is None else bias.to(device), how, backend="triton")
    assert_bitwise_equal(got[0].cpu(), expected[0], "experts")
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-6, atol=0)


def test_the_correction_bias_counts_in_the_choice_alone(device):
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 1.0])
    experts, weights = moe_route(*on(device, logits, bias), Routing(1, "sigmoid"), backend="triton")
    assert experts.tolist() == [[2]]
    assert weights.tolist() == [[0.5]]


def test_equal_scores_go_to_the_first(device):
    experts, _ = moe_route(torch.zeros(1, 8, device=device), None, Routing(3, "softmax"), backend="triton")
    assert experts.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "width"), [(1, 64, 2048), (20, 20, 200), (150, 16, 384)])
def test_logits_are_exact_products_in_float32(device, tokens, experts, width, wide):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).bfloat16()
    weight = (torch.randn(experts, width, generator=generator) / width**0.5).bfloat16()
    rule = Routing(3, "softmax", shared=1)
    exact = torch.nn.functional.linear(x.double(), weight.double()).float()
    expected = routing.moe_route(exact, None, rule)
    given = weight.float() if wide else weight
    got = moe_choose(*on(device, x, given), None, rule, backend="triton")
    assert_bitwise_equal(got[0].cpu(), expected[0], "experts")
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-5, atol=0)
