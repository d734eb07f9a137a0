"""Read every byte of a checkpoint back and prove that it is what it should be.

Checked are: headers, index and config.json (`problems`), SHA-256 of every tensor and file against the
manifest, scales (positive, finite, powers of two under ue8m0), codes (no NaN), and every tensor against the
source it was made from (`compare`).
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockscale import ops
from blockscale.checkpoint.compare import Side, TensorError, compare, open_side
from blockscale.checkpoint.decide import FP8, scale_of
from blockscale.checkpoint.engine import default_workers
from blockscale.checkpoint.index import TensorEntry, parse_object, read_header
from blockscale.checkpoint.inspect import scale_names, scale_value_problems
from blockscale.checkpoint.plan import MANIFEST_NAME
from blockscale.checkpoint.problems import Problem, structural_problems
from blockscale.checkpoint.progress import Progress, Silent
from blockscale.checkpoint.scales import read_scale
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.strips import Reader, chunks, open_reader, tensor_bytes
from blockscale.checkpoint.writer import drop_cached
from blockscale.errors import BlockscaleError, CorruptCheckpointError
from blockscale.formats import scaled_weight_name


@dataclass(frozen=True)
class Verification:
    """What `verify_checkpoint` found.

    Attributes:
        tensors: tensors read, all bytes of them.
        checksums: how many matched the manifest; None without a manifest.
        compared: how many were compared with the source; None without one.
        errors: per FP8 weight compared, worst first.
        calibrated: how many weights were rounded by calibration, as the manifest says.
        problems: empty if all is well.
    """

    source: str
    tensors: int
    nbytes: int
    checksums: int | None
    compared: int | None
    errors: tuple[TensorError, ...]
    calibrated: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not any(problem.severity == "error" for problem in self.problems)

    @property
    def relative_error(self) -> float | None:
        """Root mean square of the relative errors of all FP8 weights, or None."""
        if not self.errors:
            return None
        return math.sqrt(sum(error.relative**2 for error in self.errors) / len(self.errors))


def verify_checkpoint(
    dst: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Verify a checkpoint, and compare it with the one it was made from.

    Args:
        dst: folder, Hub repository id or fsspec URL to verify.
        against: the source it was converted from, in either direction.
        workers: threads; None means one a core and two more.
        progress: told of totals, bytes read and tensors finished.

    Raises:
        BlockscaleError: there is nothing to verify, or a file contradicts its header.
    """
    side = open_side(dst)
    other = open_side(against) if against is not None else None
    manifest = _read_manifest(side.source)
    quantization, problems = structural_problems(side.index, side.config)
    problems += _set_problems(side, other, manifest)
    for name in scale_names(side.index):
        try:
            problems += scale_value_problems(
                side.scale(side.index.tensors[_weight(name)]), name, quantization
            )
        except CorruptCheckpointError as error:
            problems.append(Problem("error", name, str(error)))
    for low in side.low.values():
        name = low.scale
        try:
            if name in side.index.tensors:
                read_scale(side.index.tensors[name], side.source, low.storage)
        except CorruptCheckpointError as error:
            problems.append(Problem("error", name, str(error)))
    broken = {problem.where for problem in problems}
    hashes = (manifest or {}).get("tensors", {})
    progress = progress or Silent()
    progress.start(side.index.total_size, len(side.index.tensors))
    errors: list[TensorError] = []
    with tempfile.TemporaryDirectory(prefix="blockscale-") as staging:
        for file, header in side.index.headers.items():
            with ExitStack() as stack:
                readers = _open_files(side, other, file, Path(staging), stack)

                def check(
                    entry: TensorEntry, readers: _Readers = readers
                ) -> tuple[list[Problem], TensorError | None]:
                    return _check_tensor(
                        entry, readers, (side, other), hashes.get(entry.name), broken, progress
                    )

                with ThreadPoolExecutor(workers or default_workers(), "blockscale-verify") as pool:
                    for found, deviation in pool.map(check, header.entries):
                        problems += found
                        errors += [deviation] if deviation is not None else []
    return Verification(
        source=side.source.spec,
        tensors=len(side.index.tensors),
        nbytes=side.index.total_size,
        checksums=None if manifest is None else sum(name in hashes for name in side.index.tensors),
        compared=None if other is None else len(side.holders.keys() & other.holders.keys()),
        errors=tuple(sorted(errors, key=lambda error: -error.relative)),
        calibrated=sum(name in side.calibrated for name in side.holders),
        problems=tuple(sorted(problems, key=lambda problem: problem.severity)),
    )


def verify_shard(path: Path, hashes: Mapping[str, str]) -> None:
    """Read a finished file back, from the disk and not from the page cache where that can be.

    Args:
        path: a safetensors file whose bytes are synced.
        hashes: tensor -> SHA-256 of its bytes, as they were meant to be.

    Raises:
        CorruptCheckpointError: it holds other tensors, or other bytes.
    """
    with open_reader(path) as reader:
        drop_cached(reader.fd, 0, 0)

        def read(start: int, length: int) -> bytes:
            return os.pread(reader.fd, length, start)

        entries = read_header(read, path.stat().st_size, str(path)).entries
        found = {entry.name: _hash_and_count_nan(entry, reader, Silent())[0] for entry in entries}
    wrong = sorted(name for name in found.keys() | hashes.keys() if found.get(name) != hashes.get(name))
    if wrong:
        raise CorruptCheckpointError(
            f"{len(wrong)} tensors read back are not what was written",
            where=path,
            got=wrong[0],
            remedy="check the disk, then run the same command again",
        )


