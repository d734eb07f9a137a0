import pytest
import torch

from blockscale import reference
from blockscale.calibrate.hessian import add_tokens, damped, no_moments, output_error, target_weight
from blockscale.errors import BlockscaleError


def inputs(tokens: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the original model, and other ones that stand for those of the quantized model."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    return x, 0.9 * x + 0.1 * torch.randn(tokens, width, generator=generator)


def test_moments_are_sums_over_all_leading_dimensions_and_calls():
    x, xq = inputs(60, 24)
    moments = add_tokens(no_moments(24), x[:20].view(4, 5, 24), xq[:20].view(4, 5, 24))
    moments = add_tokens(moments, x[20:], xq[20:])
    assert moments.tokens == 60
    size = xq.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(moments.second, (xq / size).T @ (xq / size))
    torch.testing.assert_close(moments.cross, (x / size).T @ (xq / size))


def test_every_token_counts_alike():
    x, xq = inputs(60, 24)
    huge = torch.logspace(-3, 6, 60)[:, None]
    ours, theirs = add_tokens(no_moments(24), x * huge, xq * huge), add_tokens(no_moments(24), x, xq)
    torch.testing.assert_close(ours.second, theirs.second)
    torch.testing.assert_close(ours.cross, theirs.cross)


def test_a_token_of_zeros_adds_nothing():
    x, xq = inputs(60, 24)
    before = add_tokens(no_moments(24), x, xq)
    after = add_tokens(add_tokens(no_moments(24), x, xq), x[:2], xq[:2] * 0)
    assert torch.equal(after.second, before.second)
    assert torch.equal(after.cross, before.cross)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_target_minimizes_the_damped_output_error(share: float):
    x, xq = inputs(200, 16)
    size = xq.square().mean(1, keepdim=True).sqrt()
    x, xq = x / size, xq / size
    moments = add_tokens(no_moments(16), x, xq)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    target, norm = target_weight(weight, moments, 0.05, share), damped(moments, 0.05)
    diagonal = moments.second.diagonal()
    penalty = 0.05 * (diagonal + diagonal.mean() / 10)

    def objective(other: torch.Tensor) -> torch.Tensor:
        outputs = ((xq + share * (x - xq)) @ weight.T - xq @ other.T).square().sum()
        return outputs + (penalty * (weight - other).square()).sum()

    other = target + 0.01 * torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    least, excess = objective(target), output_error(target - other, norm).sum()
    assert least <= objective(weight)
    assert (least < objective(weight)) == (share > 0)
    torch.testing.assert_close(objective(other) - least, excess, rtol=1e-2, atol=0)


def test_equal_inputs_and_dead_inputs_leave_the_weight_as_it_is():
    x, xq = inputs(100, 16)
    weight = torch.randn(4, 16)
    assert torch.equal(target_weight(weight, add_tokens(no_moments(16), x, x)), weight)
    x[:, 3] = xq[:, 3] = 0
    target = target_weight(weight, add_tokens(no_moments(16), x, xq))
    assert torch.equal(target[:, 3], weight[:, 3])
    assert not torch.equal(target[:, 4], weight[:, 4])
    assert torch.equal(target_weight(weight, add_tokens(no_moments(16), x * 0, x * 0)), weight)


def test_bfloat16_inputs_are_summed_in_float32():
    x, xq = (each.bfloat16() for each in inputs(3000, 8))
    moments = add_tokens(no_moments(8), x, xq)
    assert moments.second.dtype == moments.cross.dtype == torch.float32
    size = xq.float().square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(moments.second, (xq / size).T @ (xq / size))


@pytest.mark.parametrize("shape", [(10, 7), (9, 8)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, int]):
    with pytest.raises(BlockscaleError, match="shapes differ"):
        add_tokens(no_moments(8), torch.zeros(10, 8), torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_inputs_are_refused(value: float):
    x, xq = inputs(10, 8)
    xq[3, 5] = value
    with pytest.raises(BlockscaleError, match="NaN or Inf"):
        add_tokens(no_moments(8), x, xq)


def test_damping_has_to_be_positive():
    with pytest.raises(BlockscaleError, match="damping"):
        damped(no_moments(8), 0.0)


def test_target_makes_up_for_activation_quantization():
    x, _ = inputs(2000, 256)
    x[:, 1:] += 3 * x[:, :1]  # correlated inputs: a neighbour can make up for an error
    xq = reference.dequantize_activation(*reference.quantize_activation(x), dtype=torch.float32)
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    target = target_weight(weight, add_tokens(no_moments(256), x, xq))
    before, after = ((x @ weight.T - xq @ each.T).square().sum() for each in (weight, target))
    assert after < before


def test_columns_of_inputs_that_carry_next_to_nothing_stay_where_they_are():
    x, xq = inputs(400, 16)
    x[:, 5] = 1e-4 * x[:, 4]  # of no account here, so that regression could make it anything
    xq[:, 5] = 1e-4 * torch.randn(400, generator=torch.Generator().manual_seed(4))
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    target = target_weight(weight, add_tokens(no_moments(16), x, xq))
    assert float((target - weight)[:, 5].abs().max()) < 0.01
