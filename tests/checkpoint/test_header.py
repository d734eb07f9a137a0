"""Safetensors headers that lie: each is refused in one line that names file, tensor, expected and got."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockscale import inspect_checkpoint, quantize_checkpoint, verify_checkpoint
from blockscale.checkpoint.index import read_header
from blockscale.errors import CorruptCheckpointError
from tests import data

FILE = "model.safetensors"
A = data.entry("F32", [2, 2], 0, 16)
B = data.entry("U8", [4], 16, 20)
BODY = bytes(20)
AGAIN = "fetch the file again"
LONG = "1" * 5000
PAST = data.entry("U8", [2**62], 16, 16 + 2**62)


def _file(b=B, body=BODY, **more):
    return data.raw_file({"a": A, "b": b, **more}, body)


CORRUPT = {
    "empty file": (b"", f"{FILE}: file is truncated (expected at least 8 bytes, got 0)"),
    "cut in the length": (_file()[:7], f"{FILE}: file is truncated (expected at least 8 bytes, got 7)"),
    "cut after the length": (
        _file()[:8],
        f"{FILE}: header length is wrong, or the file is truncated "
        f"(expected at most 0 bytes, got {len(_file()) - 28}); {AGAIN}",
    ),
    "cut in the header": (
        _file()[:50],
        f"{FILE}: header length is wrong, or the file is truncated "
        f"(expected at most 42 bytes, got {len(_file()) - 28}); {AGAIN}",
    ),
    "cut in the data": (
        _file()[:-1],
        f"{FILE}: file is truncated (expected {len(_file())} bytes, got {len(_file()) - 1}); {AGAIN}",
    ),
    "all data gone": (
        _file()[:-20],
        f"{FILE}: file is truncated (expected {len(_file())} bytes, got {len(_file()) - 20}); {AGAIN}",
    ),
    "trailing bytes": (
        _file() + b"12",
        f"{FILE}: file is longer than its header says "
        f"(expected {len(_file())} bytes, got {len(_file()) + 2}); {AGAIN}",
    ),
    "header length of 2**64 - 1": (
        data.raw_file({"a": A}, BODY[:16], length=2**64 - 1),
        f"{FILE}: header length is wrong, or the file is truncated "
        f"(expected at most {len(data.raw_file({'a': A}, BODY[:16])) - 8} bytes, got {2**64 - 1}); {AGAIN}",
    ),
    "header length of zero": (
        data.raw_file(b"", b""),
        f"{FILE} header: is not JSON (got Expecting value: line 1 column 1 (char 0)); {AGAIN}",
    ),
    "not JSON": (
        data.raw_file(b"{'a': 1}"),
        f"{FILE} header: is not JSON (got Expecting property name enclosed in double quotes: "
        f"line 1 column 2 (char 1)); {AGAIN}",
    ),
    "not UTF-8": (
        data.raw_file(b'{"\xff": 1}'),
        f"{FILE} header: is not JSON (got 'utf-8' codec can't decode byte 0xff in position 2: "
        f"invalid start byte); {AGAIN}",
    ),
    "nested beyond the stack": (
        data.raw_file(b"[" * 100_000),
        f"{FILE} header: is not JSON (got maximum recursion depth exceeded",
    ),
    "integer of 5000 digits": (
        data.raw_file(f'{{"a": {{"shape": [{LONG}]}}}}'.encode()),
        f"{FILE} header: is not JSON (got Exceeds the limit",
    ),
    "a list": (data.raw_file([1]), f"{FILE} header: is not a JSON object (got list)"),
    "null": (data.raw_file(b"null"), f"{FILE} header: is not a JSON object (got NoneType)"),
    "metadata that is a list": (_file(__metadata__=[]), f"{FILE}: header metadata is not a JSON object"),
    "duplicate tensor": (
        data.raw_file(f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}'.encode(), BODY[:16]),
        f"{FILE} header: duplicate key (got 'a')",
    ),
    "duplicate key in an entry": (
        data.raw_file(
            b'{"a": {"dtype": "F32", "dtype": "U8", "shape": [], "data_offsets": [0, 4]}}', BODY[:4]
        ),
        f"{FILE} header: duplicate key (got 'dtype')",
    ),
    "a name that is no Unicode": (
        data.raw_file(f'{{"\\ud800": {json.dumps(A)}}}'.encode(), BODY[:16]),
        f"{FILE}: tensor name is not Unicode (got '\\ud800')",
    ),
    "entry that is a string": (
        _file("F32"),
        f"{FILE} tensor b: header entry lacks dtype, shape or data_offsets",
    ),
    "sparse layout": (
        _file({"dtype": "F32", "layout": "sparse_coo", "indices": [0, 8], "values": [8, 16]}),
        f"{FILE} tensor b: header entry lacks dtype, shape or data_offsets",
    ),
    "unknown dtype": (
        _file(data.entry("F8_E3M4", [4], 16, 20)),
        f"{FILE} tensor b: unknown dtype (expected a dense safetensors dtype, got 'F8_E3M4')",
    ),
    "dtype that is a list": (
        _file(data.entry(["U8"], [4], 16, 20)),
        f"{FILE} tensor b: unknown dtype (expected a dense safetensors dtype, got ['U8'])",
    ),
    "negative shape": (_file(data.entry("U8", [-4], 16, 20)), f"{FILE} tensor b: bad shape (got [-4])"),
    "two negative sides": (
        _file(data.entry("U8", [-2, -2], 16, 20)),
        f"{FILE} tensor b: bad shape (got [-2, -2])",
    ),
    "float shape": (_file(data.entry("U8", [4.0], 16, 20)), f"{FILE} tensor b: bad shape (got [4.0])"),
    "bool shape": (_file(data.entry("U8", [True, 4], 16, 20)), f"{FILE} tensor b: bad shape (got [True, 4])"),
    "shape that is a number": (_file(data.entry("U8", 4, 16, 20)), f"{FILE} tensor b: bad shape (got 4)"),
    "NaN shape": (_file(data.entry("U8", [float("nan")], 16, 20)), f"{FILE} tensor b: bad shape (got [nan])"),
    "huge shape": (
        _file(data.entry("U8", [2**40, 2**40], 16, 20)),
        f"{FILE} tensor b: byte range does not fit dtype and shape "
        f"(expected {2**80} bytes for U8 [{2**40}, {2**40}], got 4)",
    ),
    "half a byte": (
        _file(data.entry("F4", [3], 16, 17), bytes(17)),
        f"{FILE} tensor b: shape does not fill whole bytes (expected a multiple of 8 bits, got 12 bits)",
    ),
    "three offsets": (
        _file({**B, "data_offsets": [16, 18, 20]}),
        f"{FILE} tensor b: bad data_offsets (got [16, 18, 20])",
    ),
    "negative offset": (
        _file(data.entry("U8", [4], -4, 0)),
        f"{FILE} tensor b: bad data_offsets (got [-4, 0])",
    ),
    "offset that is a string": (
        _file(data.entry("U8", [4], "16", 20)),
        f"{FILE} tensor b: bad data_offsets (got ['16', 20])",
    ),
    "reversed offsets": (
        _file(data.entry("U8", [4], 20, 16)),
        f"{FILE} tensor b: byte range does not fit dtype and shape (expected 4 bytes for U8 [4], got -4)",
    ),
    "range longer than the shape": (
        _file(data.entry("U8", [3], 16, 20)),
        f"{FILE} tensor b: byte range does not fit dtype and shape (expected 3 bytes for U8 [3], got 4)",
    ),
    "range past the end": (
        _file(PAST),
        f"{FILE}: file is truncated "
        f"(expected {len(_file(PAST)) - 4 + 2**62} bytes, got {len(_file(PAST))}); {AGAIN}",
    ),
    "overlap": (
        _file(data.entry("U8", [4], 12, 16), bytes(16)),
        f"{FILE} tensor b: byte range overlaps the one before "
        f"(expected {len(_file(data.entry('U8', [4], 12, 16), b'')) + 16}, "
        f"got {len(_file(data.entry('U8', [4], 12, 16), b'')) + 12})",
    ),
    "two tensors on one range": (
        _file(data.entry("F32", [2, 2], 0, 16), bytes(16)),
        f"{FILE} tensor b: byte range overlaps the one before "
        f"(expected {len(_file(data.entry('F32', [2, 2], 0, 16), b'')) + 16}, "
        f"got {len(_file(data.entry('F32', [2, 2], 0, 16), b''))})",
    ),
    "hole": (
        _file(data.entry("U8", [4], 20, 24), bytes(24)),
        f"{FILE} tensor b: byte range leaves a hole before it "
        f"(expected {len(_file(data.entry('U8', [4], 20, 24), b'')) + 16}, "
        f"got {len(_file(data.entry('U8', [4], 20, 24), b'')) + 20})",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_header_is_refused_in_one_line(tmp_path, case):
    content, expected = CORRUPT[case]
    source = data.write(tmp_path / "source", data.llama())
    (source / FILE).write_bytes(content)
    for action in (
        quantize_checkpoint,
        lambda s, _: inspect_checkpoint(s),
        lambda s, _: verify_checkpoint(s),
    ):
        line = data.refusal(lambda action=action: action(source, tmp_path / "out"), source, tmp_path / "out")
        assert line.startswith(expected)  # the rest of two of them is Python's own wording


def test_a_header_length_beyond_the_formats_limit_is_refused_without_reading_it(tmp_path):
    source = data.write(tmp_path / "source", data.llama())
    with open(source / FILE, "wb") as file:
        file.write(struct.pack("<Q", 150_000_000))
        file.truncate(200_000_000)
    with pytest.raises(CorruptCheckpointError) as caught:
        inspect_checkpoint(source)
    assert str(caught.value) == (
        f"{FILE}: header length is wrong, or the file is truncated "
        f"(expected at most 100000000 bytes, got 150000000); {AGAIN}"
    )


@pytest.mark.parametrize("cut", range(0, 2000, 97))
def test_a_shard_cut_anywhere_is_refused_and_named(tmp_path, cut):
    source = data.write(tmp_path / "source", data.llama(), shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.truncate(size - 1 - cut * (size // 2000))
    line = data.refusal(lambda: quantize_checkpoint(source, tmp_path / "out"), source, tmp_path / "out")
    assert line.startswith(f"{shard.name}: ")
    assert "truncated" in line


def test_safetensors_own_files_are_accepted_with_every_dtype_and_empty_tensors():
    from safetensors.torch import save

    dtypes = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.int64)
    tensors = {
        str(dtype): torch.zeros(3, 2).to(dtype) for dtype in (*dtypes, torch.float64, torch.float8_e5m2)
    }
    tensors |= {"none": torch.empty(0), "rows": torch.empty(0, 7), "scalar": torch.tensor(1.5)}
    raw = save(tensors, {"format": "pt", "note": "é"})
    header = read_header(lambda start, length: raw[start : start + length], len(raw), "f")
    assert {entry.name: entry.shape for entry in header.entries} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.metadata == {"format": "pt", "note": "é"}
    for entry in header.entries:
        assert (
            raw[entry.start : entry.end] == tensors[entry.name].flatten().view(torch.uint8).numpy().tobytes()
        )


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
_side = st.sampled_from([0, 1, 2, 4, 16, 20, 2**63, -1, 1.0, None, "4", True])
_entry = st.one_of(
    st.builds(
        data.entry,
        st.sampled_from(["F32", "U8", "F4", "F6_E2M3", "X", 1, None]) | _json,
        st.lists(_side, max_size=3) | _json,
        _side,
        _side,
    ),
    _json,
)


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "", "__metadata__", "\x00", "é"]), _entry, max_size=4),
    st.integers(0, 24),
    st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header_is_read_or_refused(header, size, length):
    _read_or_refuse(data.raw_file(header, bytes(size), length))


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 60),
)
def test_any_damage_to_a_good_file_is_read_or_refused(damage, cut):
    raw = bytearray(_file()[: len(_file()) - cut])
    for place, value in damage:
        raw[place % len(raw)] = value
    _read_or_refuse(bytes(raw))


@settings(max_examples=200)
@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(raw):
    _read_or_refuse(raw)


def _read_or_refuse(raw):
    headers = []
    line = data.told(
        lambda: headers.append(read_header(lambda start, n: raw[start : start + n], len(raw), FILE))
    )
    if line is not None:
        assert line.startswith(FILE)
        return
    (header,) = headers
    assert sum(entry.nbytes for entry in header.entries) == len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]
    for entry in header.entries:
        assert 8 <= entry.start <= entry.end <= len(raw)
