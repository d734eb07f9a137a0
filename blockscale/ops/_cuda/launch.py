"""How the CUDA kernels are launched: what is prepared once, tensor maps, and the layouts they ask for.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings import driver

from blockscale.ops._cuda.compile import check, load_kernel, machine_code
from blockscale.ops._cuda.configs import AnyTile, FewTile, Kind
from blockscale.ops._cuda.w4a8_configs import W4Tile

BIAS_KINDS = {None: 0, torch.bfloat16: 1, torch.float32: 2}


class Problem(ctypes.Structure):
    """`Problem` of `common.cuh`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("b_scale", "out", "bias", "layout")),
        *((name, ctypes.c_longlong) for name in ("out_row", "out_expert")),
        *((name, ctypes.c_int) for name in ("m", "n", "experts", "steps", "scale_rows")),
        *((name, ctypes.c_int) for name in ("m_tiles", "n_tiles")),
    )


# Sizes, stride, box, bytes of an element and swizzle, as `tensor_map` takes them.
MapShape = tuple[tuple[int, int, int], tuple[int, ...], tuple[int, int], int, int]


@dataclass(frozen=True)
class Plan:
    """A kernel with what it is launched with, but for addresses."""

    function: Any
    config: Any
    maps: tuple[tuple[int, MapShape], ...]  # operand, and its tensor map
    numbers: tuple[int, ...]  # fields of `Problem` behind the addresses


@dataclass(frozen=True)
class _Launch:
    """A kernel with everything it is launched with."""

    function: Any
    config: Any
    arguments: int  # address of the array of pointers to the arguments
    keep: tuple[Any, ...]  # what these pointers point to


# Makes the plan of (kind, tile, rows, (device, stream), starts, shapes, strides, dtypes), or None if a layout
# does not fit; starts: whether a, a_scale, b and b_scale start at multiples of 16 bytes, the others as in
# `_prepare`.
PlanOf = Callable[..., Plan | None]


def launch(
    plan: PlanOf, kind: Kind, tensors: tuple[Any, ...], rows: int, tile: AnyTile | W4Tile | None
) -> bool:
    """Launch on (a, a_scale, b, b_scale, out, bias or None, layout or None); rows chooses the tile.

    Returns:
        Whether it was launched: False if the copy engine does not take a layout.
    """
    a, a_scale, b, b_scale, out, bias, _ = tensors
    device = a.device.index
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return launch(plan, kind, tensors, rows, tile)
    # The stream as a number: an object for it takes as long to make as a launch.
    stream = torch._C._cuda_getCurrentRawStream(device)
    prepared = _prepare(
        plan, kind, tile, rows, (device, stream),
        tuple([0 if x is None else x.data_ptr() for x in tensors]),
        (a.shape, b.shape), (a.stride(), a_scale.stride(), b.stride(), b_scale.stride(), out.stride()),
        (out.dtype, None if bias is None else bias.dtype),
    )  # fmt: skip
    if prepared is None:
        return False
    result = driver.cuLaunchKernelEx(prepared.config, prepared.function, prepared.arguments, 0)
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        check(result)
    return True


@functools.lru_cache(maxsize=8192)
def _prepare(
    plan_of: PlanOf,
    kind: Kind,
    tile: AnyTile | W4Tile | None,
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
    starts = tuple(address % 16 == 0 for address in (a, a_scale, b, b_scale))
    plan = plan_of(kind, tile, rows, place, starts, shapes, strides, dtypes)
    if plan is None:
        return None
    maps = [tensor_map(addresses[of], *shape) for of, shape in plan.maps]
    problem = Problem(b_scale, out, bias, layout, *plan.numbers)
    arguments = (ctypes.c_void_p * (len(maps) + 1))(
        *(int(each.getPtr()) for each in maps), ctypes.addressof(problem)
    )
    return _Launch(plan.function, plan.config, ctypes.addressof(arguments), (*maps, problem, arguments))


def launch_config(grid: int, threads: int, shared_bytes: int, stream: int) -> Any:
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


def grid_size(tile: AnyTile | W4Tile, tiles: int | None, slots: int) -> int:
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


def load(main: str, headers: Mapping[str, str], tile: AnyTile | W4Tile, shared_bytes: int) -> tuple[Any, int]:
    """The loaded kernel, compiled if nobody did before, and how many clusters run at once."""
    function = load_kernel(machine_code(main, headers), main.removesuffix(".cu"), shared_bytes)
    config = launch_config(tile.cluster, tile.threads, shared_bytes, 0)
    return function, max(1, check(driver.cuOccupancyMaxActiveClusters(function, config)))


def aligned(x: torch.Tensor) -> torch.Tensor:
    """E4M3 x with contiguous rows at multiples of 16 bytes, for the copy engine; copied only if needed."""
    if x.data_ptr() % 16 == 0 and has_aligned_rows(x.stride()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def has_aligned_rows(stride: tuple[int, ...]) -> bool:
    return stride[-1] == 1 and all(each % 16 == 0 for each in stride[:-1])


def column_major(scale: torch.Tensor) -> torch.Tensor:
    """The scales (..., M, G) with M fastest and G at multiples of 16 bytes, as the kernels read them."""
    m, groups = scale.shape[-2:]
    if scale.data_ptr() % 16 == 0 and is_column_major(m, scale.stride()):
        return scale
    padded = scale.new_empty(*scale.shape[:-2], groups, math.ceil(m / 4) * 4)
    return padded[..., :m].mT.copy_(scale)


def is_column_major(m: int, stride: tuple[int, ...]) -> bool:
    outer = (*stride[:-2], stride[-1])
    return stride[-2] == 1 and stride[-1] >= m and all(each % 4 == 0 for each in outer)


def is_packed(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the trailing dimensions of `shape` with these strides are contiguous."""
    shape = shape[-len(stride) :]
    return all(shape[i] == 1 or stride[i] == math.prod(shape[i + 1 :]) for i in range(len(stride)))


@functools.cache
def processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
