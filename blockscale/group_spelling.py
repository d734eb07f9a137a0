"""How formats below 8 bits are spelled in recipes and config.json: `int4:g128`, `int3:g64:ue8m0`, `mxfp4`."""

from __future__ import annotations

from blockscale.errors import BlockscaleError
from blockscale.group_formats import MXFP4, GroupInt, GroupScaleFmt

# Those that are written; NVFP4 is read only.
WrittenFormat = GroupInt | MXFP4
GROUP_SPELLINGS = ("int4[:g32|g64|g128][:ue8m0]", "int3[...]", "mxfp4")
_KINDS = {"int4": 4, "int3": 3}
_SIZES = {"g32": 32, "g64": 64, "g128": 128}


def spell_group_format(fmt: WrittenFormat) -> str:
    """As `parse_group_format` reads it; groups always with their size."""
    if isinstance(fmt, MXFP4):
        return "mxfp4"
    return f"int{fmt.bits}:g{fmt.group_size}" + ("" if fmt.scale_fmt == "bf16" else f":{fmt.scale_fmt}")


def parse_group_format(value: object, where: str | None = None) -> WrittenFormat:
    """`"mxfp4"`, or `"int4"` and `"int3"` with what differs from groups of 128 and BF16 scales behind colons.

    Raises:
        BlockscaleError: anything else; `where` says in the message which value it is.
    """
    kind, *options = value.split(":") if isinstance(value, str) else ("",)
    if kind == "mxfp4" and not options:
        return MXFP4()
    sizes = [_SIZES[each] for each in options if each in _SIZES]
    scales: list[GroupScaleFmt] = [each for each in ("bf16", "ue8m0") if each in options]
    if kind in _KINDS and len(sizes) < 2 and len(options) == len(sizes) + len(scales) and len(scales) < 2:
        return GroupInt(_KINDS[kind], (sizes or [128])[0], (scales or ["bf16"])[0])
    raise BlockscaleError(
        "unknown format", where=where, expected=" | ".join(GROUP_SPELLINGS), got=repr(value)
    )
