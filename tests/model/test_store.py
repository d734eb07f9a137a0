"""The bytes of a checkpoint's files, and what is read of them before they are used."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.source import open_source
from blockscale.model import store

SIZES = (40, 0, 300, 8, 8, 200, 16)


@pytest.fixture
def checkpoint(tmp_path):
    """(tensors as they were saved, entries in the order of the file, source)"""
    tensors = {
        f"t{i}": torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        for i, size in enumerate(SIZES)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    entries = sorted(read_index(source).tensors.values(), key=lambda entry: entry.start)
    return tensors, entries, source


@pytest.fixture
def reads(monkeypatch):
    """What the reader is told to read, with 64 bytes ahead."""
    made = []
    monkeypatch.setattr(store, "_AHEAD", 64)
    monkeypatch.setattr(store, "_read", lambda path, first, last: made.append((first, last)))
    return made


def test_what_is_used_was_asked_for_once_and_before(checkpoint, reads):
    tensors, entries, source = checkpoint
    files = store.Files(source)
    for entry in entries:
        torch.testing.assert_close(files.bytes_of(entry), tensors[entry.name])
        files._reader.submit(int).result()  # behind what was asked for
        if entry.nbytes:
            assert reads[-1][1] >= entry.end + 32
    assert reads[0][0] == entries[0].start
    for (_, last), (first, _) in pairwise(reads):
        assert first >= last


def test_what_is_left_out_is_not_asked_for(checkpoint, reads):
    _, entries, source = checkpoint
    files = store.Files(source)
    long = [entry for entry in entries if entry.nbytes >= 200]
    for entry in long:
        files.bytes_of(entry)
    files._reader.shutdown()
    assert reads[0] == (long[0].start, long[0].end + 64)
    assert sum(last - first for first, last in reads) <= sum(entry.nbytes + 64 for entry in long)


def test_reading_ahead_ends_with_the_file(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    store._read(str(path), 90, 1 << 30)
    store._read(str(path), 200, 300)
