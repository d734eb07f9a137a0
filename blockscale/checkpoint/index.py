"""Read what a safetensors checkpoint holds, from its headers alone, and trust nothing in them.

A file is `<u64 header length> <JSON header> <data>`; the header maps each tensor to dtype, shape and a
[begin, end) range of the data, which must cover the data without overlap or hole. A checkpoint is one file,
or shards with `model.safetensors.index.json`. Source: the safetensors README, section Format.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from blockscale.checkpoint.deepseek_names import RANK_FILE
from blockscale.checkpoint.source import Source
from blockscale.errors import BlockscaleError, CorruptCheckpointError
from blockscale.formats import SAFETENSORS_DTYPES, dtype_bits, tensor_nbytes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# The format's own limit; a longer one is a lying length, not a header.
_MAX_HEADER_BYTES = 100_000_000
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: dtype (safetensors name), shape, and absolute byte range [start, end) in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A parsed header: tensors in the order of their data, free-form metadata, file size in bytes."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    file_size: int


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint.

    Attributes:
        tensors: name -> entry, in the order of files and of the data in them.
        headers: file name -> header.
        index_metadata: the `metadata` of the index file, or None for a checkpoint of one file without index.
    """

    tensors: dict[str, TensorEntry]
    headers: dict[str, Header]
    index_metadata: dict[str, Any] | None

    @property
    def total_size(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.nbytes for entry in self.tensors.values())


def read_index(source: Source) -> CheckpointIndex:
    """Read and check every header of a checkpoint.

    Raises:
        CorruptCheckpointError: a header or the index is wrong.
        BlockscaleError: there is no safetensors checkpoint in the folder.
    """
    sizes = source.files()
    files, weight_map, metadata = _weight_files(source, sizes)
    headers: dict[str, Header] = {}
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        header = read_header(partial(source.read, file), sizes[file], file)
        headers[file] = header
        for entry in header.entries:
            if entry.name in tensors:
                raise CorruptCheckpointError(
                    "tensor is in two files", where=entry.name, got=f"{tensors[entry.name].file} and {file}"
                )
            tensors[entry.name] = entry
    if weight_map is not None:
        _check_weight_map(weight_map, tensors)
    return CheckpointIndex(tensors, headers, metadata)


