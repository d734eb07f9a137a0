"""Tuning tables: files that come back as they were written, lookups by bucket and precedence, damage told."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.ops import tuning_table
from blockscale.ops._cuda.configs import FewTile, Tile
from blockscale.ops.tuning_table import Choice, Entry, Key, bucket, find_choice, read_table, write_table

GPU = "NVIDIA H100 80GB HBM3"
DENSE, CONTIGUOUS, MASKED = tuning_table.OPERATORS
DEVICE = torch.device("cuda", 0)
FEW = Choice("cuda", FewTile(16, splits=4))
WIDE = Choice("cuda", Tile(192, share="b", band=16))


def _entry(choice):
    return Entry(choice, 8.25, 9.5, "2026-11-22", "blockscale 0.1.0, torch 2.11.0")


TABLE = {
    Key(DENSE, 4096, 7168, 16): _entry(FEW),
    Key(DENSE, 4096, 7168, 4096): _entry(WIDE),
    Key(CONTIGUOUS, 4096, 7168, 8192): _entry(Choice("triton")),
    Key(MASKED, 4096, 7168, 16): _entry(Choice("cuda")),
    Key(MASKED, 4096, 7168, 32): _entry(Choice("dequantized")),  # what the heuristics may end in
}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU by name only, with empty places for the shipped and the user's table; gives (shipped, user's)."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(tuning_table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuning_table._choices.cache_clear()
    tuning_table._say_once.cache_clear()
    yield tmp_path / "shipped" / "nvidia-h100-80gb-hbm3.jsonl", tuning_table.table_file(GPU)
    tuning_table._choices.cache_clear()


@pytest.mark.parametrize(
    ("m", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (128, 128), (129, 256)]
)
def test_a_bucket_is_the_next_power_of_two(m, expected):
    assert bucket(m) == expected


def test_a_table_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "table.jsonl"
    write_table(path, GPU, TABLE)
    assert read_table(path, GPU) == TABLE
    assert path.stat().st_mode & 0o777 == 0o644
    assert [one.name for one in path.parent.iterdir()] == ["table.jsonl"], "no temporary file is left"
    header, *lines = (json.loads(line) for line in path.read_text().splitlines())
    assert header == {"format": "blockscale tuning table", "version": 1, "gpu": GPU}
    measured = {"us": 8.25, "heuristic_us": 9.5}
    when = {"date": "2026-11-22", "versions": "blockscale 0.1.0, torch 2.11.0"}
    key = {"op": CONTIGUOUS, "n": 4096, "k": 7168, "m": 8192}
    assert lines[2] == {**key, "backend": "triton", **measured, **when}
    assert lines[0]["tile"] == {"form": "FewTile", **asdict(FEW.tile)}


def test_a_table_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BlockscaleError, match=r"file/table.jsonl: tuning table cannot be written"):
        write_table(tmp_path / "file" / "table.jsonl", GPU, TABLE)


def test_no_file_is_an_empty_table(tmp_path):
    assert read_table(tmp_path / "none.jsonl", GPU) == {}


def test_a_tile_without_a_later_attribute_gets_its_default(tmp_path):
    path = tmp_path / "table.jsonl"
    write_table(path, GPU, TABLE)
    path.write_text(path.read_text().replace(', "band": 16', ""))
    assert read_table(path, GPU)[Key(DENSE, 4096, 7168, 4096)].choice.tile == replace(WIDE.tile, band=8)


DAMAGE = [
    ('"format"', '"farmat"', 1, "expected {"),
    ('"version": 1', '"version": 2', 1, '"version": 1'),
    (GPU, "NVIDIA A100", 1, GPU),
    ('"n": 4096, "k": 7168, "m": 16, "backend": "cuda", "tile"', '"n": 4096', 2, "not a line of JSON"),
    ('"m": 16, "backend": "cuda", "tile"', '"m": 17, "backend": "cuda", "tile"', 2, "senseless key"),
    ('"m": 16, "backend": "cuda", "tile"', '"m": true, "backend": "cuda", "tile"', 2, "senseless m True"),
    ('"m": 16, "backend": "cuda", "tile"', '"backend": "cuda", "tile"', 2, "no 'm'"),
    ('"splits": 4', '"splits": "4"', 2, "senseless splits '4' of a tile"),
    ('"splits": 4', '"splits": 3', 2, "no kernel"),
    ('"splits": 4', '"pieces": 4', 2, "senseless pieces 4 of a tile"),
    ('"form": "FewTile"', '"form": "Few"', 2, "no 'Few'"),
    ('"rows": 16', '"rows": 12', 2, "no kernel"),
    ('"block_n": 192', '"block_n": 512', 3, "no kernel"),
    ('"share": "b"', '"share": "c"', 3, "senseless share 'c' of a tile"),
    (f'{DENSE}", "n": 4096, "k": 7168, "m": 40', f'{MASKED}", "n": 4096, "k": 7168, "m": 40', 3, "no kernel"),
    ('"backend": "triton"', '"backend": "fast"', 4, "no kernel"),
    ('"us": 8.25', '"us": "8"', 2, "senseless us '8'"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "line", "reason"), DAMAGE)
def test_damage_is_told_with_its_line(tmp_path, good, bad, line, reason):
    path = tmp_path / "table.jsonl"
    write_table(path, GPU, TABLE)
    assert good in path.read_text()
    path.write_text(path.read_text().replace(good, bad))
    with pytest.raises(BlockscaleError) as told:
        read_table(path, GPU)
    message = str(told.value)
    assert message.startswith(f"{path}:{line}: damaged tuning table: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[]\n", b"7\n"])
def test_what_is_no_table_at_all_is_told(tmp_path, text):
    path = tmp_path / "table.jsonl"
    path.write_bytes(text)
    with pytest.raises(BlockscaleError, match="tuning table"):
        read_table(path, GPU)


def test_m_is_looked_up_in_the_smallest_bucket_that_holds_it(gpu):
    write_table(gpu[1], GPU, TABLE)
    assert [find_choice(DENSE, DEVICE, (m, 4096, 7168)) for m in (8, 9, 16, 17)] == [None, FEW, FEW, None]
    assert find_choice(DENSE, DEVICE, (2049, 4096, 7168)) == WIDE
    assert find_choice(CONTIGUOUS, DEVICE, (8192, 4096, 7168)) == Choice("triton")
    assert find_choice(MASKED, DEVICE, (9, 4096, 7168)) == Choice("cuda")
    assert find_choice(DENSE, DEVICE, (16, 7168, 4096)) is None


def test_the_users_table_goes_before_the_shipped_one(gpu):
    shipped, users = gpu
    write_table(shipped, GPU, TABLE)
    write_table(users, GPU, {Key(DENSE, 4096, 7168, 16): _entry(Choice("triton"))})
    assert find_choice(DENSE, DEVICE, (16, 4096, 7168)) == Choice("triton")
    assert find_choice(DENSE, DEVICE, (4096, 4096, 7168)) == WIDE


def test_files_are_read_once(gpu):
    assert find_choice(DENSE, DEVICE, (16, 4096, 7168)) is None
    write_table(gpu[1], GPU, TABLE)
    assert find_choice(DENSE, DEVICE, (16, 4096, 7168)) is None


def test_a_damaged_table_is_passed_over_and_said_once(gpu, caplog):
    shipped, users = gpu
    write_table(shipped, GPU, TABLE)
    users.parent.mkdir(parents=True)
    users.write_text("nothing\n")
    for _ in range(2):
        assert find_choice(DENSE, DEVICE, (16, 4096, 7168)) == FEW
        tuning_table._choices.cache_clear()
    assert [f"{users}:1: damaged tuning table" in record.message for record in caplog.records] == [True]


def test_a_choice_prints_what_is_set():
    assert str(Choice("triton")) == "triton"
    assert str(FEW) == "cuda FewTile(rows=16, splits=4)"
