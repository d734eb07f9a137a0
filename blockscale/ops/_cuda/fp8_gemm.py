"""FP8 GEMM with 1x128 activation and 128x128 weight scales on SM90, dense and grouped, in CUDA C++.

    out = (a * a_scale) @ (b * b_scale)^T + bias

Products accumulate in float32 within each 128 of K; then acc = fma(partial, a_scale * b_scale, acc).
The kernels are `fp8_gemm.cu` (many rows) and `fp8_gemm_few.cu` (few rows), the tile shapes `configs.py`.

What a launch needs depends on addresses, shapes, strides and the stream; it is made once and kept for the
next call with the same, as is what depends on some of them only: the plan (tile, sizes, grid), and the tensor
map of every operand. Launches go to PyTorch's current stream, never wait, and
can be captured in CUDA graphs. They allow programmatic overlap: blocks may be set up while the kernel before
still runs, and wait for its end before they touch memory.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings import driver

from blockscale.errors import BlockscaleError
from blockscale.ops._cuda.compile import check, load_kernel, machine_code, source_text
from blockscale.ops._cuda.configs import BLOCK_K, AnyTile, FewTile, Kind, Tile, choose, takes

_BIAS_KINDS = {None: 0, torch.bfloat16: 1, torch.float32: 2}


class _Problem(ctypes.Structure):
    """`Problem` of `common.cuh`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("b_scale", "out", "bias", "layout")),
        *((name, ctypes.c_longlong) for name in ("out_row", "out_expert")),
        *((name, ctypes.c_int) for name in ("m", "n", "experts", "steps", "scale_rows")),
        *((name, ctypes.c_int) for name in ("m_tiles", "n_tiles")),
    )


# Sizes, stride, box, bytes of an element and swizzle, as `tensor_map` takes them.
_MapShape = tuple[tuple[int, int, int], tuple[int, ...], tuple[int, int], int, int]


@dataclass(frozen=True)
class _Plan:
    """A kernel with what it is launched with, but for addresses."""

    function: Any
    config: Any
    maps: tuple[tuple[int, _MapShape], ...]  # operand, and its tensor map
    numbers: tuple[int, ...]  # fields of `_Problem` behind the addresses


