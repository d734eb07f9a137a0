"""Which block size is worth its scales: the criterion of `--block-size auto`, over figures of weights.

With w_o the weights of output channel o (a row of (N, K)) and e_o their error after quantization in blocks of
size b, and B(b) the bytes of the scales of n weights, as stored (4 a block in both scale formats):

    noise(b) = mean over o of |e_o|^2 / |w_o|^2      relative noise power of an output, for white inputs
    bits(b)  = 8 B(b) / n                            bits of scales a weight
    cost(b)  = noise(b) * 4^bits(b)

The size of least cost is chosen among 128x128 and those whose noise is `MIN_GAIN_DB` (0.5 dB) or more below
that of 128x128; of equal ones the one with fewer scales. The cost says that a bit spent on scales has to buy
what a bit of mantissa does, 6.02 dB: against 128x128, 64x64 has to gain 0.04 dB, 32x32 0.18 dB, and 1x128
1.49 dB. The least gain keeps differences out that are chance (0.05 dB in a matrix of 576 x 192) or of no use:
blocks other than 128x128 run on few engines. Several tensors that must agree count as one, weighted by size.

E4M3 is a floating format: a scale moves the window of 2^-9 ... 448, not the relative error in it, which is
-31.5 dB for any smooth distribution. Finer blocks gain where a block's values leave that window, or where its
largest value, which a float32 scale maps to a code exactly, holds much of the power. Scales that are
powers of two (ue8m0) do not even do the latter: there all sizes give the same error but for the former.

Source of 6.02 dB a bit: rate distortion at high rate, D ~ 2^(-2 R) (Gersho and Gray, 1992, section 5.6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blockscale.checkpoint.blocks import USUAL, BlockSize
from blockscale.formats import parse_block_size, spell_block_size

CANDIDATES: tuple[BlockSize, ...] = (USUAL, (64, 64), (32, 32), (1, 128))
MIN_GAIN_DB = 0.5


@dataclass(frozen=True)
class Measured:
    """What every candidate does to some weights.

    Attributes:
        values: how many weights.
        noise: relative noise power of an output, per candidate.
        scale_bytes: per candidate.
    """

    values: int
    noise: tuple[float, ...]
    scale_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """The block size of one tensor, why, and its own figures, by size as spelled for every candidate."""

    block_size: BlockSize
    reason: str
    values: int
    noise: dict[str, float]
    scale_bytes: dict[str, int]


@dataclass(frozen=True)
class BlockChoice:
    """The block sizes that were chosen for a plan.

    Attributes:
        plan: digest of the plan before the choice.
        tensors: by name.
    """

    plan: str
    tensors: dict[str, Chosen]

    @property
    def sizes(self) -> dict[str, BlockSize]:
        """Tensor -> size."""
        return {name: chosen.block_size for name, chosen in self.tensors.items()}

    def record(self) -> dict[str, Any]:
        """As JSON has it, and `from_record` reads it."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> BlockChoice:
        """What `record` gave, perhaps to another process."""
        tensors = {
            name: Chosen(**{**each, "block_size": parse_block_size(each["block_size"])})
            for name, each in record["tensors"].items()
        }
        return cls(record["plan"], tensors)


def choose(groups: Sequence[Mapping[str, Measured]]) -> dict[str, Chosen]:
    """The choice for every tensor; those of a group must agree.

    Args:
        groups: tensor -> figures, each tensor in one group.
    """
    chosen = {}
    for group in groups:
        place, reason = judge(together(list(group.values())))
        reason += f", taken together with {len(group) - 1} more" if len(group) > 1 else ""
        for name, one in group.items():
            spelled = [spell_block_size(size) for size in CANDIDATES]
            noise = dict(zip(spelled, one.noise, strict=True))
            scales = dict(zip(spelled, one.scale_bytes, strict=True))
            chosen[name] = Chosen(CANDIDATES[place], reason, one.values, noise, scales)
    return chosen


def together(measured: Sequence[Measured]) -> Measured:
    """The figures of several tensors as those of one."""
    values = sum(one.values for one in measured)
    noise = (
        sum(one.values * one.noise[place] for one in measured) / values for place in range(len(CANDIDATES))
    )
    scales = (sum(one.scale_bytes[place] for one in measured) for place in range(len(CANDIDATES)))
    return Measured(values, tuple(noise), tuple(scales))


def judge(measured: Measured) -> tuple[int, str]:
    """Which candidate is worth its scales, by its place, and why."""
    gains = [gain_db(measured, place) for place in range(len(CANDIDATES))]
    worth = [0, *(place for place, gain in enumerate(gains) if place and gain >= MIN_GAIN_DB)]
    best = min(worth, key=lambda place: (cost(measured, place), measured.scale_bytes[place]))
    told = [f"{spell_block_size(size)} {gain:.2f} dB" for size, gain in zip(CANDIDATES, gains, strict=True)]
    over = f"over {spell_block_size(USUAL)}"
    if best == 0:
        return 0, f"no finer blocks are worth their scales: {', '.join(told[1:])} {over}"
    bits = bits_of_scales(measured, best) - bits_of_scales(measured, 0)
    return best, f"{told[best]} {over} for {bits:.3f} bits a weight; {', '.join(told[1:])}"


def gain_db(measured: Measured, place: int) -> float:
    """How far the noise of a candidate is below that of 128x128, in decibels; 0 where both have none."""
    noise, usual = measured.noise[place], measured.noise[0]
    if noise == usual:
        return 0.0
    if noise == 0 or usual == 0:
        return math.inf if noise == 0 else -math.inf
    return 10 * math.log10(usual / noise)


def bits_of_scales(measured: Measured, place: int) -> float:
    """Bits of scales a weight."""
    return 8 * measured.scale_bytes[place] / measured.values


def cost(measured: Measured, place: int) -> float:
    """Noise power, with 6.02 dB added for every bit of scales a weight."""
    return measured.noise[place] * 4.0 ** bits_of_scales(measured, place)
