"""The inner loops of calibrated rounding: `blockscale.reference.rounding`, fast and bit for bit."""

from __future__ import annotations

import torch

from blockscale.ops import dispatch
from blockscale.reference import rounding as reference
from blockscale.reference.rounding import Grid, RoundedColumns, check_columns

_ROUND, _DESCEND = "round_columns", "descend_columns"
# A strip of the CPU kernel does this many times the work of a cast of as many values.
_WORK = 64


def round_columns(
    columns: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    grid: Grid,
    *,
    threads: int | None = None,
    backend: dispatch.Backend = "auto",
) -> RoundedColumns:
    """Round a block of columns in order, with every candidate for its scales by itself.

    Args:
        columns: float32 (N, B), finite; need not be contiguous.
        factor: float32 (B, B), upper triangular; what is below the diagonal is not looked at.
        scale: float32 (F, N, G), F candidates, positive.
        group_size: columns of a row that share a scale; G = ceil(B / group_size).
        grid: of the codes.
        threads: CPU threads of the numba backend; default torch.get_num_threads().
        backend: "auto" takes the fastest that works for the tensors' device.

    Raises:
        BlockscaleError: wrong dtype or shape, unknown backend.
    """
    check_columns(_ROUND, columns, factor, scale, group_size, candidates=True)
    threads = dispatch.check_threads(_ROUND, threads)
    backend = backend if scale.numel() else "reference"
    triton_kernels = dispatch.triton_kernels(_ROUND, "rounding", columns.device, backend)
    kernels = dispatch.numba_kernels(_ROUND, columns.device, backend)
    if triton_kernels is not None and triton_kernels.fits(columns.shape[1]):
        return RoundedColumns(*triton_kernels.round_columns(columns, factor, scale, group_size, grid))
    if kernels is None:
        return reference.round_columns(columns, factor, scale, group_size, grid)
    from blockscale.ops import _numba_rounding

    grid_numbers = _numba_rounding.grid_numbers(grid)
    shape = (len(scale), *columns.shape)
    codes, errors, loss = torch.empty(shape), torch.empty(shape), torch.empty(shape[:2])
    arrays = [each.contiguous().numpy() for each in (columns, factor.T, scale)]
    outputs = (codes.numpy(), errors.numpy(), loss.numpy())

    def work(strips: tuple[int, int]) -> None:
        _numba_rounding.round_columns(*arrays, group_size, grid_numbers, outputs, strips)

    strips = len(scale) * -(-len(columns) // _numba_rounding.LANES)
    dispatch.run_strips(work, strips, codes.numel() * _WORK, threads)
    return RoundedColumns(codes, errors, loss)


def descend_columns(
    slope: torch.Tensor,
    codes: torch.Tensor,
    norm: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    grid: Grid,
    *,
    threads: int | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Codes of a block of columns, float32 (N, B), each the best one given all others and the scales.

    Args:
        slope: float32 (N, B), finite; need not be contiguous.
        codes: float32 (N, B), as they are.
        norm: float32 (B, B) of these columns; what is below the diagonal is not looked at.
        scale: float32 (N, G), positive.
        group_size, grid, threads, backend: as for `round_columns`.

    Raises:
        BlockscaleError: wrong dtype or shape, unknown backend.
    """
    check_columns(_DESCEND, slope, norm, scale, group_size, candidates=False)
    threads = dispatch.check_threads(_DESCEND, threads)
    backend = backend if scale.numel() else "reference"
    triton_kernels = dispatch.triton_kernels(_DESCEND, "rounding", slope.device, backend)
    kernels = dispatch.numba_kernels(_DESCEND, slope.device, backend)
    if triton_kernels is not None and triton_kernels.fits(slope.shape[1]):
        return triton_kernels.descend_columns(slope, codes, norm, scale, group_size, grid)
    if kernels is None:
        return reference.descend_columns(slope, codes, norm, scale, group_size, grid)
    from blockscale.ops import _numba_rounding

    grid_numbers = _numba_rounding.grid_numbers(grid)
    result = torch.empty(slope.shape)
    arrays = [each.contiguous().numpy() for each in (slope, codes, norm.T, scale)]

    def work(strips: tuple[int, int]) -> None:
        _numba_rounding.descend_columns(*arrays, group_size, grid_numbers, result.numpy(), strips)

    strips = -(-len(slope) // _numba_rounding.LANES)
    dispatch.run_strips(work, strips, result.numel() * _WORK, threads)
    return result
