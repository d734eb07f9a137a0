"""The skip list: whether what the engine leaves unquantized is what is stored unquantized."""

from __future__ import annotations

from collections.abc import Iterator

from blockscale.checkpoint.families import family_of
from blockscale.checkpoint.lint.finding import Finding, Severity
from blockscale.checkpoint.lint.subject import Subject
from blockscale.checkpoint.names import keep_reason, role_of, sharing_groups
from blockscale.checkpoint.skip_list import skip_entry
from blockscale.formats import HIGH_PRECISION, scaled_weight_name


def quantized_but_skipped(subject: Subject) -> Iterator[Finding]:
    """Codes that are loaded as if they were weights: transformers does, the others miss a parameter."""
    for each in subject.linears:
        if each.quantized and each.skipped_by is not None:
            over = each.skipped_by != each.module
            what = f"is {each.kind}, but {subject.engine} leaves it unquantized: {each.skipped_by!r}"
            remedy = "list full module paths" if over else "remove the entry from the skip list"
            severity: Severity = "silent" if subject.engine == "transformers" else "error"
            yield Finding(severity, "skipped", each.stored, what, remedy=remedy)


def unquantized_but_not_skipped(subject: Subject) -> Iterator[Finding]:
    """Weights that the engine takes for codes: it looks for a scale that is not there."""
    if not subject.entry:
        return
    for each in subject.linears:
        if each.quantized or each.kind not in HIGH_PRECISION or each.skipped_by is not None:
            continue
        if subject.engine == "sglang" and subject.method == "w4afp8":
            what = (
                f"is {each.kind}, and SGLang's w4afp8 reads no skip list: it takes all linear layers for FP8"
            )
            remedy = "quantize it too, or use another layout"
        else:
            what = f"is {each.kind} but not on the skip list as {subject.engine} reads it"
            remedy = f"add {each.module!r} to the skip list"
        yield Finding("silent", "unlisted", each.stored, what, remedy=remedy)


def unlisted_others(subject: Subject) -> Iterator[Finding]:
    """Routers and the like: some models' layers are quantized by the list alone."""
    if not subject.entry or (subject.engine == "sglang" and subject.method == "w4afp8"):
        return
    family, missing = family_of(subject.config), []
    for name, signature in subject.tensors.items():
        entry = None if scaled_weight_name(name) in subject.tensors else skip_entry(name, signature)
        plain = entry is not None and keep_reason(name, signature[1], "BF16", family) is not None
        if plain and role_of(name) != "head" and entry is not None and subject.skipped(entry) is None:
            missing.append(entry)
    if missing:
        what = f"{len(missing)} unquantized modules are not on the skip list"
        remedy = "list their full module paths"
        yield Finding("warning", "unlisted", "config.json", what, got=missing[0], remedy=remedy)


def head(subject: Subject) -> Iterator[Finding]:
    """transformers makes an FP8 layer of an output head that is not listed, even of one that is tied."""
    plain = subject.tensors.get("lm_head.weight", ("BF16", ()))[0] in HIGH_PRECISION
    if subject.engine == "transformers" and subject.entry and plain and subject.skipped("lm_head") is None:
        tied = subject.config.get("tie_word_embeddings") is True
        what = ("is tied to the embedding" if tied else "is unquantized") + " but not on the skip list"
        remedy = "add 'lm_head' to the skip list"
        yield Finding("silent", "head", "lm_head", what, remedy=remedy)


def merged_skip(subject: Subject) -> Iterator[Finding]:
    """vLLM and SGLang run q/k/v, gate/up and q_a/kv_a as one layer each: all of it is listed, or nothing."""
    by_name = {each.name: each for each in subject.linears}
    for group in sharing_groups(by_name):
        skipped = [name for name in group if by_name[name].skipped_by is not None]
        if skipped and len(skipped) < len(group):
            other = next(name for name in group if name not in skipped)
            what = f"is on the skip list and {other} is not; {subject.engine} runs the two as one layer"
            yield Finding("error", "merged-skip", skipped[0], what, remedy="list all of them, or none")


def useless_entries(subject: Subject) -> Iterator[Finding]:
    """Entries that name no module are typos, or of another model."""
    modules = {name.rpartition(".")[0] for name in subject.tensors} | {"lm_head"}
    modules |= {part for name in [*modules] for part in _parents(name)}
    for entry in subject.skip:
        if not any(subject.match(entry, module) for module in modules):
            what = f"skip list entry {entry!r} names no module as {subject.engine} reads it"
            yield Finding("warning", "entry", "config.json", what, "full module paths")


def _parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts)))
