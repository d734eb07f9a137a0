"""Tile shapes of the W4A8 GEMM for many rows: what a kernel is compiled for, and which one a problem gets."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from blockscale.ops._cuda.configs import (
    BLOCK_K,
    KINDS,
    MAX_STAGES,
    SHARED_BYTES,
    Kind,
    constants,
    exchanged_registers,
    wgmma_header,
)

WORD_BYTES = BLOCK_K // 2  # of the codes of a row in a stage


@dataclass(frozen=True)
class W4Tile:
    """A tile of `rows` rows of a by 64 * warpgroups * waves rows of w; `w4a8_gemm.cu` explains the terms.

    Attributes:
        rows: rows of a in a tile, 32, 64 or 128: they must divide the 128 of a contiguous segment.
        warpgroups: math warpgroups of a block.
        waves: times 64 rows of w that a warpgroup computes, 1 or 2.
        cluster: blocks that load the rows of a together, 1 or 2.
        occupancy: blocks on a multiprocessor.
        band: tiles of M after which the order of tiles moves on along N.
        unit: rows of a in a product, 32, and left out if none of them counts (`w4a8_units.cuh`); 0 for halves
            of the tile (`w4a8_multiply.cuh`).
    """

    rows: int = 128
    warpgroups: int = 2
    waves: int = 2
    cluster: int = 1
    occupancy: int = 1
    band: int = 8
    unit: int = 0

    @property
    def block_n(self) -> int:
        """Rows of w in a tile."""
        return 64 * self.warpgroups * self.waves

    @property
    def super_tile(self) -> tuple[int, int]:
        """Rows and columns of out that a cluster computes."""
        return self.rows, self.block_n * self.cluster

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (self.warpgroups + 1)

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage: rows of a, words, the scales of both and two barriers."""
        return self.rows * (BLOCK_K + 4) + self.block_n * (WORD_BYTES + 4) + 16

    def _fixed_bytes(self, out_float32: bool) -> int:
        """Shared memory besides the stages: the part of out that is staged, all of a bfloat16 tile."""
        waves, size = (1, 4) if out_float32 else (self.waves, 2)
        return self.warpgroups * waves * 64 * self.rows * size

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
        return exchanged_registers(self.warpgroups, self.occupancy, 24)

    @property
    def boxes(self) -> tuple[int, int]:
        """Rows of a and of w that one copy brings."""
        return self.unit or self.rows // self.cluster, self.block_n

    def sources(
        self, kind: Kind, *, out_float32: bool, bias: int, mxfp4: bool = False
    ) -> tuple[str, dict[str, str]]:
        """Source file of the kernel and its generated headers; bias: 0 none, 1 bfloat16, 2 float32."""
        math_registers, feed_registers = self.registers
        values = {
            "BM": self.rows, "WGS": self.warpgroups, "WAVES": self.waves, "STAGES": self.stages(out_float32),
            "CLUSTER": self.cluster, "OCCUPANCY": self.occupancy, "GROUP": self.band,
            "KIND": KINDS.index(kind), "BIAS": bias, "OUT_F32": out_float32, "MXFP4": mxfp4,
            "UNIT": self.unit,
            "MATH_REGISTERS": math_registers, "FEED_REGISTERS": feed_registers,
        }  # fmt: skip
        headers = {
            "config.cuh": constants(values) + f"#define W4A8_UNITS {int(self.unit > 0)}\n",
            "wgmma.cuh": wgmma_header(self.unit or self.rows // 2, a_registers=True),
        }
        return "w4a8_gemm.cu", headers


# For grouped products of many rows.
_GROUPED = W4Tile(cluster=2)
# For contiguous rows of which few may count, which the host cannot know: experts with one segment each, or
# with what `moe_permute` reserves, 127 rows an expert beside those of its tokens.
_ONE_SEGMENT = W4Tile(unit=32)
_FEW_ROWS = 160  # an expert: up to 33 tokens of each in what `moe_permute` makes
# For dense products, the smallest tile first.
_DENSE = (
    W4Tile(rows=32, warpgroups=1, waves=1),
    W4Tile(rows=64, warpgroups=1, waves=1),
    W4Tile(rows=64, waves=1),
    W4Tile(waves=1),
    W4Tile(),
)


@functools.cache
def choose(kind: Kind, sizes: tuple[int, int, int], experts: int, processors: int) -> W4Tile:
    """The tile for sizes (M, N, K), M counted in rows of one expert if masked.

    By what measured fastest on an H100 and an H200: masked experts of up to 64 rows take tiles of as many;
    contiguous rows of few tokens an expert, tiles that leave out 32 rows at a time; dense products take the
    smallest tile of which every multiprocessor has one at most, and the largest if there is none.
    """
    m, n, _ = sizes
    if kind == "masked":
        return W4Tile(rows=64) if m <= 64 else _GROUPED
    if kind == "contiguous":
        return _ONE_SEGMENT if m <= _FEW_ROWS * experts else _GROUPED
    for tile in _DENSE:
        rows, columns = tile.super_tile
        if math.ceil(m / rows) * math.ceil(n / columns) <= processors:
            return tile
    return _DENSE[-1]
