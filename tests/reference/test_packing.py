"""Layouts of packed codes: bytes written by hand, and what other programs make of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockscale import reference
from blockscale.errors import BlockscaleError
from blockscale.group_formats import MXFP4, NVFP4, GroupInt, packed_width
from blockscale.reference import packing
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal


def octets(*values):
    return torch.tensor([values], dtype=torch.uint8)


def test_golden_bytes_of_four_bits():
    codes = torch.tensor([[1, 2, -1, -7, 7, -8, 3]], dtype=torch.int8)
    packed = packing.pack(codes, 4)
    # Even columns in the low half: 1 and 2, -1 = F and -7 = 9, 7 and -8 = 8, 3 and nothing.
    assert_bitwise_equal(packed, octets(0x21, 0x9F, 0x87, 0x03))
    assert_bitwise_equal(packing.signed(packing.unpack(packed, 4, 7), 4), codes)


def test_golden_bytes_of_three_bits():
    codes = torch.tensor([[1, 2, 3, 0, -1, -2, -3, -4, 3]], dtype=torch.int8)
    packed = packing.pack(codes, 3)
    # 100 101 110 111 000 011 010 001, from column 7 down to 0: 1001 0111 0111 0000 1101 0001.
    assert_bitwise_equal(packed, octets(0xD1, 0x70, 0x97, 0x03, 0x00, 0x00))
    assert_bitwise_equal(packing.signed(packing.unpack(packed, 3, 9), 3), codes)


def test_golden_bytes_of_e2m1():
    x = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]])
    x = torch.cat([x, -x, torch.zeros(1, 16)], dim=1)
    packed, scale = reference.quantize_group(x, MXFP4())
    expected = octets(0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, *[0] * 8)
    assert_bitwise_equal(packed, expected)
    assert_bitwise_equal(scale.view(torch.uint8), octets(0x7F))


def test_golden_bytes_of_a_weight_with_its_scales():
    x = torch.zeros(1, 130)
    x[0, 0], x[0, 1], x[0, 127], x[0, 128], x[0, 129] = 7.0, -3.5, 1.0, 0.75, 0.3
    packed, scale = reference.quantize_group(x, GroupInt(4, 128))
    # 3.5 is half way between 3 and 4: the even one, -4 = C. In the second group 0.3 / (0.75 / 7) = 2.8.
    assert packed[0, [0, 1, 63, 64]].tolist() == [0xC7, 0, 0x10, 0x37]
    assert scale.view(torch.int16).tolist() == [[0x3F80, 0x3DDB]]
    packed, scale = reference.quantize_group(x, GroupInt(4, 128, "ue8m0"))
    # 0.75 / 7 rounds up to 0.125: 6 and 2.4.
    assert packed[0, [0, 1, 63, 64]].tolist() == [0xC7, 0, 0x10, 0x26]
    assert scale.view(torch.uint8).tolist() == [[127, 124]]


def test_golden_words_of_compressed_tensors():
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 0, 7]], dtype=torch.int8)
    words = packing.to_compressed_tensors(packing.pack(codes, 4), 4, 10)
    assert_bitwise_equal(words, torch.tensor([[0x76543210, 0xF8]], dtype=torch.int32))
    codes = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3]], dtype=torch.int8)
    words = packing.to_compressed_tensors(packing.pack(codes, 3), 3, 8)
    assert_bitwise_equal(words, torch.tensor([[0o76543210]], dtype=torch.int32))


def test_golden_bytes_of_w4afp8():
    weight = packing.to_w4afp8(octets(0x21, 0x9F), 4)
    assert_bitwise_equal(weight, torch.tensor([[0x21, 0x9F - 256]], dtype=torch.int8))
    assert_bitwise_equal(packing.from_w4afp8(weight), octets(0x21, 0x9F))


def test_mxfp4_blocks_are_the_same_bytes():
    x = data.gaussian((2, 3, 96))
    packed, scale = reference.quantize_group(x, MXFP4())
    blocks, scales = packing.to_mxfp4_blocks(packed, scale)
    assert (blocks.shape, scales.shape) == ((2, 3, 3, 16), (2, 3, 3))
    assert blocks.flatten().tolist() == packed.flatten().tolist()
    for got, expected in zip(packing.from_mxfp4_blocks(blocks, scales), (packed, scale), strict=True):
        assert_bitwise_equal(got, expected)


@given(
    bits=st.sampled_from([3, 4]),
    width=st.integers(0, 70),
    lead=st.sampled_from([(3,), (2, 2)]),
    seed=st.integers(0, 1000),
)
def test_any_codes_come_back_and_what_is_left_over_is_zero(bits, width, lead, seed):
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (*lead, width), generator=generator).to(torch.int8)
    packed = packing.pack(codes, bits)
    assert packed.shape == (*lead, packed_width(width, bits))
    assert_bitwise_equal(packing.signed(packing.unpack(packed, bits, width), bits), codes)
    first = (0,) * len(lead)
    stream = sum(byte << (8 * at) for at, byte in enumerate(packed[first].tolist()))
    fields = [code & (2 * half - 1) for code in codes[first].tolist()]
    assert stream == sum(field << (bits * at) for at, field in enumerate(fields))
    words = packing.to_compressed_tensors(packed, bits, width)
    assert_bitwise_equal(packing.from_compressed_tensors(words, bits, width), packed)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("width", [1, 9, 31, 32, 100, 256])
def test_compressed_tensors_packs_and_unpacks_the_same(bits, width):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-4, 4, (5, width), generator=torch.Generator().manual_seed(width)).to(torch.int8)
    words = packing.to_compressed_tensors(packing.pack(codes, bits), bits, width)
    assert_bitwise_equal(words, helpers.pack_to_int32(codes, bits))
    assert_bitwise_equal(helpers.unpack_from_int32(words, bits, torch.Size((5, width))), codes)


def scheme(bits, group_size, kind="int"):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    strategy = "tensor_group" if group_size == 16 else "group"
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group_size}
    return quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(symmetric=True, **weights)
    )


@pytest.mark.parametrize("fmt", [GroupInt(4, 128), GroupInt(4, 32), GroupInt(3, 64)], ids=str)
def test_compressed_tensors_decompresses_our_integers_to_our_values(fmt):
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    x = data.gaussian((24, 256))
    packed, scale = reference.quantize_group(x, fmt)
    state = {
        "weight_packed": packing.to_compressed_tensors(packed, fmt.bits, 256),
        "weight_scale": scale,
        "weight_shape": torch.tensor([24, 256]),
    }
    decompress = compressors.PackedQuantizationCompressor.decompress
    got = decompress(state, scheme(fmt.bits, fmt.group_size))["weight"]
    assert torch.equal(got.to(torch.bfloat16), reference.dequantize_group(packed, scale, fmt, 256))


def test_compressed_tensors_decompresses_our_mxfp4_to_our_values():
    compressors = pytest.importorskip("compressed_tensors.compressors.mxfp4")
    packed, scale = reference.quantize_group(data.gaussian((24, 96)), MXFP4())
    state = {"weight_packed": packed, "weight_scale": scale.view(torch.uint8)}
    got = compressors.MXFP4PackedCompressor.decompress(state, scheme(4, 32, "float"))["weight"]
    assert torch.equal(got.to(torch.bfloat16), reference.dequantize_group(packed, scale, MXFP4(), 96))


def test_transformers_dequantizes_our_mxfp4_to_our_values():
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    packed, scale = reference.quantize_group(data.gaussian((2, 24, 96)), MXFP4())
    got = integration.convert_moe_packed_tensors(*packing.to_mxfp4_blocks(packed, scale))
    assert torch.equal(got.transpose(1, 2), reference.dequantize_group(packed, scale, MXFP4(), 96))


def test_nvfp4_of_compressed_tensors_is_read_to_its_values():
    compressors = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    x = data.gaussian((24, 64), torch.float32)
    global_scale = 6 * 448 / x.abs().max().reshape(1)
    scale = (x.view(24, 4, 16).abs().amax(-1) / 6 * global_scale).to(torch.float8_e4m3fn)
    state = {"weight": x, "weight_scale": scale.float(), "weight_global_scale": global_scale}
    compressor, its_scheme = compressors.NVFP4PackedCompressor, scheme(4, 16, "float")
    state = compressor.compress(state, its_scheme)
    expected = compressor.decompress(state, its_scheme)["weight"]
    multiplier = reference.nvfp4_scale(state["weight_scale"], global_scale, "compressed-tensors")
    got = reference.dequantize_group(state["weight_packed"], multiplier, NVFP4(), 64)
    # The package multiplies in BF16 by scales rounded to BF16.
    assert torch.allclose(got.float(), expected.float(), rtol=2.0**-7, atol=0)
    assert float((got.float() - x).norm() / x.norm()) < 0.1


_BAD_CALLS = {
    "pack: codes: bad dtype": lambda: packing.pack(torch.zeros(2, 2), 4),
    r"unpack: packed: wrong shape \(expected \[1, 3\]": lambda: packing.unpack(octets(1, 2), 4, 5),
    "words: bad dtype": lambda: packing.from_compressed_tensors(octets(1, 2), 4, 4),
    r"words: wrong shape \(expected \[1, 2\]": lambda: packing.from_compressed_tensors(
        torch.zeros((1, 1), dtype=torch.int32), 4, 9
    ),
    "no place for half a byte .*an even K, got 3": lambda: packing.to_w4afp8(octets(1, 2), 3),
    "weight: bad dtype": lambda: packing.from_w4afp8(octets(1)),
    "MXFP4 blocks are whole .*16 bytes a row": lambda: packing.to_mxfp4_blocks(
        octets(*[0] * 15), octets(127).view(torch.float8_e8m0fnu)
    ),
    "blocks: wrong shape": lambda: packing.from_mxfp4_blocks(octets(*[0] * 16), octets(127)),
}


@pytest.mark.parametrize("message", _BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(BlockscaleError, match=message):
        _BAD_CALLS[message]()