_Readers = dict[tuple[str, str], Reader]


def _read_manifest(source: Source) -> dict[str, Any] | None:
    if not source.exists(MANIFEST_NAME):
        return None
    where = f"{source.spec}/{MANIFEST_NAME}"
    manifest = parse_object(source.read(MANIFEST_NAME), where)
    if not all(isinstance(manifest.get(key), dict) for key in ("files", "tensors")):
        raise CorruptCheckpointError("manifest lacks its checksums", where=where)
    return manifest


def _weight(scale: str) -> str:
    weight = scaled_weight_name(scale)
    assert weight is not None
    return weight


def _set_problems(side: Side, other: Side | None, manifest: dict[str, Any] | None) -> list[Problem]:
    """Tensors and files that are missing or too many, and files whose checksum is wrong."""
    problems = []
    names = set(side.index.tensors)
    if manifest is not None:
        problems += [
            Problem("error", name, "is in the manifest but gone")
            for name in manifest["tensors"].keys() - names
        ]
        problems += [
            Problem("error", name, "is not in the manifest") for name in names - manifest["tensors"].keys()
        ]
        for name, digest in manifest["files"].items():
            if not side.source.exists(name):
                problems.append(Problem("error", name, "file is in the manifest but gone"))
            elif hashlib.sha256(side.source.read(name)).hexdigest() != digest:
                problems.append(Problem("error", name, "file differs from the manifest"))
    if other is not None:
        missing = other.holders.keys() - side.holders.keys()
        added = side.holders.keys() - other.holders.keys()
        problems += [
            Problem("error", name, f"is in {other.source.spec} but missing here") for name in missing
        ]
        problems += [Problem("error", name, f"is not in {other.source.spec}") for name in added]
    return sorted(problems, key=lambda problem: problem.where)


def _open_files(side: Side, other: Side | None, file: str, staging: Path, stack: ExitStack) -> _Readers:
    """Open a shard and the files of the other side that hold the same tensors."""
    wanted = [(side, file)]
    if other is not None:
        names = [side.weight(entry.name) for entry in side.index.headers[file].entries]
        twins = {other.holders[name].file for name in names if name in other.holders}
        wanted += [(other, twin) for twin in sorted(twins)]
    readers: _Readers = {}
    for place, (owner, name) in enumerate(wanted):
        path = stack.enter_context(owner.source.local_file(name, staging / str(place)))
        readers[owner.source.spec, name] = stack.enter_context(open_reader(path))
    return readers


def _check_tensor(
    entry: TensorEntry,
    readers: _Readers,
    sides: tuple[Side, Side | None],
    digest: str | None,
    broken: set[str],
    progress: Progress,
) -> tuple[list[Problem], TensorError | None]:
    side, other = sides
    reader = readers[side.source.spec, entry.file]
    problems: list[Problem] = []
    deviation: TensorError | None = None
    found, nan = _hash_and_count_nan(entry, reader, progress)
    if digest is not None and found != digest:
        problems.append(
            Problem("error", entry.name, f"SHA-256 differs from the manifest: expected {digest}, got {found}")
        )
    if nan:
        problems.append(Problem("error", entry.name, f"{nan} NaN codes"))
    twin = _twin(entry, side, other)
    # What is known to be wrong already would only be told again, in other words.
    scale = side.low[entry.name].scale if entry.name in side.low else scale_of(entry.name, side.index.tensors)
    known = nan or broken & {entry.name, scale}
    raw = twin is not None and twin.dtype == FP8  # without a block size, FP8 can still equal FP8
    known = known or (entry.dtype == FP8 and side.quantization is None and not raw)
    if twin is not None and other is not None and not known:
        try:
            twin_reader = readers[other.source.spec, twin.file]
            message, deviation = compare(entry, reader, side, twin, twin_reader, other)
        except BlockscaleError as error:
            message = str(error)
        if message is not None:
            problems.append(Problem("error", entry.name, message))
    progress.advance(0, 1)
    return problems, deviation


def _twin(entry: TensorEntry, side: Side, other: Side | None) -> TensorEntry | None:
    """The tensor of the other side that holds the same weight; None for a scale."""
    if other is None or side.is_scale(entry.name):
        return None
    return other.holders.get(side.weight(entry.name))


def _hash_and_count_nan(entry: TensorEntry, reader: Reader, progress: Progress) -> tuple[str, int]:
    digest, nan = hashlib.sha256(), 0
    for part in chunks(entry, reader):
        digest.update(tensor_bytes(part))
        if entry.dtype == FP8:
            nan += ops.find_nonfinite(part.view(torch.float8_e4m3fn))[0]
        progress.advance(part.nbytes, 0)
    return digest.hexdigest(), nan