@dataclass(frozen=True)
class _Launch:
    """A kernel with everything it is launched with."""

    function: Any
    config: Any
    arguments: int  # address of the array of pointers to the arguments
    keep: tuple[Any, ...]  # what these pointers point to


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
    a, a_scale, b, b_scale, out, bias, layout = tensors
    device = a.device.index
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            _run(kind, tensors, rows, tile)
        return
    # The stream as a number: an object for it takes as long to make as a launch.
    stream = torch._C._cuda_getCurrentRawStream(device)
    launch = _prepare(
        kind, tile, rows, (device, stream),
        tuple([0 if x is None else x.data_ptr() for x in tensors]),
        (a.shape, b.shape), (a.stride(), a_scale.stride(), b.stride(), b_scale.stride(), out.stride()),
        (out.dtype, None if bias is None else bias.dtype),
    )  # fmt: skip
    if launch is None:  # a layout that the copy engine does not take
        tensors = (aligned(a), column_major(a_scale), aligned(b), b_scale.contiguous(), out, bias, layout)
        _run(kind, tensors, rows, tile)
        return
    result = driver.cuLaunchKernelEx(launch.config, launch.function, launch.arguments, 0)
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        check(result)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """E4M3 x with contiguous rows at multiples of 16 bytes, for the copy engine; copied only if needed."""
    if x.data_ptr() % 16 == 0 and _has_aligned_rows(x.stride()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _has_aligned_rows(stride: tuple[int, ...]) -> bool:
    return stride[-1] == 1 and all(each % 16 == 0 for each in stride[:-1])


def column_major(scale: torch.Tensor) -> torch.Tensor:
    """The scales (..., M, G) with M fastest and G at multiples of 16 bytes, as the kernels read them."""
    m, groups = scale.shape[-2:]
    if scale.data_ptr() % 16 == 0 and _is_column_major(m, scale.stride()):
        return scale
    padded = scale.new_empty(*scale.shape[:-2], groups, math.ceil(m / 4) * 4)
    return padded[..., :m].mT.copy_(scale)


def _is_column_major(m: int, stride: tuple[int, ...]) -> bool:
    outer = (*stride[:-2], stride[-1])
    return stride[-2] == 1 and stride[-1] >= m and all(each % 4 == 0 for each in outer)


def _is_packed(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the trailing dimensions of `shape` with these strides are contiguous."""
    shape = shape[-len(stride) :]
    return all(shape[i] == 1 or stride[i] == math.prod(shape[i + 1 :]) for i in range(len(stride)))


@functools.lru_cache(maxsize=8192)
def _prepare(
    kind: Kind,
    tile: AnyTile | None,
    rows: int,
    place: tuple[int, int],
    addresses: tuple[int, ...],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    strides: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> _Launch | None:
    """The launch for operands at these addresses, or None if a layout does not fit.

    place: the device, which is current, and a stream of it.
    """
    a, a_scale, b, b_scale, out, bias, layout = addresses
    aligned_starts = not (a | a_scale | b) % 16
    plan = _plan(kind, tile, rows, place, aligned_starts, shapes, strides, dtypes)
    if plan is None:
        return None
    maps = [tensor_map(addresses[of], *shape) for of, shape in plan.maps]
    problem = _Problem(b_scale, out, bias, layout, *plan.numbers)
    arguments = (ctypes.c_void_p * (len(maps) + 1))(
        *(int(each.getPtr()) for each in maps), ctypes.addressof(problem)
    )
    return _Launch(plan.function, plan.config, ctypes.addressof(arguments), (*maps, problem, arguments))


@functools.lru_cache(maxsize=8192)
def _plan(
    kind: Kind,
    tile: AnyTile | None,
    rows: int,
    place: tuple[int, int],
    aligned_starts: bool,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    strides: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> _Plan | None:
    """What `_prepare` needs wherever the operands lie; aligned_starts: those that are copied, to 16 bytes."""
    device, stream = place
    a_stride, a_scale_stride, b_stride, b_scale_stride, out_stride = strides
    (a_shape, b_shape), (out_dtype, bias_dtype) = shapes, dtypes
    m, k = a_shape[-2:]
    n, experts = b_shape[-2], math.prod(b_shape[:-2])
    steps, scale_rows = math.ceil(k / BLOCK_K), math.ceil(n / 128)
    if n % 16 or k % 16:
        raise BlockscaleError("N and K must be multiples of 16", where="fp8_gemm", got=f"N = {n}, K = {k}")
    codes_fit = _has_aligned_rows(a_stride) and _has_aligned_rows(b_stride)
    scales_fit = _is_column_major(m, a_scale_stride) and _is_packed(
        (experts, scale_rows, steps), b_scale_stride
    )
    if not (aligned_starts and codes_fit and scales_fit):
        return None
    if tile is None or not takes(tile, kind, experts):
        tile = choose(kind, (rows, n, k), experts, _processors(device))
    a_experts = experts if kind == "masked" else 1
    a_box, b_box, scale_box = tile.boxes
    scale_stride = (*a_scale_stride[:-2], a_scale_stride[-1], 1)
    out_float32 = out_dtype == torch.float32
    maps: list[tuple[int, _MapShape]] = [
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
    function, slots = _kernel(kind, tile, out_float32, _BIAS_KINDS[bias_dtype], device)
    grid = grid_size(tile, None if kind == "masked" else m_tiles * n_tiles, slots)
    config = _launch_config(grid, tile.threads, tile.shared_bytes(out_float32), stream)
    return _Plan(function, config, tuple(maps), numbers)


def _launch_config(grid: int, threads: int, shared_bytes: int, stream: int) -> Any:
    """Sizes and stream of a launch, which may be set up while the kernel before it still runs."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    config.attrs, config.numAttrs = [attribute], 1
    return config


def grid_size(tile: AnyTile, tiles: int | None, slots: int) -> int:
    """Blocks to start for a number of tiles (of a cluster each); None if only the device knows it.

    No more clusters than can run at once (`slots`), and as few as finish in the same number of rounds: that
    saves power.
    """
    if tiles is None:
        return slots * tile.cluster
    if isinstance(tile, FewTile):
        return min(tiles, slots) * tile.cluster
    return math.ceil(tiles / math.ceil(tiles / slots)) * tile.cluster


@functools.lru_cache(maxsize=8192)
def tensor_map(
    address: int,
    sizes: tuple[int, int, int],
    stride: tuple[int, ...],
    box: tuple[int, int],
    element: int,
    swizzle: int,
) -> Any:
    """Tensor map of a 3-D array (column, row, expert) of elements of 1, 2 or 4 bytes, moved in boxes.

    stride: of (expert,) row and column, in elements. What lies outside the array is read as zeros and not
    written. swizzle: bytes of a row of a box within which it is swizzled, or 0.
    """
    # The stride of a dimension of one element may be anything to PyTorch, and is checked by the driver.
    row = (stride[-2] if sizes[1] > 1 else math.ceil(sizes[0] / 16) * 16) * element
    expert = stride[0] * element if sizes[2] > 1 else row * sizes[1]
    kinds = driver.CUtensorMapDataType
    swizzles = driver.CUtensorMapSwizzle
    return check(
        driver.cuTensorMapEncodeTiled(
            {
                1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
                2: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                4: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            }[element],
            3,
            address,
            [driver.cuuint64_t(each) for each in sizes],
            [driver.cuuint64_t(each) for each in (row, expert)],
            [driver.cuuint32_t(each) for each in (*box, 1)],
            [driver.cuuint32_t(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            {
                0: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
                32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
                64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
                128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
            }[swizzle],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


@functools.cache
def _kernel(kind: Kind, tile: AnyTile, out_float32: bool, bias_kind: int, device: int) -> tuple[Any, int]:
    """The loaded kernel, compiled if nobody did before, and how many clusters run at once."""
    main, headers = kernel_sources(kind, tile, out_float32, bias_kind)
    shared_bytes = tile.shared_bytes(out_float32)
    function = load_kernel(machine_code(main, headers), main.removesuffix(".cu"), shared_bytes)
    config = _launch_config(tile.cluster, tile.threads, shared_bytes, 0)
    return function, max(1, check(driver.cuOccupancyMaxActiveClusters(function, config)))


def kernel_sources(
    kind: Kind, tile: AnyTile, out_float32: bool, bias_kind: int
) -> tuple[str, dict[str, str]]:
    """Source file and all headers of a kernel."""
    main, headers = tile.sources(kind, out_float32=out_float32, bias=bias_kind)
    return main, {**headers, **{name: source_text(name) for name in ("common.cuh", "epilogue.cuh")}}


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
