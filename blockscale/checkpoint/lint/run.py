"""Lint a checkpoint for an engine: read headers and config.json, and ask every rule."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blockscale.checkpoint.index import INDEX_NAME, CheckpointIndex, read_index
from blockscale.checkpoint.lint import config_rules, model_rules, scale_rules, shape_rules, skip_rules
from blockscale.checkpoint.lint.finding import Finding
from blockscale.checkpoint.lint.skipping import ENGINES, Engine
from blockscale.checkpoint.lint.subject import Subject, subject_of
from blockscale.checkpoint.model_config import read_config
from blockscale.checkpoint.plan import signatures
from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError, CorruptCheckpointError

Rule = Callable[[Subject], Iterator[Finding]]

_ALL: tuple[Rule, ...] = (
    config_rules.known_method,
    config_rules.readable,
    config_rules.declared,
    config_rules.activation_scheme,
    config_rules.scale_format,
    skip_rules.quantized_but_skipped,
    skip_rules.unquantized_but_not_skipped,
    skip_rules.unlisted_others,
    skip_rules.useless_entries,
    scale_rules.fp8_scales,
    scale_rules.stray_scales,
    scale_rules.group_scales,
    shape_rules.merged_precision,
    model_rules.kept_roles,
    model_rules.mtp_layer,
)
_SERVERS: tuple[Rule, ...] = (
    config_rules.block_size,
    skip_rules.merged_skip,
    shape_rules.merged_rows,
    shape_rules.tensor_parallel,
)
RULES: dict[Engine, tuple[Rule, ...]] = {
    "vllm": (*_ALL, *_SERVERS, shape_rules.w4a8_kernels, shape_rules.three_bits),
    "sglang": (
        *(*_ALL, *_SERVERS),
        *(config_rules.w4afp8_block_size, config_rules.mixed_precision, model_rules.w4afp8_experts),
    ),
    "transformers": (*_ALL, skip_rules.head, shape_rules.ragged_grid, shape_rules.activation_groups),
}


@dataclass(frozen=True)
class Lint:
    """What an engine would stumble over.

    Attributes:
        source: of the checkpoint.
        engine: that is to load it.
        tp: ranks of tensor parallelism.
        findings: errors first, then what is silently wrong, then warnings.
    """

    source: str
    engine: Engine
    tp: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """No error, and nothing that is silently wrong."""
        return all(finding.severity == "warning" for finding in self.findings)


def lint_checkpoint(
    src: str | os.PathLike[str], engine: Engine, *, tp: int = 1, revision: str | None = None
) -> Lint:
    """Check a checkpoint against the loading rules of an engine; weights and scales are not read.

    Args:
        src: folder, Hub repository id or fsspec URL.
        engine: "vllm", "sglang" or "transformers".
        tp: ranks of tensor parallelism, which vLLM and SGLang cut layers for.
        revision: of a Hub repository.

    Raises:
        BlockscaleError: no checkpoint there, or an unknown engine.
    """
    if engine not in ENGINES:
        raise BlockscaleError("unknown engine", expected=" | ".join(ENGINES), got=repr(engine))
    if tp < 1:
        raise BlockscaleError("bad number of ranks", where="tp", expected="1 or more", got=tp)
    source = open_source(src, revision)
    config = read_config(source)
    try:
        index = read_index(source)
    except CorruptCheckpointError as error:
        return Lint(source.spec, engine, tp, (Finding("error", "index", source.spec, str(error)),))
    subject = subject_of(engine, signatures(index), config, tp)
    found = [*_total_size(index), *(finding for rule in RULES[engine] for finding in rule(subject))]
    order = ("error", "silent", "warning")
    return Lint(source.spec, engine, tp, tuple(sorted(found, key=lambda each: order.index(each.severity))))


def _total_size(index: CheckpointIndex) -> Iterator[Finding]:
    declared = (index.index_metadata or {}).get("total_size")
    if declared not in (None, index.total_size, str(index.total_size)):
        expected, got = str(index.total_size), str(declared)
        yield Finding("warning", "index", INDEX_NAME, "total_size is not that of the tensors", expected, got)
