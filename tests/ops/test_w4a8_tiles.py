"""W4A8 in CUDA C++ without a GPU: which tile a problem gets, that tiles fit, and what a lane unpacks."""

import pytest
import torch

from blockscale.ops._cuda.w4a8_configs import _DENSE, _GROUPED, _ONE_SEGMENT, W4Tile, choose
from blockscale.reference.w4 import W4Weight, dequantize_w4

H100 = 132
SHARED_BYTES = 233472  # of a multiprocessor, 1024 of which each block loses to the system
REGISTERS = 65536
OFFERED = (*_DENSE, W4Tile(rows=64), _GROUPED, _ONE_SEGMENT)
SHAPES = ((4096, 7168), (7168, 2048))


@pytest.mark.parametrize("out_float32", [False, True])
@pytest.mark.parametrize("tile", OFFERED, ids=repr)
def test_every_tile_on_offer_fits(tile, out_float32):
    assert tile.shared_bytes(out_float32) + 1024 <= SHARED_BYTES
    assert tile.stages(out_float32) >= 3, "fewer leave the tensor cores waiting for memory"
    math_registers, feed_registers = tile.registers
    assert 128 * (tile.warpgroups * math_registers + feed_registers) <= REGISTERS


@pytest.mark.parametrize("kind", ["dense", "contiguous", "masked"])
@pytest.mark.parametrize("m", [33, 64, 128, 256, 1024, 8192])
def test_tiles_that_are_chosen_are_those_on_offer(kind, m):
    for n, k in SHAPES:
        assert choose(kind, (m, n, k), 32, H100) in OFFERED


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [
        (64, 4096, W4Tile(rows=32, warpgroups=1, waves=1)),
        (64, 7168, W4Tile(rows=64, warpgroups=1, waves=1)),
        (128, 4096, W4Tile(rows=64, warpgroups=1, waves=1)),
        (128, 7168, W4Tile(rows=64, waves=1)),
        (256, 4096, W4Tile(rows=64, waves=1)),
        (512, 4096, W4Tile(waves=1)),
        (1024, 4096, W4Tile()),
        (4096, 7168, W4Tile()),
    ],
)
def test_dense_tiles_grow_until_every_multiprocessor_has_one(m, n, tile):
    assert choose("dense", (m, n, 7168), 1, H100) == tile


@pytest.mark.parametrize(("m", "unit"), [(32 * 128, 32), (32 * (127 + 32), 32), (32 * 256, 0)])
def test_contiguous_rows_of_few_tokens_an_expert_are_left_out_by_quarters(m, unit):
    tile = choose("contiguous", (m, 4096, 7168), 32, H100)
    assert tile.unit == unit
    assert 128 % tile.rows == 0


def _swizzled(words):
    """Rows of 64 bytes (64, 64) as the copy engine puts them into shared memory: (4096,)."""
    memory = torch.empty(64 * 64, dtype=torch.uint8)
    for row in range(64):
        for chunk in range(4):
            at = row * 64 + ((chunk ^ (row // 2 % 4)) << 4)
            memory[at : at + 16] = words[row, 16 * chunk : 16 * chunk + 16]
    return memory


def _loaded(memory, warp, lower):
    """What `load_matrices` gives the lanes of a warp, by `words_of_lane`: bytes (32 lanes, 4 words, 4)."""
    lane = torch.arange(32)
    start = (warp * 16 + lane % 8) * 64 + ((lane // 8 ^ lane % 8 // 2) << 4) + lower * 8 * 64
    found = torch.empty(32, 4, 4, dtype=torch.uint8)
    for each in range(32):
        for matrix in range(4):
            at = int(start[matrix * 8 + each // 4]) + each % 4 * 4
            found[each, matrix] = memory[at : at + 4]
    return found


def _turned(words):
    """`turned` of words given as bytes (..., 4): every half byte moves down by one."""
    return words >> 4 | words.roll(-1, -1) << 4 & 0xFF


def _from_mxfp4(byte, eights):
    bits = byte << 2 & 0x1C
    other = ((bits ^ 0x04) + 0x7C) & 0x80
    return torch.where(other != 0, bits + eights, 0) & 0xFF | (byte & 0x80)


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_what_lanes_unpack_is_the_operand_of_the_tensor_cores(kind):
    """`w4a8_unpack.cuh` by hand: registers of K = 32 i on, upper and lower row, as wgmma wants them."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (64, 64), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(1, 13, (64, 4), dtype=torch.int32, generator=generator)
    memory, codes = _swizzled(data), torch.zeros(64, 128, dtype=torch.uint8)
    for warp in range(4):
        for lower in range(2):
            words = _loaded(memory, warp, lower).to(torch.int32)
            for lane in range(32):
                row = warp * 16 + lane // 4 + 8 * lower
                for j in range(4):
                    for high in range(2):
                        byte, block = (_turned(words) if high else words)[lane, j], 2 * high + j // 2
                        k = 32 * block + 16 * (j % 2) + 4 * (lane % 4)
                        if kind == "int4":
                            found = byte & 0x87
                        else:
                            found = _from_mxfp4(byte, 8 * exponents[row, block])
                        codes[row, k : k + 4] = found.to(torch.uint8)
    scale = torch.ones(1, 64)
    if kind == "mxfp4":
        shifts = 4 * torch.arange(4, dtype=torch.int32)
        scale = (scale.view(torch.int32) | (exponents << shifts).sum(-1).to(torch.int32)).view(torch.float32)
    weight = W4Weight(data.view(torch.int32)[None], scale, 128, kind)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float() + 0.0, dequantize_w4(weight) + 0.0)
