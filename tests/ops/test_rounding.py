"""Every backend of the inner loops of calibrated rounding against the reference, bit for bit."""

import pytest
import torch

from blockscale import ops
from blockscale.reference import rounding as reference
from blockscale.reference.rounding import E2M1, E4M3, INT3, INT4
from blockscale.testing.asserts import assert_bitwise_equal

# NumPy's, in the interpreter, about Inf and NaN that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Rows, columns, candidates, columns of a group: more rows than a strip or a program has, ragged groups.
SHAPES = [(70, 20, 3, 20), (1, 1, 1, 1), (5, 130, 2, 32), (33, 9, 1, 4), (150, 128, 5, 128)]
GRIDS = {"e4m3": E4M3, "e2m1": E2M1, "int4": INT4, "int3": INT3}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


@pytest.fixture(
    params=[
        ("numba", "cpu"),
        pytest.param(("triton", "cpu"), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on GPU")),
        pytest.param(("auto", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def backend(request):
    if request.param[0] == "triton":
        pytest.importorskip("triton")
    return request.param


def problem(rows, width, candidates, group_size, spread=0.5, grid=E4M3):
    """Columns, the factor of an inverse norm, the norm, and scales."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(3 * width, width, generator=generator)
    x[:, 1:] += x[:, :1]
    norm = x.T @ x / len(x) + 0.1 * torch.eye(width)
    upper = torch.linalg.cholesky(torch.linalg.inv(norm.double())).T.float().contiguous()
    columns = torch.randn(rows, width, generator=generator) * 0.02
    scale = torch.rand(candidates, rows, -(-width // group_size), generator=generator) + spread
    return columns, upper, norm, scale * (0.09 / grid.largest)


def slopes(columns, norm, codes, scale, group_size):
    return (columns - codes * scale.repeat_interleave(group_size, 1)[:, : columns.shape[1]]) @ norm


def run(op, backend, *arguments):
    name, device = backend
    moved = [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]
    found = op(*moved, backend=name)
    return found.cpu() if isinstance(found, torch.Tensor) else tuple(each.cpu() for each in found)


def small(shape, backend):
    """The shape, or one like it for the interpreter, which takes its time."""
    rows, width, candidates, group_size = shape
    return (min(rows, 20), width, min(candidates, 2), group_size) if backend[0] == "triton" else shape


@grids
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns_are_those_of_the_reference(backend, shape, grid):
    shape = small(shape, backend)
    columns, upper, _, scale = problem(*shape, grid=grid)
    wanted = reference.round_columns(columns, upper, scale, shape[-1], grid)
    found = run(ops.round_columns, backend, columns, upper, scale, shape[-1], grid)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_bitwise_equal(ours, theirs)


@grids
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_descents_are_those_of_the_reference(backend, shape, grid):
    shape = small(shape, backend)
    columns, upper, norm, scale = problem(*shape, grid=grid)
    codes = reference.round_columns(columns, upper, scale, shape[-1], grid).codes[0]
    arguments = (slopes(columns, norm, codes, scale[0], shape[-1]), codes, norm, scale[0], shape[-1], grid)
    wanted = reference.descend_columns(*arguments)
    assert_bitwise_equal(run(ops.descend_columns, backend, *arguments), wanted)
    if codes.numel() > 100:
        assert not torch.equal(wanted, codes)


@grids
@pytest.mark.parametrize("spread", [1e-6, 1e4])
def test_saturated_and_subnormal_codes_are_those_of_the_reference(backend, spread, grid):
    columns, upper, norm, scale = problem(16, 40, 1, 8, spread)
    columns[0], columns[1, ::2], columns[1, 1::2] = 0.0, -0.0, -1e-9
    wanted = reference.round_columns(columns, upper, scale, 8, grid)
    found = run(ops.round_columns, backend, columns, upper, scale, 8, grid)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_bitwise_equal(ours, theirs)
    codes = wanted.codes[0]
    arguments = (slopes(columns, norm, codes, scale[0], 8), codes, norm, scale[0], 8, grid)
    assert_bitwise_equal(run(ops.descend_columns, backend, *arguments), reference.descend_columns(*arguments))


@grids
def test_grid_is_that_of_the_reference_everywhere(backend, grid):
    """Every column its own problem of one value: all ties, both signs, both ends of the range."""
    numbers = reference.to_grid(torch.cat([torch.zeros(1), torch.logspace(-10, 9, 4000, 2)]), grid).unique()
    ties = (numbers[1:] + numbers[:-1]) / 2
    beyond = grid.largest + numbers
    near = torch.cat([numbers, ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1), beyond])
    columns = torch.cat([near, -near])[:, None]
    scale = torch.ones(1, len(columns), 1)
    found = run(ops.round_columns, backend, columns, torch.eye(1), scale, 1, grid)
    assert_bitwise_equal(found[0][0], reference.to_grid(columns, grid))


def test_what_lies_below_the_diagonal_is_not_looked_at(backend):
    columns, upper, norm, scale = problem(6, 10, 1, 10)
    found = run(
        ops.round_columns, backend, columns, upper + torch.full((10, 10), torch.nan).tril(-1), scale, 10, E4M3
    )
    for ours, theirs in zip(found, reference.round_columns(columns, upper, scale, 10, E4M3), strict=True):
        assert_bitwise_equal(ours, theirs)
    codes = found[0][0]
    arguments = (slopes(columns, norm, codes, scale[0], 10), codes)
    wanted = reference.descend_columns(*arguments, norm, scale[0], 10, E4M3)
    lower = norm + torch.full((10, 10), torch.nan).tril(-1)
    assert_bitwise_equal(run(ops.descend_columns, backend, *arguments, lower, scale[0], 10, E4M3), wanted)


def test_threads_and_strides_do_not_change_a_bit():
    columns, upper, _, scale = problem(300, 64, 2, 64)
    wide = torch.cat([columns, columns], 1)[:, 64:]
    found = ops.round_columns(wide, upper.T.contiguous().T, scale, 64, E4M3, threads=3, backend="numba")
    for ours, theirs in zip(found, reference.round_columns(columns, upper, scale, 64, E4M3), strict=True):
        assert_bitwise_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 4, 2, 4), (3, 4, 0, 4)], ids=str)
def test_nothing_to_round_is_fine(backend, shape):
    rows, width, candidates, group_size = shape
    found = run(
        ops.round_columns, backend,
        torch.zeros(rows, width), torch.eye(width), torch.ones(candidates, rows, 1), group_size, E4M3,
    )  # fmt: skip
    assert [tuple(each.shape) for each in found] == [(candidates, rows, width)] * 2 + [(candidates, rows)]


def test_a_block_too_wide_for_registers_goes_to_the_reference(monkeypatch):
    kernels = pytest.importorskip("blockscale.ops._triton.rounding")
    monkeypatch.setattr(kernels, "LARGEST_WIDTH", 9)
    monkeypatch.setattr(kernels, "round_columns", None)
    columns, upper, _, scale = problem(6, 10, 1, 10)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = run(ops.round_columns, ("triton", device), columns, upper, scale, 10, E4M3)
    assert_bitwise_equal(found[0], reference.round_columns(columns, upper, scale, 10, E4M3).codes)
