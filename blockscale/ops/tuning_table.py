"""Measured choices: which backend, and which tile of the CUDA kernels, a GEMM of some size gets on some GPU.

A table is a file of JSON lines for one GPU. The first line says so,

    {"format": "blockscale tuning table", "version": 1, "gpu": "NVIDIA H100 80GB HBM3"}

and every other one is an entry for (operator, N, K, bucket of M): the choice, what was measured, when and
with which versions. Buckets of M are powers of two; M is looked up in the smallest one that is not less: rows
of a dense product, rows in all of a contiguous one, rows expected of an expert of a masked one.

`find_choice` looks into the user's table (`blockscale tune` writes it), then into the one shipped with the
package (`tables/`); what neither knows is left to the heuristics. Files are read at the first call for a GPU;
a damaged one is passed over then, said once in the log.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from blockscale.errors import BlockscaleError
from blockscale.ops._cuda.configs import AnyTile, FewTile, Tile
from blockscale.paths import replace_file, tuning_folder

SHIPPED = Path(__file__).parent / "tables"
OPERATORS = ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked")
BACKENDS = ("cuda", "triton", "cublas")  # worth measuring
_FORMAT, _VERSION = "blockscale tuning table", 1
_TILES: dict[str, type[AnyTile]] = {"Tile": Tile, "FewTile": FewTile}
_MIN_STAGES = 2  # of shared memory: with one, a kernel could not load while it multiplies
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A backend, and the tile of its kernel if the backend is "cuda" (None: the one its heuristic picks)."""

    backend: str
    tile: AnyTile | None = None

    def __str__(self) -> str:
        if self.tile is None:
            return self.backend
        values = {field: getattr(self.tile, field.name) for field in fields(self.tile)}
        given = [f"{field.name}={value!r}" for field, value in values.items() if value != field.default]
        return f"{self.backend} {type(self.tile).__name__}({', '.join(given)})"


@dataclass(frozen=True)
class Key:
    """What is looked up: operator, N, K, and M as a power of two."""

    op: str
    n: int
    k: int
    m: int


@dataclass(frozen=True)
class Entry:
    """What was measured for a key.

    Attributes:
        choice: the fastest.
        microseconds: of the choice.
        heuristic_microseconds: of what the heuristics would have chosen.
        date: day of the measurement, as 2026-01-31.
        versions: of blockscale and what it ran on, in words.
    """

    choice: Choice
    microseconds: float
    heuristic_microseconds: float
    date: str
    versions: str


Table = dict[Key, Entry]


def bucket(m: int) -> int:
    """The smallest power of two that is at least `m`."""
    return 1 << max(0, m - 1).bit_length()


def find_choice(op: str, device: torch.device, sizes: tuple[int, int, int]) -> Choice | None:
    """What the tables say for an operator on a GPU at sizes (M, N, K), or None; measures nothing."""
    m, n, k = sizes
    return _choices(device).get((op, n, k, bucket(m)))


def table_file(gpu: str) -> Path:
    """The user's table for a GPU, by the name torch gives it."""
    return tuning_folder() / file_name(gpu)


def file_name(gpu: str) -> str:
    """`nvidia-h100-80gb-hbm3.jsonl` for "NVIDIA H100 80GB HBM3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".jsonl"


def read_table(path: Path, gpu: str) -> Table:
    """The entries of a table; none if there is no such file.

    Raises:
        BlockscaleError: the file cannot be read, is damaged (the line is named), or is for another GPU.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise BlockscaleError("tuning table cannot be read", where=path, got=repr(error)) from error
    table: Table = {}
    for number, line in enumerate(lines or [""], 1):
        try:
            record = json.loads(line)
            if number == 1:
                _check_header(record, gpu)
            else:
                table.update([_parse(record)])
        except (ValueError, TypeError, KeyError) as error:
            raise BlockscaleError(
                f"damaged tuning table: {_told(error)}",
                where=f"{path}:{number}",
                remedy="remove the file and run blockscale tune again",
            ) from error
    return table


