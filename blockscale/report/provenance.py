"""What a result was made with and what it is: recipe, versions, files with checksums.

`quantize` hashes every tensor and file as it writes them and keeps the sums in the manifest. A report quotes
them: shards are never read again for it. The SHA-256 of the manifest itself stands for all of them.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from blockscale.checkpoint.index import INDEX_NAME, parse_object
from blockscale.checkpoint.model_config import CONFIG_NAME
from blockscale.checkpoint.plan import MANIFEST_NAME
from blockscale.checkpoint.source import Source, open_source
from blockscale.quantization_config import QUANTIZATION_KEYS
from blockscale.report.content import Code, Note, Section, Table
from blockscale.report.wording import spelled
from blockscale.version import __version__
from blockscale.wording import size

_SMALL = 4 << 20  # bytes of a file that is read for its checksum


def recipe_section(spec: str, revision: str | None = None, *parts: Code) -> Section | None:
    """How a checkpoint was quantized, as its manifest or its config.json says; `parts` come behind it."""
    source = open_source(spec, revision)
    manifest = _json(source, MANIFEST_NAME)
    options = manifest.get("options") if manifest.get("command") == "quantize" else None
    found: list[Code] = []
    if isinstance(options, dict):
        kept = options.get("kept")
        recipe = {key: value for key, value in options.items() if key != "kept"}
        found.append(Code("Recipe, for --recipe", spelled(recipe)))
        if kept:
            found.append(Code("Kept as they were, and why", spelled(kept)))
    else:
        config = _json(source, CONFIG_NAME)
        key = next((key for key in QUANTIZATION_KEYS if _object(config, key)), None)
        found += [] if key is None else [Code(f"{key} of config.json", spelled(config[key]))]
    return Section("Recipe", (*found, *parts)) if found or parts else None


def versions_section(packages: Iterable[str], more: Mapping[str, object] | None = None) -> Section:
    """Versions of blockscale, Python and some packages that are installed, and what else is to be known."""
    rows = [("blockscale", __version__), ("Python", platform.python_version())]
    for name in packages:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    rows += [(name, str(value)) for name, value in (more or {}).items()]
    rows.append(("system", f"{platform.system()} {platform.machine()}"))
    return Section("Versions", (Table("What this was made with", ("what", "version"), tuple(rows), (0, 1)),))


def files_section(spec: str, revision: str | None = None) -> Section:
    """Files of a checkpoint with their sizes, and SHA-256 as far as it is known without reading shards."""
    source = open_source(spec, revision)
    manifest = _json(source, MANIFEST_NAME)
    tensors = _object(manifest, "tensors")
    held = Counter(map(str, _object(_json(source, INDEX_NAME), "weight_map").values()))
    rows = []
    for name, nbytes in source.files().items():
        if name.endswith(".safetensors") and tensors:
            told = f"of its {held.get(name, len(tensors)):,} tensors, in {MANIFEST_NAME}"
        else:
            told = _checksum(source, name, nbytes, _object(manifest, "files"))
        rows.append((name, size(nbytes), told))
    if tensors:
        text = (
            f"{MANIFEST_NAME} holds the SHA-256 of each of {len(tensors):,} tensors, taken as they were "
            "written; blockscale verify reads all of them back and compares."
        )
    else:
        text = f"There is no {MANIFEST_NAME} with checksums of tensors; only small files were hashed here."
    return Section(
        "Files",
        (Note(text), Table("Names, sizes, checksums", ("file", "size", "SHA-256"), tuple(rows), (0, 2))),
    )


def _checksum(source: Source, name: str, nbytes: int, known: Mapping[str, Any]) -> str:
    if name in known:
        return str(known[name])
    if not name.endswith(".json") or nbytes > _SMALL:
        return "not computed"
    return hashlib.sha256(source.read(name)).hexdigest()


def _json(source: Source, name: str) -> dict[str, Any]:
    """A JSON object beside the weights; empty if there is none."""
    return parse_object(source.read(name), source.path(name)) if source.exists(name) else {}


def _object(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under a key; empty if there is none."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}
