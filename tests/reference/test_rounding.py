import pytest
import torch

from blockscale import reference
from blockscale.errors import BlockscaleError
from blockscale.reference.fp4 import e2m1_value, to_e2m1
from blockscale.reference.rounding import (
    E2M1,
    E4M3,
    INT3,
    INT4,
    Grid,
    descend_columns,
    round_columns,
    to_grid,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread_norm(width: int) -> torch.Tensor:
    x = gaussian(3 * width, width, seed=1)
    x[:, 1:] += x[:, :1]
    return x.T @ x / len(x)


def test_the_grid_is_that_of_the_quantizer():
    x = torch.cat([gaussian(2000) * 2.0**power for power in range(-14, 12, 3)])
    codes, scale = reference.quantize_weight(x[None], (1, len(x)))
    assert torch.equal(to_grid(x / scale[0], E4M3), codes[0].float())
    assert to_grid(torch.tensor([1e9, -1e9, 464.0]), E4M3).tolist() == [448, -448, 448]


def test_the_grids_of_fewer_bits_are_those_of_their_quantizers():
    x = torch.cat([torch.arange(-40, 41) / 4, gaussian(2000) * 4, torch.tensor([-0.0, 1e-30, 1e30])])
    assert torch.equal(to_grid(x, INT4), x.round().clamp(-7, 7))
    assert torch.equal(to_grid(x, INT3), x.round().clamp(-3, 3))
    assert torch.equal(to_grid(x, E2M1), e2m1_value(to_e2m1(x)))
    for grid in (E4M3, E2M1, INT4, INT3):
        assert to_grid(torch.tensor([0.0, -0.0, -1e-30]), grid).signbit().tolist() == [False, True, True]


def test_errors_are_carried_to_later_columns_as_the_equations_say():
    w, upper = gaussian(3, 4), torch.linalg.cholesky(torch.linalg.inv(spread_norm(4))).T
    scale = torch.tensor([0.01, 0.02]).view(2, 1, 1).expand(2, 3, 1)
    found = round_columns(w, upper.contiguous(), scale, 4, E4M3)
    for candidate, s in enumerate((0.01, 0.02)):
        for row in range(3):
            left, loss = w[row].clone(), 0.0
            for j in range(4):
                q = float(to_grid(left[j] / s, E4M3))
                e = (left[j] - q * s) / upper[j, j]
                left[j + 1 :] -= e * upper[j, j + 1 :]
                loss += float(e) ** 2
                assert found.codes[candidate, row, j] == q
                torch.testing.assert_close(found.errors[candidate, row, j], e, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(float(found.loss[candidate, row]), loss, rtol=1e-3, atol=0)


def test_squares_of_errors_add_up_to_the_error_in_the_norm():
    norm, w = spread_norm(24), gaussian(10, 24)
    upper = torch.linalg.cholesky(torch.linalg.inv(norm)).T.contiguous()
    found = round_columns(w, upper, torch.full((1, 10, 1), 0.05), 24, E4M3)
    lost = w - found.codes[0] * 0.05
    torch.testing.assert_close(found.loss[0], ((lost @ norm) * lost).sum(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("grid", "s"), [(E4M3, 0.3), (E2M1, 0.4), (INT4, 0.4), (INT3, 0.8)], ids=str)
def test_every_step_of_a_descent_is_the_best_one(grid: Grid, s: float):
    norm, target = spread_norm(12), gaussian(1, 12)
    codes = to_grid(0.7 * target / s, grid)
    slope = (target - codes * s) @ norm
    found = descend_columns(slope, codes, norm, torch.full((1, 1), s), 12, grid)

    def error(q: torch.Tensor) -> float:
        lost = target - q * s
        return float(((lost @ norm) * lost).sum())

    numbers = to_grid(torch.linspace(-500, 500, 20000).div(448 / grid.largest), grid).unique()
    now = codes.clone()
    for j in range(12):
        tried = {}
        for number in numbers.tolist():
            now[0, j] = number
            tried[number] = error(now)
        now[0, j] = found[0, j]
        assert tried[float(found[0, j])] <= min(tried.values()) * (1 + 1e-4)
    assert error(found) < error(codes)


def test_a_group_of_columns_has_a_scale_of_its_own():
    w, ones = gaussian(2, 5), torch.eye(5)
    scale = torch.tensor([[0.01, 0.5, 0.02], [0.1, 0.2, 0.3]])
    wide = scale.repeat_interleave(2, 1)[:, :5]
    assert torch.equal(round_columns(w, ones, scale[None], 2, INT4).codes[0], to_grid(w / wide, INT4))


@pytest.mark.parametrize(
    ("scale", "square", "group_size", "match"),
    [
        (torch.ones(1, 3, 2), torch.eye(4), 4, "scale"),
        (torch.ones(3, 1), torch.eye(4), 4, r"scale.*\(F, N, G\)"),
        (torch.ones(1, 3, 1), torch.eye(5), 4, "matrix"),
        (torch.ones(1, 3, 1), torch.eye(4).double(), 4, "dtype"),
        (torch.ones(1, 3, 1), torch.eye(4), 0, "group size"),
    ],
)
def test_what_does_not_fit_is_refused(scale, square, group_size, match):
    with pytest.raises(BlockscaleError, match=match):
        round_columns(gaussian(3, 4), square, scale, group_size, E4M3)
