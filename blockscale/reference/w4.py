"""Four-bit weights in the layout that W4A8 products read, and back.

Tensor cores multiply E4M3 by E4M3, so a four-bit code has to become an E4M3 byte on the way, every time it is
used. The layout makes that bit arithmetic on whole words, four codes at a time, without a table:

    codes of one row and one group of 128 along K: 64 bytes, k = j in the low half of byte j, k = 64 + j in
    the high one, each as sign (bit 3) and magnitude (bits 0 to 2); then, in words of four bytes, all signs
    move up by one code, from the highest into the lowest: what is left at bits 0 to 2 and 7 of every byte, of
    a word and of the word turned by half a byte, are magnitudes and signs of the same codes

    INT4     E4M3 bytes 0 to 7 are the subnormals m * 2**-9: magnitude and sign moved to where E4M3 has them
             *are* the number m * 2**-9. The scale of the group carries the 2**9.
    MXFP4    magnitude eem of E2M1 is exponent and first mantissa bit of E4M3, 4 * eem. A power of two t of
             every block of 32 is added to the exponent (t = 1 to 12), so that the group of 128 has one scale:
             value * 2**(t - 6) * scale. Zero and 0.5 change places, which makes the sum right for 0.5.

Both are exact for INT4, and for MXFP4 wherever the scales in a group of 128 are within 2**11 of each other;
codes of a block below that are rounded to the smallest scale that fits, off by less than 2**-13 of the
group's largest possible value.

Words int32 (..., G, N, 16), group by group, so that a tile of rows is one contiguous piece of memory; G =
ceil(K / 128), columns past K are zeros. Scales float32 (..., G, N); of MXFP4 the lower 16 bits of a scale,
which a power of two does not need, are the t of the four blocks, 4 bits each.

Sources: OCP FP8 (E4M3) and Microscaling (E2M1) formats; the rest follows from their bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch

from blockscale.errors import BlockscaleError
from blockscale.group_formats import MXFP4, GroupFormat, GroupInt, group_scale_shape, packed_shape
from blockscale.reference import checks
from blockscale.reference.fp4 import e2m1_value, to_e2m1
from blockscale.reference.packing import unpack

Kind = Literal["int4", "mxfp4"]
GROUP = 128
_ALIGNMENT = 16  # what the products ask N and K to be multiples of
_BLOCKS = GROUP // MXFP4.group_size
_INT4_SHIFT = 2.0**9
_HIGHEST, _UNIT = 12, 6  # the largest t, and the t at which E4M3 has the values of E2M1 as they are
_NAN_SCALE = 0xFF
_SIGNS = 0x88888888 - (1 << 32)  # of every code of a word, as int32
SWAPPED = (1, 0, 2, 3, 4, 5, 6, 7)  # magnitudes of E2M1 as stored: 0 and 0.5 change places


@dataclass(frozen=True)
class W4Weight:
    """A weight (N, K) or (E, N, K) in the layout of this module's first lines.

    Attributes:
        words: int32 (..., G, N, 16).
        scale: float32 (..., G, N), with what the format folds in.
        width: K.
        kind: "int4" or "mxfp4".
    """

    words: torch.Tensor
    scale: torch.Tensor
    width: int
    kind: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) or (E, N, K)."""
        return (*self.scale.shape[:-2], self.scale.shape[-1], self.width)

    def __getitem__(self, expert: int) -> W4Weight:
        """The weight (N, K) of one expert."""
        return W4Weight(self.words[expert], self.scale[expert], self.width, self.kind)

    def rows(self, first: int, last: int) -> W4Weight:
        """Rows first .. last - 1, of every expert."""
        words, scale = self.words[..., first:last, :], self.scale[..., first:last]
        return W4Weight(words, scale, self.width, self.kind)

    def room_for(self, experts: int) -> W4Weight:
        """Uninitialized, for that many weights like this one (N, K)."""
        words, scale = (each.new_empty(experts, *each.shape) for each in (self.words, self.scale))
        return W4Weight(words, scale, self.width, self.kind)

    @property
    def nbytes(self) -> int:
        """Bytes of words and scales."""
        return self.words.nbytes + self.scale.nbytes


def multiplies(fmt: GroupFormat, hidden: int, width: int) -> bool:
    """Whether there are W4A8 products of weights in this format, between layers of these widths."""
    known = isinstance(fmt, MXFP4) or (isinstance(fmt, GroupInt) and (fmt.bits, fmt.group_size) == (4, GROUP))
    return known and hidden % _ALIGNMENT == 0 and width % _ALIGNMENT == 0


