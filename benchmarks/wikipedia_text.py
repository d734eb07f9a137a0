"""Calibration text in the style of WikiText: articles of Wikipedia that its test split does not have.

    python benchmarks/wikipedia_text.py OUT

The articles (a hundred from "A" to "Algorithm", CC BY-SA) are test data of the package gensim, which also
cuts their markup away. Words and punctuation are set apart as in WikiText, by the Moses tokenizer of
sacremoses and the marks @-@ @,@ @.@. What has ten words in a row in common with WikiText's test split can be
looked for with --against FILE; of wikitext-2 it is nothing.
"""

from __future__ import annotations

import argparse
import bz2
import re
from collections.abc import Iterator
from pathlib import Path

import gensim
from gensim.corpora.wikicorpus import extract_pages, filter_wiki
from sacremoses import MosesTokenizer

ARTICLES = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHORTEST = 2000  # characters; shorter pages are redirections and lists of links
_SHORTEST_LINE = 60  # characters; shorter ones are captions and remains of tables
_NOT_PROSE = ("*", "#", ":", ";", "|", "!", "{", "}", "<")
_RUN = 10  # words in a row that two texts have in common only if one copies the other


def articles() -> Iterator[tuple[str, list[str]]]:
    """Title, and headings ("==Name==") and paragraphs, of every article."""
    with bz2.open(Path(gensim.__file__).parent / ARTICLES) as pages:
        for title, markup, _ in extract_pages(pages, ("0",)):
            text = filter_wiki(markup, promote_remaining=True, simplify_links=True)
            if len(text) < _SHORTEST or text.lstrip().lower().startswith("#redirect"):
                continue
            lines = [line.strip() for line in text.splitlines()]
            yield title, [line for line in lines if line and not line.startswith(_NOT_PROSE)]


def in_style(title: str, lines: list[str]) -> Iterator[str]:
    """The lines of an article as WikiText has them."""
    moses = MosesTokenizer("en")
    yield f" = {title} = "
    for line in lines:
        heading = re.fullmatch(r"(=+)\s*(.*?)\s*=+", line)
        if heading:
            marks = " ".join(heading[1])
            yield f" {marks} {heading[2]} {marks} "
            continue
        plain = re.sub(r"<[^>]*>|'{2,}", "", line)
        if len(plain) > _SHORTEST_LINE:
            words = " ".join(moses.tokenize(plain, aggressive_dash_splits=True, escape=False))
            words = re.sub(r"(?<=\d) ?, ?(?=\d{3}\b)", " @,@ ", words)
            yield f" {re.sub(r'(?<=[0-9])[.](?=[0-9])', ' @.@ ', words)} "


def in_common(text: str, other: str) -> set[str]:
    """Runs of words that both texts have."""

    def runs(whole: str) -> set[str]:
        words = re.findall(r"[a-z0-9]+", whole.lower())
        return {" ".join(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)}

    return runs(text) & runs(other)


def main() -> None:
    """Write the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="a text that must have nothing in common with it")
    arguments = parser.parse_args()
    text = "\n".join(line for title, lines in articles() for line in in_style(title, lines))
    if arguments.against is not None:
        common = in_common(text, arguments.against.read_text(encoding="utf-8"))
        if common:
            raise SystemExit(f"error: {len(common)} runs of {_RUN} words in common: {min(common)!r}, ...")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(f"{arguments.out}: {len(text):,} characters")


if __name__ == "__main__":
    main()
