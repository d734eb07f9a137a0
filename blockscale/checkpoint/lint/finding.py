"""What a rule finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# An error stops the engine; what is silent loads, and gives wrong values; a warning may do no harm.
Severity = Literal["error", "silent", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something that an engine would stumble over, or worse, would not.

    Attributes:
        severity: "error", "silent" or "warning".
        rule: its short name.
        where: the tensor, module or file.
        what: what is wrong.
        expected: what the engine expects.
        got: what is there.
        remedy: what to do about it.
    """

    severity: Severity
    rule: str
    where: str
    what: str
    expected: str | None = None
    got: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        details = ", ".join(
            f"{word} {value}" for word, value in (("expected", self.expected), ("got", self.got)) if value
        )
        line = f"{self.severity}: {self.where}: {self.what}" + (f" ({details})" if details else "")
        return line + (f"; {self.remedy}" if self.remedy else "") + f" [{self.rule}]"
