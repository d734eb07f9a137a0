"""A page as one HTML file that needs no network: text and tables in full, charts on top where scripts run.

Everything that is shown is escaped. A content security policy allows no connection and only the two scripts
of the page, by their SHA-256, so that nothing a checkpoint calls its tensors could ever run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from blockscale.errors import BlockscaleError
from blockscale.report.content import Page


def write_page(page: Page, path: Path) -> None:
    """Write a page, all or nothing.

    Raises:
        BlockscaleError: it cannot be written.
    """
    whole = path.with_name(f".{path.name}.new")
    try:
        # A name that is no Unicode is written with escapes.
        whole.write_text(render(page), encoding="utf-8", errors="backslashreplace")
        os.replace(whole, path)
    except OSError as error:
        raise BlockscaleError(f"cannot be written: {error.strerror}", where=path) from error


def render(page: Page) -> str:
    """The HTML of a page."""
    templates = resources.files("blockscale.report") / "templates"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"json": _embedded, "breakable": _breakable}
    template = environment.from_string((templates / "page.html").read_text(encoding="utf-8"))
    drawing = any(part.kind in ("chart", "charts") for each in page.sections for part in each.parts)
    scripts = [get_plotlyjs(), (templates / "page.js").read_text(encoding="utf-8")] if drawing else []
    return template.render(
        page=page,
        style=Markup((templates / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )


def _policy(scripts: list[str]) -> str:
    sums = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{each}'" for each in sums) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _breakable(text: str) -> Markup:
    """A name that may go on in the next line after a dot."""
    return escape(text).replace(".", Markup(".<wbr>"))


def _embedded(value: Any) -> Markup:
    """JSON that no parser takes for the end of the element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
