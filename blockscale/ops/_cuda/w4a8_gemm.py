"""GEMMs of four-bit weights and many rows of E4M3 activations on SM90, dense and grouped, in CUDA C++.

    out[m, n] = sum_g a_scale[m, g] * w_scale[n, g] * (sum_{k in g} a[m, k] * w[n, k]) + bias[n]

Products accumulate in float32 within each 128 of K; then acc = fma(partial * w_scale, a_scale, acc). The
kernel is `w4a8_gemm.cu`, its tile shapes `w4a8_configs.py`; weights are prepared as in `reference/w4.py`.
`launch.py` tells how kernels are launched, and that nothing here waits. Arguments have been checked by
`w4a8_checks`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from blockscale.ops._cuda.compile import source_text
from blockscale.ops._cuda.configs import BLOCK_K, Kind
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
from blockscale.ops._cuda.w4a8_configs import WORD_BYTES, W4Tile, choose
from blockscale.reference.w4 import W4Weight

_HEADERS = (
    "common.cuh", "schedule.cuh",
    "w4a8_unpack.cuh", "w4a8_epilogue.cuh", "w4a8_multiply.cuh", "w4a8_units.cuh",
)  # fmt: skip


def w4a8_gemm_nt(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: W4Tile | None = None,
) -> torch.Tensor:
    """`ops.w4a8_gemm_nt`; `tile` instead of the one that is chosen."""
    _run("dense", (a, a_scale, b, out, bias, None), a.shape[0], tile)
    return out


def m_grouped_w4a8_gemm_nt_contiguous(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    m_indices: torch.Tensor,
    out: torch.Tensor,
    tile: W4Tile | None = None,
) -> torch.Tensor:
    """`ops.m_grouped_w4a8_gemm_nt_contiguous`; `tile` instead of the one that is chosen."""
    _run("contiguous", (a, a_scale, b, out, None, m_indices), a.shape[0], tile)
    return out


def m_grouped_w4a8_gemm_nt_masked(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: W4Weight,
    masked_m: torch.Tensor,
    expected_m: int,
    out: torch.Tensor,
    tile: W4Tile | None = None,
) -> torch.Tensor:
    """`ops.m_grouped_w4a8_gemm_nt_masked`; `tile` instead of the one that is chosen."""
    rows = max(1, min(expected_m, a.shape[1]))
    _run("masked", (a, a_scale, b, out, None, masked_m), rows, tile)
    return out


def _run(kind: Kind, operands: tuple[Any, ...], rows: int, tile: W4Tile | None) -> None:
    """Launch on (a, a_scale, b, out, bias or None, layout or None); rows chooses the tile."""
    a, a_scale, b, *others = operands
    if not all((*a.shape, *b.shape)):
        return
    plan = _PLANS[b.kind]
    if not launch(plan, kind, (a, a_scale, b.words, b.scale, *others), rows, tile):
        copies = aligned(a), column_major(a_scale), _packed(b.words), _packed(b.scale)
        launch(plan, kind, (*copies, *others), rows, tile)


def _packed(x: torch.Tensor) -> torch.Tensor:
    """Contiguous and at a multiple of 16 bytes, for the copy engine; copied only if needed."""
    if x.data_ptr() % 16 == 0 and x.is_contiguous():
        return x
    return x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=8192)
def _plan(
    mxfp4: bool,
    kind: Kind,
    tile: W4Tile | None,
    rows: int,
    place: tuple[int, int],
    starts: tuple[bool, ...],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    strides: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> Plan | None:
    """What a launch needs wherever the operands lie; starts: which of them are aligned to 16 bytes."""
    device, stream = place
    a_stride, a_scale_stride, words_stride, scale_stride, out_stride = strides
    (a_shape, words_shape), (out_dtype, bias_dtype) = shapes, dtypes
    m, k = a_shape[-2:]
    *lead, steps, n, _ = words_shape
    experts = math.prod(lead)
    a_fits = has_aligned_rows(a_stride) and is_column_major(m, a_scale_stride)
    w_fits = is_packed(words_shape, words_stride) and is_packed((experts, steps, n), scale_stride)
    if not (all(starts) and a_fits and w_fits):
        return None
    tile = tile or choose(kind, (rows, n, k), experts, processors(device))
    a_experts = experts if kind == "masked" else 1
    a_box, w_box = tile.boxes
    out_float32 = out_dtype == torch.float32
    size = 4 if out_float32 else 2
    groups = (*a_scale_stride[:-2], a_scale_stride[-1], 1)
    maps: list[tuple[int, MapShape]] = [
        (0, ((k, m, a_experts), a_stride, (BLOCK_K, a_box), 1, BLOCK_K)),
        (2, ((WORD_BYTES, n, experts * steps), (n * WORD_BYTES, WORD_BYTES, 1), (WORD_BYTES, w_box), 1, 64)),
        (1, ((m, steps, a_experts), groups, (tile.rows, 1), 4, 0)),
        (3, ((n, steps, experts), (steps * n, n, 1), (w_box, 1), 4, 0)),
        (4, ((n, m, a_experts), out_stride, (128 // size, tile.rows), size, 128)),
    ]
    super_m, super_n = tile.super_tile
    m_tiles, n_tiles = math.ceil(m / super_m), math.ceil(n / super_n)
    out_expert = out_stride[0] if kind == "masked" else 0
    numbers = out_stride[-2], out_expert, m, n, experts, steps, 0, m_tiles, n_tiles
    function, slots = _kernel(kind, tile, out_float32, BIAS_KINDS[bias_dtype], mxfp4, device)
    grid = grid_size(tile, None if kind == "masked" else m_tiles * n_tiles, slots)
    config = launch_config(grid, tile.threads, tile.shared_bytes(out_float32), stream)
    return Plan(function, config, tuple(maps), numbers)


_PLANS = {"int4": functools.partial(_plan, False), "mxfp4": functools.partial(_plan, True)}


@functools.cache
def _kernel(
    kind: Kind, tile: W4Tile, out_float32: bool, bias_kind: int, mxfp4: bool, device: int
) -> tuple[Any, int]:
    """The kernel on a device, which is current, and how many clusters run at once."""
    sources = kernel_sources(kind, tile, out_float32, bias_kind, mxfp4)
    return load(*sources, tile, tile.shared_bytes(out_float32))


def kernel_sources(
    kind: Kind, tile: W4Tile, out_float32: bool, bias_kind: int, mxfp4: bool
) -> tuple[str, dict[str, str]]:
    """Source file and all headers of a kernel."""
    main, headers = tile.sources(kind, out_float32=out_float32, bias=bias_kind, mxfp4=mxfp4)
    return main, {**headers, **{name: source_text(name) for name in _HEADERS}}
