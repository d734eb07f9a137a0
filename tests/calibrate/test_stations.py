import pytest
import torch
from torch import nn

from blockscale.calibrate.stations import finished_modules, given, inputs_of, run


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.calls += 1
        return self.second(self.first(x).relu()), None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.mlp = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)[0].mul_(2)  # writes into what it is given
        return x + self.mlp(x)[0]


STATIONS = [("attention.first",), ("attention.second",), ("mlp.first",), ("mlp.second",)]


def finished(done: int) -> tuple[str, ...]:
    return finished_modules(Layer(), STATIONS[:done], STATIONS[done:])


def test_a_module_is_finished_when_all_of_its_stations_are():
    assert [finished(done) for done in range(5)] == [
        (),
        (),
        ("attention",),
        ("attention",),
        ("attention", "mlp"),
    ]


@torch.no_grad()
def test_outputs_that_are_known_are_given_and_not_computed():
    layer, x, outputs = Layer(), torch.randn(2, 3, 8), {}
    expected = run(layer, x, {})
    for calls in (2, 2, 2):
        with given(layer, ("attention",), outputs):
            assert torch.equal(run(layer, x, {}), expected)
        assert layer.attention.calls == calls
    assert not layer.attention._forward_hooks
    assert "forward" not in vars(layer.attention)


@torch.no_grad()
def test_a_module_that_is_outside_takes_the_place_of_those_in_it():
    layer, x, outputs = Layer(), torch.randn(2, 3, 8), {}
    with given(layer, ("attention.second",), outputs):
        run(layer, x, {})
    with given(layer, ("attention",), outputs):
        run(layer, x, {})
    assert outputs.keys() == {"attention"}


@torch.no_grad()
def test_inputs_are_those_of_the_module_however_far_the_layer_runs():
    layer, x = Layer(), torch.randn(2, 3, 8)
    (near,) = inputs_of(layer, "attention.second", x, {})
    (far,) = inputs_of(layer, "attention.second", x, {}, until="attention")
    assert torch.equal(near, layer.attention.first(x).relu())
    assert torch.equal(near, far)
    assert layer.mlp.calls == 0


@pytest.mark.parametrize("mask", [False, True])
def test_attention_with_narrow_values_is_what_it_was(mask):
    query, key = torch.randn(2, 4, 9, 24), torch.randn(2, 4, 9, 24)
    value = torch.randn(2, 4, 9, 16)
    attend = nn.functional.scaled_dot_product_attention
    options = {"attn_mask": torch.randn(9, 9)} if mask else {"is_causal": True}

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attend(query, key, x, scale=0.3, **options)

    expected = attend(query, key, value, scale=0.3, **options)
    found = run(Attention(), value, {})
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