def prepare_w4(packed: torch.Tensor, scale: torch.Tensor, fmt: GroupInt | MXFP4, width: int) -> W4Weight:
    """Turn packed codes into the layout of W4A8 products: once, when a weight is loaded.

    Args:
        packed: uint8 (N, ceil(K / 2)) or (E, N, ceil(K / 2)), as `group_formats` lays codes out.
        scale: (..., N, ceil(K / G)); float32, bfloat16 or float8_e8m0fnu (for MXFP4: this one).
        fmt: `GroupInt(4, 128)` or `MXFP4()`.
        width: K.

    Returns:
        The weight, on the same device. Experts are prepared one by one, which takes little memory beside.

    Raises:
        BlockscaleError: another format, a code of -8, a NaN among MXFP4's scales, wrong dtype or shape.
    """
    check_preparable(packed, scale, fmt, width)
    one = _from_mxfp4 if isinstance(fmt, MXFP4) else _from_int4
    *lead, n, _ = packed.shape
    groups = math.ceil(width / GROUP)
    words = torch.empty((math.prod(lead), groups, n, 16), dtype=torch.int32, device=packed.device)
    scales = torch.empty((math.prod(lead), groups, n), device=packed.device)
    pairs = zip(packed.reshape(-1, *packed.shape[-2:]), scale.reshape(-1, *scale.shape[-2:]), strict=True)
    for expert, (codes, each) in enumerate(pairs):
        words[expert], scales[expert] = one(unpack(codes, 4, width), each)
    kind: Kind = "mxfp4" if isinstance(fmt, MXFP4) else "int4"
    return W4Weight(words.view(*lead, groups, n, 16), scales.view(*lead, groups, n), width, kind)


def check_preparable(packed: torch.Tensor, scale: torch.Tensor, fmt: GroupInt | MXFP4, width: int) -> None:
    """Refuse arguments of `prepare_w4` by their formats, dtypes and shapes."""
    op = "prepare_w4"
    if not (isinstance(fmt, MXFP4) or (isinstance(fmt, GroupInt) and (fmt.bits, fmt.group_size) == (4, 128))):
        raise BlockscaleError(
            "no W4A8 format", where=f"{op}: fmt", expected="GroupInt(4, 128) or MXFP4()", got=fmt
        )
    checks.check_dtype(f"{op}: packed", packed.dtype, (torch.uint8,))
    if packed.dim() not in (2, 3) or width < 1:
        raise BlockscaleError(
            "wrong shape",
            where=f"{op}: packed",
            expected="(N, K / 2) or (E, N, K / 2), K at least 1",
            got=f"{list(packed.shape)}, K = {width}",
        )
    shape = (*packed.shape[:-1], width)
    checks.check_shape(f"{op}: packed", tuple(packed.shape), packed_shape(shape, fmt))
    checks.check_shape(f"{op}: scale", tuple(scale.shape), group_scale_shape(shape, fmt))
    allowed = (torch.float8_e8m0fnu,) if isinstance(fmt, MXFP4) else checks.SCALE_DTYPES
    checks.check_dtype(f"{op}: scale", scale.dtype, allowed)


