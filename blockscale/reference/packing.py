"""Codes of 3 and 4 bits in bytes, and the same codes as other programs lay them out.

The layout is the one `blockscale/group_formats.py` defines. A field is what a code occupies: its low bits,
as uint8. Others store the same streams of bits, and the differences are these:

    compressed-tensors `pack-quantized`      int32 (..., ceil(K * bits / 32)); top bit of every code flipped
    SGLang `w4afp8`                          int8 (..., K / 2); nothing but the dtype
    MXFP4 of gpt-oss and transformers        uint8 (..., K / 32, 16), scales uint8 (..., K / 32); the shape
    MXFP4 and NVFP4 of compressed-tensors    uint8 (..., K / 2), scales uint8 and E4M3; nothing

Sources: compressed-tensors 0.18 `compressors/`, transformers 5.23 `integrations/mxfp4.py`, SGLang 0.5.
"""

from __future__ import annotations

import math
import sys

import torch
from torch.nn.functional import pad

from blockscale.errors import BlockscaleError
from blockscale.group_formats import packed_width
from blockscale.reference import checks

_CODES_OF_UNIT = {4: 2, 3: 8}  # codes that fill whole bytes
_BYTES_OF_UNIT = {4: 1, 3: 3}
# Bits that make two's complement offset binary: the top one of every code in a unit, byte by byte.
_TOP_BITS = {4: (0x88,), 3: (0x24, 0x49, 0x92)}


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Low `bits` bits of codes (..., K), int8 or uint8, as uint8 (..., packed_width(K, bits))."""
    checks.check_dtype("pack: codes", codes.dtype, (torch.int8, torch.uint8))
    per_unit = _CODES_OF_UNIT[bits]
    fields = codes.to(torch.int32) & ((1 << bits) - 1)
    units = pad(fields, (0, -codes.shape[-1] % per_unit)).unflatten(-1, (-1, per_unit))
    words = (units << (bits * torch.arange(per_unit, dtype=torch.int32, device=codes.device))).sum(-1)
    shifts = 8 * torch.arange(_BYTES_OF_UNIT[bits], device=codes.device)
    return ((words.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Fields, uint8 (..., width), of packed codes, uint8 (..., packed_width(width, bits))."""
    _check_packed("unpack", packed, bits, width)
    size, per_unit = _BYTES_OF_UNIT[bits], _CODES_OF_UNIT[bits]
    units = packed.to(torch.int32).unflatten(-1, (-1, size))
    words = (units << (8 * torch.arange(size, dtype=torch.int32, device=packed.device))).sum(-1)
    shifts = bits * torch.arange(per_unit, device=packed.device)
    fields = ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)
    return fields[..., :width].to(torch.uint8)


def signed(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Fields as the numbers they are in two's complement, int8."""
    top = 1 << (bits - 1)
    return ((fields.to(torch.int16) ^ top) - top).to(torch.int8)


def to_compressed_tensors(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Packed `GroupInt` codes as `weight_packed`: int32 (..., ceil(K * bits / 32)), offset binary.

    Code k is at bits `bits * k` of the words of a row, as q + 8 (3 bits: q + 4); padding is zero.
    """
    _check_packed("to_compressed_tensors", packed, bits, width)
    count = math.ceil(width * bits / 32)
    stream = _resized(_flipped(packed, bits, width), 4 * count)
    return stream.view(*packed.shape[:-1], count, 4).view(torch.int32).squeeze(-1)


def from_compressed_tensors(words: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """The inverse of `to_compressed_tensors`; `width` is the last of the checkpoint's `weight_shape`."""
    where = "from_compressed_tensors: words"
    checks.check_dtype(where, words.dtype, (torch.int32,))
    checks.check_shape(where, words.shape, (*words.shape[:-1], math.ceil(width * bits / 32)))
    _check_byte_order()
    stream = _resized(words.contiguous().view(torch.uint8), packed_width(width, bits))
    return _flipped(stream, bits, width)


def to_w4afp8(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Packed 4-bit `GroupInt` codes as SGLang's int8 (..., K / 2): the same bytes, for even K.

    Raises:
        BlockscaleError: K is odd.
    """
    _check_packed("to_w4afp8", packed, 4, width)
    if width % 2:
        raise BlockscaleError("w4afp8 has no place for half a byte", expected="an even K", got=width)
    return packed.view(torch.int8)


def from_w4afp8(weight: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_w4afp8`; K is twice the bytes of a row."""
    checks.check_dtype("from_w4afp8: weight", weight.dtype, (torch.int8,))
    return weight.view(torch.uint8)


def to_mxfp4_blocks(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 as `_blocks` uint8 (..., K / 32, 16) and `_scales` uint8 (..., K / 32): the same bytes.

    Raises:
        BlockscaleError: K is no multiple of 32.
    """
    checks.check_dtype("to_mxfp4_blocks: scale", scale.dtype, (torch.float8_e8m0fnu,))
    if packed.shape[-1] != 16 * scale.shape[-1]:
        expected = f"{16 * scale.shape[-1]} bytes a row, K a multiple of 32"
        raise BlockscaleError("MXFP4 blocks are whole", expected=expected, got=packed.shape[-1])
    return packed.unflatten(-1, (-1, 16)), scale.view(torch.uint8)


def from_mxfp4_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `to_mxfp4_blocks`: (packed, scale), with K = 32 * scales.shape[-1]."""
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        checks.check_dtype(f"from_mxfp4_blocks: {name}", tensor.dtype, (torch.uint8,))
    checks.check_shape("from_mxfp4_blocks: blocks", blocks.shape, (*scales.shape, 16))
    return blocks.flatten(-2), scales.view(torch.float8_e8m0fnu)


def _check_packed(op: str, packed: torch.Tensor, bits: int, width: int) -> None:
    checks.check_dtype(f"{op}: packed", packed.dtype, (torch.uint8,))
    checks.check_shape(f"{op}: packed", packed.shape, (*packed.shape[:-1], packed_width(width, bits)))


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise BlockscaleError("int32 words of codes need a little-endian machine", got=sys.byteorder)


def _flipped(stream: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Two's complement from offset binary or the other way round; what is past `width` codes becomes zero."""
    _check_byte_order()
    length, device = stream.shape[-1], stream.device
    top = torch.tensor(_TOP_BITS[bits], dtype=torch.uint8, device=device)
    flip = top.repeat(length // len(top) + 1)[:length]
    used = (width * bits - 8 * torch.arange(length, device=device)).clamp(0, 8)  # bits of each byte
    return (stream ^ flip) & ((1 << used) - 1).to(torch.uint8)


def _resized(stream: torch.Tensor, length: int) -> torch.Tensor:
    """The stream with zeros behind it, or without some of those it has."""
    return pad(stream, (0, length - stream.shape[-1])).contiguous()
