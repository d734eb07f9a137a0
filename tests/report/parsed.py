"""What a reader finds in a page: headings, tables, text, figures; and what a browser would run or fetch."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Parsed(HTMLParser):
    """A page taken apart."""

    source: str
    headings: list = field(default_factory=list)
    tables: list = field(default_factory=list)
    code: list = field(default_factory=list)
    figures: list = field(default_factory=list)
    scripts: list = field(default_factory=list)
    attributes: list = field(default_factory=list)
    tags: list = field(default_factory=list)
    text: str = ""
    _into: str = ""
    _kind: str = ""

    def __post_init__(self):
        super().__init__()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags += [] if tag == "wbr" else [tag]
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th", "h1", "h2", "pre", "script"):
            self._into, self._kind = "", dict(attributes).get("type", "")

    def handle_data(self, data):
        self._into += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._into)
        elif tag in ("h1", "h2"):
            self.headings.append(self._into)
        elif tag == "pre":
            self.code.append(self._into)
        elif tag == "script" and self._kind == "application/json":
            self.figures.append(json.loads(self._into))
        elif tag == "script":
            self.scripts.append(self._into)

    def table(self, *columns):
        """Rows of the one table whose headings start so."""
        (found,) = [rows for rows in self.tables if tuple(rows[0][: len(columns)]) == columns]
        return found[1:]

    def traces(self, kind):
        """All traces of a kind of all figures."""
        return [trace for figure in self.figures for trace in figure["data"] if trace["type"] == kind]
