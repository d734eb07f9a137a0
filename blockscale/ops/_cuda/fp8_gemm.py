"""FP8 GEMM with 1x128 activation and 128x128 weight scales on SM90, dense and grouped, in CUDA C++.

    out = (a * a_scale) @ (b * b_scale)^T + bias

Products accumulate in float32 within each 128 of K; then acc = fma(partial, a_scale * b_scale, acc).
The kernels are `fp8_gemm.cu` (many rows) and `fp8_gemm_few.cu` (few rows), the tile shapes `configs.py`;
`launch.py` tells how they are launched, and that nothing here waits.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from blockscale.errors import BlockscaleError
from blockscale.ops._cuda.compile import source_text
from blockscale.ops._cuda.configs import BLOCK_K, AnyTile, Kind, Tile, choose, takes
from blockscale.ops._cuda.launch import (
    BIAS_KINDS,
    MapShape,
    Plan,
    aligned,
    column_major,
    grid_size,
    has_aligned_rows,
    is_column_major,
    is_packed,
    launch,
    launch_config,
    load,
    processors,
)

_HEADERS = ("common.cuh", "schedule.cuh", "epilogue.cuh")


def fp8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    tile: AnyTile | None = None,
) -> torch.Tensor:
    """out (M, N) = (a * a_scale) @ (b * b_scale)^T + bias.

    Args:
        a, a_scale: (M, K) float8_e4m3fn and (M, ceil(K/128)) float32, fastest if column-major with columns
            padded to a multiple of 4 rows; K a multiple of 16.
        b, b_scale: (N, K) float8_e4m3fn and (ceil(N/128), ceil(K/128)) float32; N a multiple of 16.
        bias: (N,) bfloat16 or float32, added in float32.
        out_dtype, out: bfloat16 or float32; `out` needs rows that start at multiples of 16 bytes.
        tile: tile shape instead of the one the heuristic picks.
    """
    m, n = a.shape[0], b.shape[0]
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if m and n:
        _run("dense", (a, a_scale, b, b_scale, out, bias, None), m, tile)
    return out


def m_grouped_fp8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    m_indices: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    tile: AnyTile | None = None,
) -> torch.Tensor:
    """out (M, N): row i of a times expert m_indices[i] of b (E, N, K).

    m_indices is int32 (M,); every 128 rows belong to one expert, padding rows (-1) at their end.
    The output of padding rows is undefined.
    """
    m, n = a.shape[0], b.shape[1]
    if out is None:
        out = torch.empty(m, n, dtype=torch.bfloat16, device=a.device)
    if m and n:
        _run("contiguous", (a, a_scale, b, b_scale, out, None, m_indices), m, tile)
    return out


def m_grouped_fp8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    out: torch.Tensor | None = None,
    tile: AnyTile | None = None,
) -> torch.Tensor:
    """out (E, Mmax, N): the first masked_m[e] rows of a[e] (Mmax, K) times b[e] (N, K), others untouched.

    masked_m is int32 (E,) on the device; expected_m, a guess of its entries, only chooses the tile.
    """
    experts, rows, n = a.shape[0], a.shape[1], b.shape[1]
    if out is None:
        out = torch.empty(experts, rows, n, dtype=torch.bfloat16, device=a.device)
    if experts and rows and n:
        _run("masked", (a, a_scale, b, b_scale, out, None, masked_m), max(1, min(expected_m, rows)), tile)
    return out


def _run(kind: Kind, tensors: tuple[Any, ...], rows: int, tile: AnyTile | None) -> None:
    """Launch on (a, a_scale, b, b_scale, out, bias or None, layout or None); rows chooses the tile."""
    if not launch(_plan, kind, tensors, rows, tile):
        a, a_scale, b, b_scale, *others = tensors
        copies = aligned(a), column_major(a_scale), aligned(b), b_scale.contiguous()
        launch(_plan, kind, (*copies, *others), rows, tile)


@functools.lru_cache(maxsize=8192)
def _plan(
    kind: Kind,
    tile: AnyTile | None,
    rows: int,
    place: tuple[int, int],
    starts: tuple[bool, ...],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    strides: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> Plan | None:
    """What a launch needs wherever the operands lie; starts: which of them are aligned to 16 bytes."""
    device, stream = place
    a_stride, a_scale_stride, b_stride, b_scale_stride, out_stride = strides
    (a_shape, b_shape), (out_dtype, bias_dtype) = shapes, dtypes
    m, k = a_shape[-2:]
    n, experts = b_shape[-2], math.prod(b_shape[:-2])
    steps, scale_rows = math.ceil(k / BLOCK_K), math.ceil(n / 128)
    if n % 16 or k % 16:
        raise BlockscaleError("N and K must be multiples of 16", where="fp8_gemm", got=f"N = {n}, K = {k}")
    codes_fit = has_aligned_rows(a_stride) and has_aligned_rows(b_stride)
    scales_fit = is_column_major(m, a_scale_stride) and is_packed(
        (experts, scale_rows, steps), b_scale_stride
    )
    if not (all(starts[:3]) and codes_fit and scales_fit):
        return None
    if tile is None or not takes(tile, kind, experts):
        tile = choose(kind, (rows, n, k), experts, processors(device))
    a_experts = experts if kind == "masked" else 1
    a_box, b_box, scale_box = tile.boxes
    scale_stride = (*a_scale_stride[:-2], a_scale_stride[-1], 1)
    out_float32 = out_dtype == torch.float32
    maps: list[tuple[int, MapShape]] = [
        (0, ((k, m, a_experts), a_stride, (BLOCK_K, a_box), 1, BLOCK_K)),
        (2, ((k, n, experts), b_stride, (BLOCK_K, b_box), 1, BLOCK_K)),
        (1, ((m, steps, a_experts), scale_stride, (scale_box, 1), 4, 0)),
    ]
    if isinstance(tile, Tile):
        size, line = (4 if out_float32 else 2), tile.line_bytes(out_float32)
        maps.append((4, ((n, m, a_experts), out_stride, (line // size, 64), size, line)))
    super_m, super_n = tile.super_tile
    m_tiles, n_tiles = math.ceil(m / super_m), math.ceil(n / super_n)
    out_expert = out_stride[0] if kind == "masked" else 0
    numbers = out_stride[-2], out_expert, m, n, experts, steps, scale_rows, m_tiles, n_tiles
    function, slots = _kernel(kind, tile, out_float32, BIAS_KINDS[bias_dtype], device)
    grid = grid_size(tile, None if kind == "masked" else m_tiles * n_tiles, slots)
    config = launch_config(grid, tile.threads, tile.shared_bytes(out_float32), stream)
    return Plan(function, config, tuple(maps), numbers)


@functools.cache
def _kernel(kind: Kind, tile: AnyTile, out_float32: bool, bias_kind: int, device: int) -> tuple[Any, int]:
    """The kernel on a device, which is current, and how many clusters run at once."""
    sources = kernel_sources(kind, tile, out_float32, bias_kind)
    return load(*sources, tile, tile.shared_bytes(out_float32))


def kernel_sources(
    kind: Kind, tile: AnyTile, out_float32: bool, bias_kind: int
) -> tuple[str, dict[str, str]]:
    """Source file and all headers of a kernel."""
    main, headers = tile.sources(kind, out_float32=out_float32, bias=bias_kind)
    return main, {**headers, **{name: source_text(name) for name in _HEADERS}}
