"""Tile shapes of the FP8 GEMM: what a kernel is compiled for, and which one a problem gets.

A configuration is everything `fp8_gemm.cu` (many rows: `Tile`) or `fp8_gemm_few.cu` (few rows: `FewTile`)
wants to know at compile time; problem sizes are run-time arguments, so a new shape compiles nothing unless it
wants a new tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["dense", "contiguous", "masked"]
KINDS: tuple[Kind, ...] = ("dense", "contiguous", "masked")
BLOCK_K = 128
SHARED_BYTES = {1: 232448, 2: 115712}  # of a block, by blocks per multiprocessor
MAX_STAGES = 8
MOST_EXPERTS = 512  # of masked few rows, whose counts a block keeps


@dataclass(frozen=True)
class Tile:
    """A tile of block_m rows by block_n columns; the terms are explained in `fp8_gemm.cu`.

    Attributes:
        block_n: columns of a tile, a multiple of 16 (of 32 if side) up to 256.
        warpgroups: math warpgroups of a block.
        waves: times 64 rows that a warpgroup computes, 1 or 2.
        side: warpgroups divide the columns rather than the rows.
        share: operand that a cluster of two blocks loads together, or "" for no cluster.
        occupancy: blocks on a multiprocessor.
        band: tiles of M after which the order of tiles moves on along N.
    """

    block_n: int
    warpgroups: int = 2
    waves: int = 1
    side: bool = False
    share: Literal["", "a", "b"] = ""
    occupancy: int = 1
    band: int = 8

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return 64 * self.waves * (1 if self.side else self.warpgroups)

    @property
    def unit_n(self) -> int:
        """Columns of a warpgroup."""
        return self.block_n // (self.warpgroups if self.side else 1)

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 2 if self.share else 1

    @property
    def super_tile(self) -> tuple[int, int]:
        """Rows and columns that a cluster computes."""
        return (
            self.block_m * (2 if self.share == "b" else 1),
            self.block_n * (2 if self.share == "a" else 1),
        )

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (self.warpgroups + 1)

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage: both operands, the activation and weight scales and two barriers."""
        return (self.block_m + self.block_n) * BLOCK_K + self.block_m * 4 + 16 + 16

    def _fixed_bytes(self, out_float32: bool) -> int:
        """Shared memory besides the stages: the rows of out that are staged, all of a bfloat16 tile."""
        waves, size = (1, 4) if out_float32 else (self.waves, 2)
        return self.warpgroups * waves * 64 * self.unit_n * size

    def stages(self, out_float32: bool) -> int:
        """Stages that fit."""
        free = SHARED_BYTES[self.occupancy] - self._fixed_bytes(out_float32)
        return min(MAX_STAGES, free // self.stage_bytes)

    def shared_bytes(self, out_float32: bool) -> int:
        """Dynamic shared memory of a block."""
        return self._fixed_bytes(out_float32) + self.stages(out_float32) * self.stage_bytes

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a math and of a feeding thread after the exchange."""
        return exchanged_registers(self.warpgroups, self.occupancy, 40)

    @property
    def boxes(self) -> tuple[int, int, int]:
        """Rows of a, of b and of a_scale that one copy brings."""
        halves = self.block_m // 2, self.block_n // 2
        return (
            halves[0] if self.share == "a" else self.block_m,
            halves[1] if self.share == "b" else self.block_n,
            self.block_m,
        )

    def line_bytes(self, out_float32: bool) -> int:
        """Bytes of a row of the boxes in which out is stored, 64 rows high: a width of the swizzle."""
        row = self.unit_n * (4 if out_float32 else 2)
        return next(width for width in (128, 64, 32) if row % width == 0)

    def sources(self, kind: Kind, *, out_float32: bool, bias: int) -> tuple[str, dict[str, str]]:
        """Source file of the kernel and its generated headers; bias: 0 none, 1 bfloat16, 2 float32."""
        math_registers, feed_registers = self.registers
        values = {
            "BN": self.block_n, "WGS": self.warpgroups, "WAVES": self.waves, "SIDE": self.side,
            "STAGES": self.stages(out_float32), "CLUSTER": self.cluster, "OCCUPANCY": self.occupancy,
            "GROUP": self.band, "KIND": KINDS.index(kind), "BIAS": bias, "OUT_F32": out_float32,
            "MATH_REGISTERS": math_registers, "FEED_REGISTERS": feed_registers,
            "SHARE_A": self.share == "a", "LINE_BYTES": self.line_bytes(out_float32),
        }  # fmt: skip
        headers = {
            "config.cuh": constants(values),
            "wgmma.cuh": wgmma_header(self.unit_n),
        }
        return "fp8_gemm.cu", headers


@dataclass(frozen=True)
class FewTile:
    """A tile of 64 * warpgroups * waves rows of b by `rows` rows of a; see `fp8_gemm_few.cu`.

    Attributes:
        rows: rows of a in a tile, 8 to 128 in steps of 8.
        warpgroups: math warpgroups of a block.
        waves: times 64 rows of b that a warpgroup computes, 1 or 2.
        splits: blocks of a cluster, which divide K among them; a power of two up to 8.
        occupancy: blocks on a multiprocessor.
    """

    rows: int
    warpgroups: int = 1
    waves: int = 2
    splits: int = 1
    occupancy: int = 2

    @property
    def block_n(self) -> int:
        """Rows of b in a tile."""
        return 64 * self.warpgroups * self.waves

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.splits

    @property
    def super_tile(self) -> tuple[int, int]:
        """Rows and columns of out that a cluster computes."""
        return self.rows, self.block_n

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.warpgroups + 32

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage: both operands, the activation scales and two barriers."""
        return (self.rows + self.block_n) * BLOCK_K + max(128, self.rows * 4) + 16

    @property
    def _fixed_bytes(self) -> int:
        """Shared memory besides the stages: the staged tile, always float32, two barriers, experts' rows."""
        return self.rows * (self.block_n + 4) * 4 + 16 + MOST_EXPERTS * 8

    def stages(self, out_float32: bool) -> int:
        """Stages that fit."""
        return min(MAX_STAGES, (SHARED_BYTES[self.occupancy] - self._fixed_bytes) // self.stage_bytes)

    def shared_bytes(self, out_float32: bool) -> int:
        """Dynamic shared memory of a block."""
        return self._fixed_bytes + self.stages(out_float32) * self.stage_bytes

    @property
    def boxes(self) -> tuple[int, int, int]:
        """Rows of a, of b and of a_scale that one copy brings."""
        return self.rows, self.block_n, self.rows

    def sources(self, kind: Kind, *, out_float32: bool, bias: int) -> tuple[str, dict[str, str]]:
        """Source file of the kernel and its generated headers; bias: 0 none, 1 bfloat16, 2 float32."""
        values = {
            "BT": self.rows, "WGS": self.warpgroups, "WAVES": self.waves, "SPLITS": self.splits,
            "STAGES": self.stages(out_float32), "OCCUPANCY": self.occupancy,
            "KIND": KINDS.index(kind), "BIAS": bias, "OUT_F32": out_float32, "MOST_EXPERTS": MOST_EXPERTS,
        }  # fmt: skip
        return "fp8_gemm_few.cu", {"config.cuh": constants(values), "wgmma.cuh": wgmma_header(self.rows)}


AnyTile = Tile | FewTile


def takes(tile: AnyTile, kind: Kind, experts: int) -> bool:
    """Whether a tile can be used for so many experts: tuning tables do not know their number."""
    return kind != "masked" or isinstance(tile, Tile) or experts <= MOST_EXPERTS


def exchanged_registers(warpgroups: int, occupancy: int, feed: int) -> tuple[int, int]:
    """Registers of a math thread, of so many warpgroups and one that feeds them, and of a feeding one."""
    launch = 65536 // (128 * (warpgroups + 1) * occupancy) // 8 * 8  # what a thread starts with
    math_registers = (launch * (warpgroups + 1) - feed) // warpgroups // 8 * 8
    return min(math_registers, 240), feed


def constants(values: Mapping[str, int | bool]) -> str:
    lines = ["#pragma once"]
    for name, value in values.items():
        if isinstance(value, bool):
            lines.append(f"constexpr bool {name} = {str(value).lower()};")
        else:
            lines.append(f"constexpr int {name} = {value};")
    return "\n".join(lines) + "\n"


def wgmma_header(n: int, *, a_registers: bool = False) -> str:
    """The text of wgmma.cuh: the instruction that adds 64 x n products over 32 of K to n / 2 registers.

    The first operand lies in shared memory, or in four registers of every thread.
    """
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3"
    names, given, kind = f"%{count}", '"l"(a)', "unsigned long long a"
    if a_registers:
        names = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        given, kind = ", ".join(f'"r"(a[{i}])' for i in range(4)), "const unsigned int (&a)[4]"
    b = count + (4 if a_registers else 1)
    return f"""#pragma once
template <int ACCUMULATE>
__device__ __forceinline__ void wgmma(float (&d)[{count}], {kind}, unsigned long long b) {{
  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{b + 1}, 0;\\n"
      "{instruction} {{{registers}}}, {names}, %{b}, p, 1, 1;\\n}}"
      : {operands}
      : {given}, "l"(b), "n"(ACCUMULATE));
}}
"""


_FEW_ROWS = 128
_SHORT_K = 1536  # up to which clusters that share b measured faster, by up to 8 %
_SWAPPED_ROWS = 32  # up to which weights on the long side of the tensor cores' instruction measured faster

# Among these the heuristic picks by rounds of tiles.
_DENSE = (
    *(Tile(n, share="b") for n in (96, 112, 128, 144, 160, 176, 192)),
    *(Tile(n, waves=2, share="a") for n in (96, 112, 128)),
    Tile(256, waves=2, side=True, share="b"),
)
# Rows of different experts share no weights, so clusters share activations; a tile has one expert's 128 rows.
_GROUPED = (
    *(Tile(n, share="a") for n in (64, 96, 128, 160, 192)),
    Tile(256, waves=2, side=True, share="a"),
    Tile(256, waves=2, side=True),
)


def cycles(tile: Tile, supers: int, steps: int, processors: int) -> float:
    """Estimated clock cycles of a problem: rounds of tiles, of 128 of K a step.

    A step takes its products and the promotions that nothing hides, as measured on an H100: less where a
    warpgroup computes two waves, more where a tile meets changing rows of weight scales. Stores are hidden.
    """
    products = tile.block_m * tile.block_n / 32
    exposed = 190 - 40 * (tile.waves - 1) + (70 if tile.unit_n % 64 else 0)
    rounds = math.ceil(supers / (processors * tile.occupancy // tile.cluster))
    return rounds * steps * (products + exposed) * tile.occupancy


@functools.cache
def choose(kind: Kind, sizes: tuple[int, int, int], experts: int, processors: int) -> AnyTile:
    """The tile for sizes (M, N, K), M counted in rows of one expert if masked."""
    m, n, k = sizes
    if m <= _FEW_ROWS and kind == "dense":
        return _choose_few(m, n, processors)
    if m <= _FEW_ROWS and kind == "masked" and experts <= MOST_EXPERTS:
        rows = _padded(m)  # experts fill the machine by themselves, the more evenly the smaller tiles are
        return FewTile(rows, waves=1) if rows <= 64 else FewTile(rows, warpgroups=2, waves=1, occupancy=1)

    def cost(tile: Tile) -> float:
        rows, columns = tile.super_tile
        supers = math.ceil(m / rows) * math.ceil(n / columns) * (experts if kind == "masked" else 1)
        return cycles(tile, supers, math.ceil(k / BLOCK_K), processors)

    tile = min(_DENSE if kind == "dense" else _GROUPED, key=cost)
    if kind == "dense" and tile.share == "a" and k <= _SHORT_K:
        return replace(tile, share="b")
    return tile


def _padded(rows: int) -> int:
    return max(8, 1 << (rows - 1).bit_length())


def _choose_few(m: int, n: int, processors: int) -> AnyTile:
    """A block for about every multiprocessor, by what measured fastest on an H100.

    Few rows of a are the short side of the product, and K is divided where tiles of 64 rows of b are too few
    blocks. More rows are the long side, and tiles get narrow instead.
    """
    busy = 0.75 * processors
    rows = _padded(m)
    if m > _SWAPPED_ROWS:
        for width in (64, 32):
            if math.ceil(n / width) >= busy:
                return Tile(width, warpgroups=rows // 64)
    if m > 64:
        return Tile(32, warpgroups=1, share="b")
    tile = FewTile(rows, waves=1)
    tiles, splits = math.ceil(n / tile.block_n), 1
    while splits < 8 and tiles * splits < (processors // 2 if m <= _SWAPPED_ROWS else busy):
        splits *= 2
    return replace(tile, splits=splits)
