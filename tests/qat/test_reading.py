"""Text for training: every row reads on from its own place, and from the same one after an interruption."""

import lzma

import pytest
import torch

from blockscale import BlockscaleError
from blockscale.qat import reading
from blockscale.qat.reading import Place, Reading


def bytes_of(texts):
    return [list(text.encode()) for text in texts]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A file of numbered lines, longer than a piece."""
    monkeypatch.setattr(reading, "_PIECE", 64)
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {number} \N{GREEK SMALL LETTER ALPHA}\n" for number in range(60)))
    return file


def read(file, rows, of, context, count, places=None, encode=bytes_of):
    """Windows (count, rows, context) and the places behind each."""
    source = Reading(file, encode, rows, of, context, places)
    try:
        found = [(source.next(), list(source.places)) for _ in range(count)]
    finally:
        source.close()
    return torch.stack([windows for windows, _ in found]), [each for _, each in found]


def test_one_row_reads_the_text_from_its_beginning_and_again(text):
    whole = list(text.read_bytes())
    windows, _ = read(text, [0], 1, 50, 2 * len(whole) // 50)
    found = windows.flatten().tolist()
    assert found == (whole * 3)[: len(found)]


def test_rows_begin_at_lines_all_over_the_text(text):
    whole = text.read_bytes()
    windows, _ = read(text, range(4), 4, 20, 1)
    for row, window in enumerate(windows[0]):
        at = whole.find(bytes(window.tolist()))
        assert at == 0 or whole[at - 1 : at] == b"\n"
        assert 0 <= at - row * len(whole) // 4 <= 12


def test_rows_are_the_same_however_processes_share_them(text):
    together, _ = read(text, range(4), 4, 30, 5)
    for rank in range(2):
        own, _ = read(text, range(rank, 4, 2), 4, 30, 5)
        assert torch.equal(own, together[:, rank::2])


@pytest.mark.parametrize("step", [0, 1, 7])
def test_an_interrupted_row_goes_on_with_the_next_token(text, step):
    windows, places = read(text, range(3), 3, 37, 12)
    later, _ = read(text, range(3), 3, 37, 11 - step, places=places[step])
    assert torch.equal(later, windows[step + 1 :])
    assert all(isinstance(place, Place) and place.offset < text.stat().st_size for place in places[step])


def test_pieces_without_an_end_of_a_line_end_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_PIECE", 16)
    file = tmp_path / "text.txt"
    file.write_text("\N{EURO SIGN}" * 30 + "x" * 7, encoding="utf-8")
    windows, _ = read(file, [0], 1, 97, 3)
    assert bytes(windows.flatten().tolist()) == file.read_bytes() * 3


def test_a_packed_text_is_the_same_text(text):
    packed = text.with_suffix(".txt.xz")
    packed.write_bytes(lzma.compress(text.read_bytes()))
    assert torch.equal(read(packed, range(2), 2, 40, 4)[0], read(text, range(2), 2, 40, 4)[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"abc\n\xff\xfe\n" * 9, "is not UTF-8"), (None, "cannot be read")],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BlockscaleError, match=rf"bad\.txt.*{message}|{message}"):
        read(file, [0], 1, 8, 1)


def test_a_text_without_tokens_is_refused_instead_of_read_forever(text):
    with pytest.raises(BlockscaleError, match="has no tokens"):
        read(text, [0], 1, 8, 1, encode=lambda texts: [[] for _ in texts])
