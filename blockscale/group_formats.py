"""Weight formats below 8 bits: the values of a code, the rule of its scale, and the layout of the bytes.

A weight (N, K), or (E, N, K) for fused experts, is stored as codes and one scale for every G adjacent values
of a row, a group; the last group of a row is the remainder of K:

    weight[n, k] ~= value(codes[n, k]) * scale[n, k // G]          scale (..., N, ceil(K / G))

Layout of the packed codes: uint8 (..., N, `packed_width(K, bits)`), every row on its own. The bytes of a row
are a stream of bits, least significant bit first, and the code of column k is at bits `bits * k` on:

    4 bits   two codes in a byte: the even k in bits 0-3, the odd k in bits 4-7            ceil(K / 2) bytes
    3 bits   eight codes in three bytes, read as one little-endian 24-bit word:
             code 8j + i in bits 3i to 3i + 2 of bytes 3j, 3j + 1, 3j + 2              3 * ceil(K / 8) bytes

Any K will do, odd ones too; what is left over in the last byte or word of a row is zero. The bytes do not
tell K (five columns take as many as six), so it is an argument wherever codes are unpacked.

Sources: OCP Microscaling Formats v1.0 (E2M1, E8M0, MXFP4); compressed-tensors and ModelOpt (NVFP4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from blockscale.errors import BlockscaleError

GroupScaleFmt = Literal["bf16", "ue8m0"]

# What the codes 0 to 7 of E2M1 stand for; bit 3 is the sign.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_DTYPES = {"bf16": torch.bfloat16, "ue8m0": torch.float8_e8m0fnu}
_CHOICES: dict[str, tuple[object, ...]] = {
    "bits": (4, 3),
    "group_size": (32, 64, 128),
    "scale_fmt": ("bf16", "ue8m0"),
}


@dataclass(frozen=True)
class GroupInt:
    """Symmetric integers: codes -7 to 7 (3 bits: -3 to 3) in two's complement; -8 (-4) is read, not written.

        scale = max(amax / 7, 2**-126)          amax / 3 for 3 bits; 1 for a group of zeros
        codes = round to nearest even of x / scale

    The quotients are true divisions in float32. The scale is rounded before it divides: "bf16" to nearest
    even, which may make it smaller by a factor of up to 1 + 2**-8: the largest quotient is then 7.03 and its
    code 7, off by a sixteenth of what rounding costs at most, and nothing saturates. "ue8m0" rounds up to a
    power of two, by the bit pattern.

    Attributes:
        bits: 4 or 3.
        group_size: 32, 64 or 128.
        scale_fmt: "bf16", or "ue8m0" for powers of two stored in a byte (float8_e8m0fnu).
    """

    bits: int = 4
    group_size: int = 128
    scale_fmt: GroupScaleFmt = "bf16"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices or isinstance(value, bool):
                expected = " | ".join(str(choice) for choice in choices)
                raise BlockscaleError(
                    "bad value", where=f"GroupInt: {name}", expected=expected, got=repr(value)
                )

    @property
    def largest(self) -> int:
        """The largest code, which the amax of a group gets: 7 or 3."""
        return (1 << (self.bits - 1)) - 1

    @property
    def scale_dtype(self) -> torch.dtype:
        """How scales are stored: bfloat16 or float8_e8m0fnu."""
        return _SCALE_DTYPES[self.scale_fmt]


@dataclass(frozen=True)
class MXFP4:
    """E2M1 codes in groups of 32 with power of two scales, one byte each (float8_e8m0fnu).

        scale = max(amax / 7, 2**-126) rounded up to a power of two, by the bit pattern; 1 for zeros
        codes = E2M1 of x / scale: to nearest, ties to the even mantissa, saturating at 6

    The values of the codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign, of zeros too. Quotients
    between 6 and 7 saturate, and are off by no more than those between 4 and 6 are: by one scale. Anything
    beyond would be off by more, so there the scale is the next one. OCP's rule, 2**(floor(log2 amax) - 2),
    lets quotients grow to 8, and amax / 6 lets none saturate: both lose 0.2 to 0.4 dB against this one
    (docs/NUMERICS.md). Files made by either rule are read as well.
    """

    bits: ClassVar[int] = 4
    group_size: ClassVar[int] = 32
    scale_fmt: ClassVar[GroupScaleFmt] = "ue8m0"
    scale_dtype: ClassVar[torch.dtype] = torch.float8_e8m0fnu
    largest: ClassVar[int] = 7


@dataclass(frozen=True)
class NVFP4:
    """E2M1 codes in groups of 16 with float8_e4m3fn scales and a float32 scale of the tensor; read only.

        weight ~= value(code) * group scale * global scale          ModelOpt: `weight_scale_2` is a multiplier
        weight ~= value(code) * group scale / global scale          compressed-tensors: `weight_global_scale`

    `reference.nvfp4_scale` folds the two scales into one float32 multiplier of a group, which is what
    `dequantize_group` takes for this format.
    """

    bits: ClassVar[int] = 4
    group_size: ClassVar[int] = 16
    scale_dtype: ClassVar[torch.dtype] = torch.float32


GroupFormat = GroupInt | MXFP4 | NVFP4


def packed_width(width: int, bits: int) -> int:
    """Bytes of a row of `width` codes: ceil(K / 2) for 4 bits, 3 * ceil(K / 8) for 3."""
    return math.ceil(width / 2) if bits == 4 else 3 * math.ceil(width / 8)


def packed_shape(shape: tuple[int, ...], fmt: GroupFormat) -> tuple[int, ...]:
    """Shape of the packed codes of a weight: (576, 7168) -> (576, 3584) for 4 bits."""
    return (*shape[:-1], packed_width(shape[-1], fmt.bits))


def group_scale_shape(shape: tuple[int, ...], fmt: GroupFormat) -> tuple[int, ...]:
    """Shape of the scales of a weight: (576, 7168) -> (576, 56) for groups of 128."""
    return (*shape[:-1], math.ceil(shape[-1] / fmt.group_size))
