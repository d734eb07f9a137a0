"""Which tile of the CUDA GEMM a problem gets, and that every tile on offer fits a Hopper multiprocessor."""

import pytest

from blockscale.ops._cuda import configs
from blockscale.ops._cuda.configs import FewTile, Tile, choose, takes

H100 = 132
SHARED_BYTES = 233472  # of a multiprocessor, 1024 of which each block loses to the system
REGISTERS = 65536


def _offered():
    sizes = [(m, n, k) for m in (1, 17, 64, 128, 4096) for n, k in ((2112, 7168), (24576, 1536), (576, 576))]
    found = {
        choose(kind, size, 1 if kind == "dense" else 32, H100) for kind in configs.KINDS for size in sizes
    }
    return sorted({*found, *configs._DENSE, *configs._GROUPED}, key=repr)


@pytest.mark.parametrize("out_float32", [False, True])
@pytest.mark.parametrize("tile", _offered(), ids=repr)
def test_every_tile_on_offer_fits(tile, out_float32):
    assert tile.occupancy * (tile.shared_bytes(out_float32) + 1024) <= SHARED_BYTES
    assert tile.stages(out_float32) >= 3, "fewer leave the tensor cores waiting for memory"
    if not isinstance(tile, FewTile):
        math_registers, feed_registers = tile.registers
        used = 128 * (tile.warpgroups * math_registers + feed_registers) * tile.occupancy
        assert used <= REGISTERS


@pytest.mark.parametrize(
    ("n", "k", "splits"),
    [(2112, 7168, 2), (24576, 1536, 1), (32768, 512, 1), (7168, 16384, 1), (4096, 7168, 2), (576, 7168, 8)],
)
def test_few_rows_divide_k_while_multiprocessors_are_idle(n, k, splits):
    tile = choose("dense", (16, n, k), 1, H100)
    assert isinstance(tile, FewTile)
    assert (tile.rows, tile.splits) == (16, splits)


@pytest.mark.parametrize(
    ("m", "n", "width"), [(64, 7168, 64), (64, 4096, 32), (128, 7168, 64), (128, 2112, 32)]
)
def test_more_rows_get_narrow_tiles_that_fill_the_machine(m, n, width):
    tile = choose("dense", (m, n, 7168), 1, H100)
    assert isinstance(tile, Tile)
    assert tile.block_n == width
    assert -(-m // tile.block_m) * -(-n // width) >= H100 * 3 // 4


def test_a_tile_of_the_contiguous_form_has_the_rows_of_one_expert():
    for experts, rows in ((8, 1024), (32, 256), (256, 128)):
        assert choose("contiguous", (experts * rows, 4096, 7168), experts, H100).block_m == 128


@pytest.mark.parametrize(
    ("experts", "few"), [(configs.MOST_EXPERTS, True), (configs.MOST_EXPERTS + 1, False)]
)
def test_tiles_of_few_rows_take_as_many_experts_as_they_keep_counts_of(experts, few):
    assert isinstance(choose("masked", (8, 2816, 2048), experts, H100), FewTile if few else Tile)
    assert takes(FewTile(8), "masked", experts) == few
    assert takes(FewTile(8), "dense", 1)
    assert takes(Tile(128), "masked", experts)