def read_header(read: Callable[[int, int], bytes], file_size: int, file: str) -> Header:
    """Parse and check one file's header.

    Args:
        read: (start, length) -> bytes of the file.
        file_size: bytes of the whole file.
        file: name for messages and entries.

    Raises:
        CorruptCheckpointError: anything that the safetensors format forbids.
    """
    prefix = read(0, 8)
    if file_size < 8 or len(prefix) < 8:
        raise CorruptCheckpointError(
            "file is truncated", where=file, expected="at least 8 bytes", got=file_size
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > min(file_size - 8, _MAX_HEADER_BYTES):
        raise CorruptCheckpointError(
            "header length is wrong, or the file is truncated",
            where=file,
            expected=f"at most {min(file_size - 8, _MAX_HEADER_BYTES)} bytes",
            got=length,
            remedy="fetch the file again",
        )
    parsed = parse_object(read(8, length), f"{file} header")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CorruptCheckpointError("header metadata is not a JSON object", where=file)
    data_start = 8 + length
    entries = [_entry(name, value, file, data_start) for name, value in parsed.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_coverage(entries, data_start, file_size, file)
    return Header(tuple(entries), {str(key): str(value) for key, value in metadata.items()}, file_size)


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object of a header, an index, a config or a manifest.

    Raises:
        CorruptCheckpointError: not JSON, not an object, or an object with one key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for place, key in enumerate(keys) if key in keys[:place])
            raise CorruptCheckpointError("duplicate key", where=where, got=repr(twice))
        return result

    try:
        parsed = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except CorruptCheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, an integer without end
        raise CorruptCheckpointError(
            "is not JSON", where=where, got=error, remedy="fetch the file again"
        ) from error
    if not isinstance(parsed, dict):
        raise CorruptCheckpointError("is not a JSON object", where=where, got=type(parsed).__name__)
    return parsed


def _entry(name: str, value: Any, file: str, data_start: int) -> TensorEntry:
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise CorruptCheckpointError("tensor name is not Unicode", where=file, got=repr(name))
    where = f"{file} tensor {name}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CorruptCheckpointError("header entry lacks dtype, shape or data_offsets", where=where)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise CorruptCheckpointError(
            "unknown dtype", where=where, expected="a dense safetensors dtype", got=repr(dtype)
        )
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise CorruptCheckpointError("bad shape", where=where, got=shape)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(o) is int and o >= 0 for o in offsets)
    ):
        raise CorruptCheckpointError("bad data_offsets", where=where, got=offsets)
    bits = math.prod(shape) * dtype_bits(dtype)
    if bits % 8:
        raise CorruptCheckpointError(
            "shape does not fill whole bytes",
            where=where,
            expected="a multiple of 8 bits",
            got=f"{bits} bits",
        )
    expected = tensor_nbytes(dtype, tuple(shape))
    if offsets[1] - offsets[0] != expected:
        raise CorruptCheckpointError(
            "byte range does not fit dtype and shape",
            where=where,
            expected=f"{expected} bytes for {dtype} {shape}",
            got=offsets[1] - offsets[0],
        )
    return TensorEntry(name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _check_coverage(entries: list[TensorEntry], data_start: int, file_size: int, file: str) -> None:
    position = data_start
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the one before" if entry.start < position else "leaves a hole before it"
            raise CorruptCheckpointError(
                f"byte range {kind}", where=f"{file} tensor {entry.name}", expected=position, got=entry.start
            )
        position = entry.end
    if position != file_size:
        kind = "truncated" if position > file_size else "longer than its header says"
        raise CorruptCheckpointError(
            f"file is {kind}",
            where=file,
            expected=f"{position} bytes",
            got=file_size,
            remedy="fetch the file again",
        )


def _weight_files(
    source: Source, sizes: dict[str, int]
) -> tuple[list[str], dict[str, str] | None, dict[str, Any] | None]:
    top = [name for name in sizes if "/" not in name]
    indices = [name for name in top if name.endswith(".safetensors.index.json")]
    index = INDEX_NAME if INDEX_NAME in indices else (indices[0] if len(indices) == 1 else None)
    if index is not None:
        weight_map, metadata = _read_weight_map(source, index)
        files = sorted(set(weight_map.values()))
        absent = [file for file in files if file not in sizes]
        if absent:
            raise CorruptCheckpointError(
                f"{len(absent)} of {len(files)} files that the index names are absent",
                where=f"{source.spec}/{index}",
                got=f"no {absent[0]}",
                remedy="fetch the missing files",
            )
        return files, weight_map, metadata
    found = [name for name in top if name.endswith(".safetensors")]
    if SINGLE_NAME not in found and any(RANK_FILE.fullmatch(name) for name in found):
        raise BlockscaleError(
            "shards of DeepSeek's inference folder, made for a number of ranks",
            where=source.spec,
            expected=f"a Hugging Face checkpoint: {SINGLE_NAME} or {INDEX_NAME}",
            remedy="name the folder they were converted from",
        )
    if SINGLE_NAME in found or len(found) == 1:
        return [SINGLE_NAME if SINGLE_NAME in found else found[0]], None, None
    if found:
        raise BlockscaleError(
            f"{len(found)} safetensors files and no {INDEX_NAME} to say which belong together",
            where=source.spec,
        )
    pickled = next((name for name in top if name.endswith(_PICKLED)), None)
    raise BlockscaleError(
        "no safetensors checkpoint in the folder",
        where=source.spec,
        expected=f"{SINGLE_NAME} or {INDEX_NAME}",
        got=f"{pickled}, which is pickled and never opened" if pickled else f"{len(top)} other files",
        remedy="save the model with save_pretrained of transformers first" if pickled else None,
    )


def _read_weight_map(source: Source, index: str) -> tuple[dict[str, str], dict[str, Any]]:
    where = f"{source.spec}/{index}"
    parsed = parse_object(source.read(index), where)
    weight_map, metadata = parsed.get("weight_map"), parsed.get("metadata") or {}
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptCheckpointError("index has no weight_map of file names", where=where)
    if not isinstance(metadata, dict):
        raise CorruptCheckpointError("index metadata is not a JSON object", where=where)
    for name, file in weight_map.items():
        if re.search(r"[/\\\0]", file) or file.startswith(".") or not file.endswith(".safetensors"):
            raise CorruptCheckpointError(
                "index names what is no safetensors file of this folder",
                where=where,
                got=f"{name} -> {file!r}",
            )
    return weight_map, metadata


def _check_weight_map(weight_map: dict[str, str], tensors: dict[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            got = tensors[name].file if name in tensors else "no file has it"
            raise CorruptCheckpointError(
                "tensor is not in the file the index names", where=name, expected=file, got=got
            )
    extra = [name for name in tensors if name not in weight_map]
    if extra:
        raise CorruptCheckpointError(
            f"{len(extra)} tensors are in the files but not in the index",
            where=tensors[extra[0]].file,
            got=extra[0],
            remedy="rebuild the index: which tensors count is not for the converter to guess",
        )