def dequantize_w4(weight: W4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight's values, (N, K) or (E, N, K), computed in float32 and rounded once to `dtype`."""
    data = plain_words(weight.words).view(torch.uint8)  # (..., G, N, 64)
    nibbles = torch.cat([data & 15, data >> 4], dim=-1)
    scale = weight.scale
    magnitude = (nibbles & 7).to(torch.int64)
    if weight.kind == "int4":
        value = magnitude.to(torch.float32) / _INT4_SHIFT
    else:
        bits = scale.view(torch.int32)
        scale = (bits & -65536).view(torch.float32)
        shifts = 4 * torch.arange(_BLOCKS, device=bits.device)
        t = ((bits[..., None] >> shifts) & 15).repeat_interleave(MXFP4.group_size, dim=-1)
        swapped = torch.tensor(SWAPPED, dtype=torch.uint8, device=bits.device)
        value = torch.ldexp(e2m1_value(swapped[magnitude]), t - _UNIT)
    value = torch.where(nibbles >= 8, -value, value) * scale[..., None]
    rows = value.transpose(-3, -2).flatten(-2)  # (..., N, 128 G)
    return rows[..., : weight.width].to(dtype)


def _from_int4(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words (G, N, 16) and scales (G, N) of one weight's nibbles (N, K) in two's complement."""
    if bool((codes == 8).any()):
        refuse_minus_eight()
    nibbles = torch.where(codes > 8, 24 - codes, codes)  # -q = 16 - code, and the sign
    return _words(nibbles), int4_scale(scale)


def int4_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales of INT4 codes (N, G) as those of a prepared weight, float32 (G, N)."""
    return (scale.to(torch.float32) * _INT4_SHIFT).t().contiguous()


def refuse_minus_eight() -> NoReturn:
    """Say that there is a code of -8."""
    raise BlockscaleError(
        "a code of -8, which has no sign and magnitude in four bits",
        where="prepare_w4: packed",
        expected="codes from -7 to 7",
        remedy="quantize symmetrically, to -7 .. 7",
    )


def _from_mxfp4(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of E2M1 codes (N, K) with E8M0 scales (N, ceil(K / 32))."""
    blocks = _in_groups(codes, MXFP4.group_size)  # (N, 4 G, 32)
    folded, lost = fold_scales(((blocks & 7) != 0).any(-1), scale)
    if bool(lost.any()):
        smaller = torch.ldexp(e2m1_value(blocks), -lost[..., None].clamp_max(200))
        blocks = torch.where(lost[..., None] > 0, to_e2m1(smaller), blocks)
    swapped = torch.tensor(SWAPPED, dtype=torch.uint8, device=codes.device)
    nibbles = swapped[(blocks & 7).to(torch.int64)] | (blocks & 8)
    return _words(nibbles.flatten(1)), folded


def fold_scales(used: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for every group of 128, with what its blocks of 32 add to exponents in the lower bits.

    Args:
        used: bool (N, 4 G), blocks with a code that is not zero: the others ask for no scale.
        scale: float8_e8m0fnu (N, ceil(K / 32)).

    Returns:
        The scales of a prepared weight, float32 (G, N), and int32 (N, 4 G): by how many powers of two a block
        is below what exponents can say.

    Raises:
        BlockscaleError: a NaN among the scales.
    """
    exponent = scale.view(torch.uint8).to(torch.int32)
    if bool((exponent == _NAN_SCALE).any()):
        raise BlockscaleError("NaN among the scales", where="prepare_w4: scale", expected="finite scales")
    exponent = torch.nn.functional.pad(exponent, (0, used.shape[1] - exponent.shape[1]))
    asked = torch.where(used, exponent, 0).unflatten(-1, (-1, _BLOCKS))
    most = asked.amax(-1)  # (N, G)
    t = (_HIGHEST + asked - most[..., None]).clamp_min(1)
    lost = (most[..., None] - asked - (_HIGHEST - 1)).clamp_min(0).flatten(-2)
    # 2**-133, the smallest scale that can come out, is a power of two that bfloat16 has, too.
    power = torch.ldexp(torch.ones(most.shape, dtype=torch.float64, device=scale.device), most - 127 - _UNIT)
    bits = power.to(torch.float32).view(torch.int32)
    for block in range(_BLOCKS):
        bits = bits | (t[..., block].to(torch.int32) << 4 * block)
    return bits.t().contiguous().view(torch.float32), lost


def _in_groups(codes: torch.Tensor, size: int) -> torch.Tensor:
    """(N, K) as (N, groups, size), K padded with zeros to a multiple of 128."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % GROUP))
    return padded.unflatten(1, (-1, size))


def _words(nibbles: torch.Tensor) -> torch.Tensor:
    """Nibbles (N, K) as words (G, N, 16)."""
    halves = _in_groups(nibbles, GROUP // 2).unflatten(1, (-1, 2))  # (N, G, 2, 64)
    data = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return turned_signs(data.transpose(0, 1).contiguous().view(torch.int32))


def turned_signs(words: torch.Tensor) -> torch.Tensor:
    """Words int32 of codes, as they are stored: signs one code higher."""
    signs = words & _SIGNS
    return (words & ~_SIGNS) | (signs << 4) | ((signs >> 28) & 8)


def plain_words(words: torch.Tensor) -> torch.Tensor:
    """Words as they are stored, with every sign above its own magnitude."""
    signs = words & _SIGNS
    return (words & ~_SIGNS) | ((signs >> 4) & 0x0FFFFFFF) | (signs << 28)