def write_table(path: Path, gpu: str, table: Table) -> None:
    """Write a table in place of the one that is there, at once or not at all.

    Raises:
        BlockscaleError: the file cannot be written.
    """
    header = {"format": _FORMAT, "version": _VERSION, "gpu": gpu}
    entries = sorted(table.items(), key=lambda item: (item[0].op, item[0].n, item[0].k, item[0].m))
    lines = [json.dumps(each) for each in (header, *(_record(*item) for item in entries))]
    try:
        replace_file(path, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise BlockscaleError("tuning table cannot be written", where=path, got=repr(error)) from error


@functools.cache
def _choices(device: torch.device) -> Mapping[tuple[str, int, int, int], Choice]:
    """The choices for a GPU, by operator, N, K and bucket of M."""
    gpu = torch.cuda.get_device_name(device)
    found: dict[tuple[str, int, int, int], Choice] = {}
    for path in (SHIPPED / file_name(gpu), table_file(gpu)):
        try:
            table = read_table(path, gpu)
        except BlockscaleError as error:
            _say_once(f"{error}; this run goes on without it")
            continue
        found |= {(key.op, key.n, key.k, key.m): entry.choice for key, entry in table.items()}
    return found


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning("%s", message)


def _record(key: Key, entry: Entry) -> dict[str, Any]:
    tile = entry.choice.tile
    choice: dict[str, Any] = {"backend": entry.choice.backend}
    if tile is not None:
        choice["tile"] = {"form": type(tile).__name__, **asdict(tile)}
    measured = {"us": round(entry.microseconds, 3), "heuristic_us": round(entry.heuristic_microseconds, 3)}
    return {**asdict(key), **choice, **measured, "date": entry.date, "versions": entry.versions}


def _check_header(record: Any, gpu: str) -> None:
    expected = {"format": _FORMAT, "version": _VERSION, "gpu": gpu}
    for name, value in expected.items():
        if not isinstance(record, dict) or record.get(name) != value:
            raise ValueError(f"expected {json.dumps(expected)}")


def _parse(record: Any) -> tuple[Key, Entry]:
    key = Key(*(_typed(record, name, int if name != "op" else str) for name in ("op", "n", "k", "m")))
    if key.op not in OPERATORS or min(key.n, key.k) < 1 or key.m != bucket(key.m):
        raise ValueError(f"senseless key {key}")
    choice = Choice(_typed(record, "backend", str), _parse_tile(record.get("tile")))
    fits = choice.tile is None or (choice.backend == "cuda" and is_sound(choice.tile, key.op))
    if choice.backend not in (*BACKENDS, "dequantized") or not fits:
        raise ValueError(f"no kernel of {key.op} can be {choice}")
    us, heuristic_us = (float(_typed(record, name, (int, float))) for name in ("us", "heuristic_us"))
    return key, Entry(choice, us, heuristic_us, _typed(record, "date", str), _typed(record, "versions", str))


def _typed(record: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"senseless {name} {value!r}")
    return value


def _parse_tile(record: Any) -> AnyTile | None:
    """The tile of a record, if it has one."""
    if record is None:
        return None
    given = dict(record)
    cls = _TILES[given.pop("form")]
    hints = typing.get_type_hints(cls)
    wrong = [name for name, value in given.items() if name not in hints or not _fits(value, hints[name])]
    if wrong:
        raise ValueError(f"senseless {wrong[0]} {given[wrong[0]]!r} of a tile")
    return cls(**given)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type that an attribute of a tile is declared with."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    return type(value) is hint


def is_sound(tile: AnyTile, op: str) -> bool:
    """Whether an operator has a kernel of this tile that fits a multiprocessor, for any type of result."""
    if tile.occupancy not in (1, 2) or tile.waves not in (1, 2) or not 1 <= tile.warpgroups <= 3:
        return False
    if isinstance(tile, FewTile):
        fits = tile.rows in range(8, 129, 8) and tile.splits in (1, 2, 4, 8)
        fits = fits and op != "m_grouped_fp8_gemm_nt_contiguous"
    else:
        # Cuts of 16 columns; the tensor cores take 256 at most, and a thread's registers 256 sums.
        fits = tile.unit_n in range(16, 257, 16) and tile.block_n <= 256 and tile.band > 0
        fits = fits and tile.unit_n * tile.waves <= 256
        # Rows of different experts share no weights; of contiguous ones, 128 together have one expert.
        fits = fits and (op == "fp8_gemm_nt" or tile.share != "b")
        fits = fits and (op != "m_grouped_fp8_gemm_nt_contiguous" or 128 % tile.block_m == 0)
    return fits and min(tile.stages(False), tile.stages(True)) >= _MIN_STAGES


def _told(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "not a line of JSON"
    return f"no {error}" if isinstance(error, KeyError) else str(error)
