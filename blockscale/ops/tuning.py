"""What `blockscale tune` measures: the cases (operator, sizes, experts), and the candidates for each.

Candidates are what the heuristics choose, the other backends, and a modest list of tiles of the CUDA kernels.
How they are measured is in `tuning_problem`, what is made of it in `tuning_run`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from blockscale.errors import BlockscaleError
from blockscale.ops import gemm_dispatch
from blockscale.ops._cuda.configs import BLOCK_K, AnyTile, FewTile, Kind, Tile, choose
from blockscale.ops.gemm_dispatch import Op
from blockscale.ops.tuning_table import BACKENDS, Choice, Key, bucket, is_sound

KINDS: dict[Op, Kind] = {
    "fp8_gemm_nt": "dense",
    "m_grouped_fp8_gemm_nt_contiguous": "contiguous",
    "m_grouped_fp8_gemm_nt_masked": "masked",
}
_FEW_ROWS = 128
_MIN_STAGES = 3  # of shared memory: with fewer, the tensor cores wait for it
# M of the grouped forms: few rows an expert are decoding, rows in all of a contiguous product are prefilling.
_MASKED_MOST, _CONTIGUOUS_LEAST = 128, 1024


@dataclass(frozen=True)
class Case:
    """A GEMM to tune: operator, sizes (M, N, K) with M a power of two, experts on this GPU (1 if dense)."""

    op: Op
    sizes: tuple[int, int, int]
    experts: int = 1

    @property
    def key(self) -> Key:
        """Its place in a table."""
        m, n, k = self.sizes
        return Key(self.op, n, k, bucket(m))


def cases(
    dense: Iterable[tuple[int, int]],
    grouped: Iterable[tuple[int, int]],
    experts: int,
    rows: Iterable[int],
) -> tuple[Case, ...]:
    """A case for every weight (N, K) and bucket of `rows`; `grouped` are the weights of one of the experts.

    Raises:
        BlockscaleError: a size that no kernel takes, or nothing to tune.
    """
    buckets = sorted({bucket(m) for m in rows})
    found: list[Case] = []
    dense, grouped = tuple(dense), tuple(grouped)
    for n, k in (*dense, *grouped):
        if min(n, k) < 1 or n % 16 or k % 16:
            expected = "N and K multiples of 16"
            raise BlockscaleError("no FP8 GEMM has this size", expected=expected, got=f"N = {n}, K = {k}")
    found += [Case("fp8_gemm_nt", (m, n, k)) for n, k in dense for m in buckets]
    for n, k in grouped:
        masked = [m for m in buckets if m <= _MASKED_MOST]
        contiguous = [m for m in buckets if m >= _CONTIGUOUS_LEAST]
        found += [Case("m_grouped_fp8_gemm_nt_masked", (m, n, k), experts) for m in masked]
        found += [Case("m_grouped_fp8_gemm_nt_contiguous", (m, n, k), experts) for m in contiguous]
    if not found:
        expected = f"M up to {_MASKED_MOST} (masked) or from {_CONTIGUOUS_LEAST} on (contiguous)"
        raise BlockscaleError(
            "no product to tune", expected=expected if grouped else "FP8 weights", got=buckets
        )
    return tuple(dict.fromkeys(found))


def candidates(case: Case, device: torch.device) -> tuple[Choice, ...]:
    """What could run a case on a GPU: the heuristics' choice first, then every other."""
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = candidate_tiles(case, processors)
    first, _ = gemm_dispatch.heuristic(case.op, device)
    found = [Choice(first, tiles[0] if first == "cuda" else None)]
    for backend in gemm_dispatch.available(case.op, device, BACKENDS):
        found += [Choice(backend, tile) for tile in tiles] if backend == "cuda" else [Choice(backend)]
    return tuple(dict.fromkeys(found))


def candidate_tiles(case: Case, processors: int) -> tuple[AnyTile, ...]:
    """Tiles of the CUDA kernels worth measuring; the first is the one that their own heuristic picks."""
    kind, sizes, experts, m = KINDS[case.op], case.sizes, case.experts, case.sizes[0]
    own = choose(kind, sizes, experts, processors)
    found: list[AnyTile] = [own]
    if kind != "contiguous" and m <= _FEW_ROWS:
        found += _few_tiles(sizes, experts, processors)
        found += _narrow_tiles(sizes, experts, processors)
    else:
        found += _dense_tiles(m) if kind == "dense" else _grouped_tiles()
        found += [replace(own, band=band) for band in (4, 16) if isinstance(own, Tile)]
    fit = (tile for tile in found if is_sound(tile, case.op) and tile.stages(False) >= _MIN_STAGES)
    return tuple(dict.fromkeys((own, *fit)))


def _few_tiles(sizes: tuple[int, int, int], experts: int, processors: int) -> Iterator[AnyTile]:
    """K divided in as many ways as give the machine work and not much more of it."""
    m, n, k = sizes
    rows = max(8, bucket(m))
    shapes = [FewTile(rows, waves=1), FewTile(rows, waves=2)]
    shapes += [FewTile(rows, warpgroups=2, waves=1, occupancy=1)] if rows >= 64 else []
    for tile in shapes:
        for splits in (1, 2, 4, 8):
            blocks = experts * math.ceil(n / tile.block_n) * splits
            if splits == 1 or (blocks <= 4 * processors and splits <= math.ceil(k / BLOCK_K)):
                yield replace(tile, splits=splits)


def _narrow_tiles(sizes: tuple[int, int, int], experts: int, processors: int) -> Iterator[AnyTile]:
    """All rows in one tile or cluster, and columns so that about every multiprocessor gets a tile."""
    m, n, _ = sizes
    for width in (16, 32, 48, 64, 96, 128, 160, 192):
        tiles = experts * math.ceil(n / width)
        if experts == 1 and (tiles > 4 * processors or (tiles < processors // 2 and width > 32)):
            continue
        for occupancy in (1, 2):
            if m <= 64:
                yield Tile(width, warpgroups=1, occupancy=occupancy)
                if width % 32 == 0:
                    yield Tile(width, side=True, occupancy=occupancy)
            else:
                yield Tile(width, occupancy=occupancy)
                yield Tile(width, warpgroups=1, waves=2, occupancy=occupancy)
                if experts == 1:
                    yield Tile(width, warpgroups=1, share="b", occupancy=occupancy)


def _dense_tiles(m: int) -> Iterator[AnyTile]:
    """Tiles that read little shared memory a product, and clusters that read little of the L2 cache."""
    tiles = [Tile(width, share="b") for width in (64, 96, 112, 128, 144, 160, 176, 192)]
    tiles += [Tile(width, waves=2, share="a") for width in (96, 112, 128)]
    tiles += [Tile(128, waves=2, share="b"), Tile(256, waves=2, side=True, share="b")]
    tiles += [Tile(128, warpgroups=3), Tile(128, warpgroups=3, share="a"), Tile(128, warpgroups=3, share="b")]
    tiles += [Tile(64), Tile(128), Tile(192)]
    return (tile for tile in tiles if tile.super_tile[0] < 2 * m)


def _grouped_tiles() -> Iterator[AnyTile]:
    """128 rows, which belong to one expert; experts share no weights, so clusters share activations."""
    for width in (64, 96, 128, 160, 176, 192):
        yield Tile(width)
        yield Tile(width, share="a")
    yield Tile(256, waves=2, side=True)
    yield Tile(256, waves=2, side=True, share="a")
