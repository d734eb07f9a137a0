"""What a page is made of, before it is HTML: sections of facts, charts, tables, notes and code.

Everything here is text and numbers; the template decides how they look, and escapes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Facts:
    """A few figures to be seen at once: (label, value, what it was or how sure it is)."""

    kind: ClassVar[str] = "facts"
    entries: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class View:
    """One figure of a chart: what to call it, and Plotly's `data` and `layout`."""

    label: str
    figure: dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A place for a figure, or for several that one switches between.

    Attributes:
        title: of the chart; also what a screen reader says.
        note: how to read it.
        views: at least one.
    """

    kind: ClassVar[str] = "chart"
    title: str
    note: str
    views: tuple[View, ...]

    @property
    def height(self) -> int:
        """Pixels that the highest of the figures takes."""
        return max(int(view.figure["layout"]["height"]) for view in self.views)


@dataclass(frozen=True)
class Charts:
    """Small charts that stand side by side where there is room."""

    kind: ClassVar[str] = "charts"
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    Attributes:
        title: what is in it.
        columns: headings.
        rows: as many cells each.
        words: numbers of the columns that hold words; all others are numbers and stand at the right.
        folded: shown when asked for.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    folded: bool = False


@dataclass(frozen=True)
class Note:
    """A paragraph; a warning stands out."""

    kind: ClassVar[str] = "note"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Code:
    """Text to be copied as it is, under a title."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


Part = Facts | Chart | Charts | Table | Note | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    parts: tuple[Part, ...]

    @property
    def anchor(self) -> str:
        """Where links within the page lead."""
        return "-".join(self.title.lower().split())


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: what was done, to what.
        summary: the figures that matter most.
        sections: in order.
        version: of blockscale.
    """

    title: str
    summary: Facts
    sections: tuple[Section, ...]
    version: str
