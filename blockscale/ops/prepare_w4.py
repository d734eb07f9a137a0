"""Prepare four-bit weights: the fast form of `blockscale.reference.prepare_w4`, bit for bit.

Eight codes at a time, as the words that hold them, without a temporary wider than the codes:

    INT4     s = sign bits, o = s >> 3:  (word ^ 7 o) + o      negates magnitudes of negative codes, no carry
    MXFP4    word ^ (o where bits 1 and 2 of a code are zero)  0 and 0.5 change places

It is plain PyTorch, so it runs where the weight is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from blockscale import reference
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.reference import W4Weight, w4

_ONES, _SIGNS = 0x11111111, 0x88888888 - (1 << 32)  # of every code in a word, as int32
_MAGNITUDES, _LOW, _HIGH = 0x77777777, 0x0F0F0F0F, 0xF0F0F0F0 - (1 << 32)
_GROUP_BYTES = w4.GROUP // 2


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
    w4.check_preparable(packed, scale, fmt, width)
    *lead, n, size = packed.shape
    experts, groups = math.prod(lead), math.ceil(width / w4.GROUP)
    words = torch.empty((experts, groups, n, 16), dtype=torch.int32, device=packed.device)
    scales = torch.empty((experts, groups, n), device=packed.device)
    one = _mxfp4 if isinstance(fmt, MXFP4) else _int4
    pairs = zip(packed.reshape(-1, n, size), scale.reshape(-1, n, scale.shape[-1]), strict=True)
    for expert, (codes, each) in enumerate(pairs):
        found = one(_whole_groups(codes, width), each)
        if found is None:
            rest = reference.prepare_w4(codes, each, fmt, width)
            words[expert], scales[expert] = rest.words, rest.scale
        else:
            _put(found[0], words[expert])
            scales[expert] = found[1]
    kind: w4.Kind = "mxfp4" if isinstance(fmt, MXFP4) else "int4"
    return W4Weight(words.view(*lead, groups, n, 16), scales.view(*lead, groups, n), width, kind)


def _whole_groups(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Bytes (N, ceil(K / 2)) as words int32 (N, 16 G), zeros past column K."""
    padded = F.pad(codes, (0, -codes.shape[1] % _GROUP_BYTES)).contiguous()
    if width % 2:
        padded[:, width // 2] &= 15
    return padded.view(torch.int32)


def _int4(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two's complement as sign and magnitude, and scales (G, N)."""
    flipped = codes ^ _SIGNS  # a code of -8 is now zero
    if bool(((flipped - _ONES) & ~flipped & _SIGNS).any()):
        w4.refuse_minus_eight()
    negative = (codes >> 3) & _ONES
    return (codes ^ (negative * 7)) + negative, w4.int4_scale(scale)


def _mxfp4(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes with 0 and 0.5 swapped, and scales (G, N); None where some have to be rounded."""
    used = (codes & _MAGNITUDES).unflatten(1, (-1, 4)).any(-1)  # (N, 4 G)
    folded, lost = w4.fold_scales(used, scale)
    if bool(lost.any()):
        return None
    return codes ^ (~((codes >> 1) | (codes >> 2)) & _ONES), folded


def _put(codes: torch.Tensor, words: torch.Tensor) -> None:
    """Codes (N, 16 G), in order of K, into words (G, N, 16): k beside 64 + k in a byte, signs moved."""
    first, second = codes.view(len(codes), -1, 2, 8).transpose(0, 1).unbind(2)  # (G, N, 8): halves of a group
    even = (first & _LOW) | ((second & _LOW) << 4)
    odd = ((first >> 4) & _LOW) | (second & _HIGH)
    pairs = words.view(torch.uint8).unflatten(-1, (32, 2))
    pairs[..., 0], pairs[..., 1] = even.view(torch.uint8), odd.view(torch.uint8)
    words.copy_(w4.turned_signs(words))
