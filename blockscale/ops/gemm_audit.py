"""Which GEMM loses precision, where, and whether its arithmetic or the quantization of its operands does.

    with audit_gemms(limits=GemmLimits(calc_diff=1e-6)) as audit:
        model(tokens)
    print(audit.summary())

Within the block every GEMM of FP8 activations, with FP8 or with 4-bit weights, also runs in float32, on the
dequantized operands and, as far as they are known, on the original ones; `gemm_audit_figures` says what is
compared. It costs the GEMM several times over, memory for copies of the activations that are in use, and
waits for the device: a mode for looking, not for serving. Outside the block an op tests one attribute of this
module.

Activations: the ops that quantize remember what they quantized (`gemm_audit_originals`); fused ones compute
it again by unfused ways. Weights: `weights` tells their originals. A call is named by `audit.site`, by
`names`, or by the nearest line of code that is not this package's nor PyTorch's.

What runs without Python is not seen: a CUDA graph that was captured before replays without a record, and to
capture one is refused. The model asks `is_auditing` and runs eagerly. In code compiled by `torch.compile` the
GEMMs are seen, the quantization of their activations is not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

from blockscale.errors import BlockscaleError
from blockscale.ops.gemm_audit_figures import FP8Weight, Gemm, Operands, Segment, Weight, measure
from blockscale.ops.gemm_audit_originals import Originals
from blockscale.ops.gemm_audit_records import GemmLimits, GemmRecord, check_limits, table

T = TypeVar("T")
OfWeight = Mapping[torch.Tensor, T] | Callable[[torch.Tensor], T | None]

# The audit that runs, of the whole process; the ops' only test when there is none.
current: GemmAudit | None = None
_NOT_SITES = tuple(os.path.dirname(path) + os.sep for path in (__file__, torch.__file__))
_COMPILED = "<eval_with_key>"  # file name of code that torch.compile writes


def is_auditing() -> bool:
    """Whether GEMMs are audited now, and so have to be called from Python, not replayed from a CUDA graph."""
    return current is not None


@contextmanager
def audit_gemms(
    *,
    limits: GemmLimits | None = None,
    names: OfWeight[str] | None = None,
    weights: OfWeight[torch.Tensor] | None = None,
) -> Iterator[GemmAudit]:
    """Audit every FP8 or W4A8 GEMM in the block; of nested blocks the inner one sees its calls alone.

    For one thread: what other threads call meanwhile is audited as well, in no order.

    Args:
        limits: beyond which a call raises, after it was recorded; without them nothing raises.
        names: of call sites, by the weight that is multiplied: a mapping from FP8 weights or the words of
            4-bit ones, or a function that returns None for those it does not know.
        weights: originals by weight, in the same way: of its shape, of any floating dtype and device.

    Raises:
        BlockscaleError: within the block: a call beyond the limits, an original that does not have the shape
            of its weight, a CUDA graph that is being captured.
    """
    global current
    audit, outer = GemmAudit(limits, names, weights), current
    current = audit
    try:
        yield audit
    finally:
        current = outer
        audit.forget()


class GemmAudit:
    """What was seen; `audit_gemms` makes one."""

    def __init__(
        self,
        limits: GemmLimits | None,
        names: OfWeight[str] | None,
        weights: OfWeight[torch.Tensor] | None,
    ) -> None:
        """Arguments of `audit_gemms`."""
        self._limits = limits or GemmLimits()
        self._name_of, self._original_of = _by_weight(names), _by_weight(weights)
        self._records: dict[tuple[object, ...], GemmRecord] = {}
        self._originals, self._sites = Originals(), list[str]()

    @property
    def records(self) -> tuple[GemmRecord, ...]:
        """One for every site, operator and shape of a weight, in the order of their first calls."""
        return tuple(self._records.values())

    def summary(self) -> str:
        """The records as a table of text: calc_diff of every part, and where the largest error is."""
        return table(self.records)

    @contextmanager
    def site(self, name: str) -> Iterator[None]:
        """Name the GEMMs of a block; names of blocks within blocks, and of weights, are joined by dots."""
        self._sites.append(name)
        try:
            yield
        finally:
            self._sites.pop()

    def forget(self) -> None:
        """Free the activations that were remembered; records stay."""
        self._originals = Originals()

    def remember(self, codes: torch.Tensor, original: torch.Tensor) -> None:
        """For ops that quantize: codes (..., K) that they return, and what was quantized, (..., K)."""
        if _runs(codes):
            self._originals.put(codes, original)

    def remember_moved(self, codes: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """For ops that permute: copies of rows of codes.

        Args:
            codes: (T, K).
            rows: (..., K), contiguous; flattened, row positions[t, j] is codes[t] for every j.
            positions: int32 (T, topk), -1 where there is none.
        """
        if not _runs(codes):
            return
        original = self._originals.find(codes) if codes.dtype == torch.float8_e4m3fn else None
        if original is not None:
            token, slot = (positions >= 0).nonzero(as_tuple=True)
            moved = original.new_zeros(rows.numel() // rows.shape[-1], rows.shape[-1])
            moved[positions[token, slot].long()] = original[token]
            self._originals.put(rows, moved.view(rows.shape))

    def dense(self, operands: Operands, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """For GEMMs, after the call: all rows count."""
        if _runs(out):
            every = Segment(0, torch.arange(len(out), device=out.device))
            self._check("gemm_nt", operands, out, [every], bias)

    def contiguous(self, operands: Operands, out: torch.Tensor, m_indices: torch.Tensor) -> None:
        """For GEMMs, after the call: rows count that have an expert."""
        if _runs(out):
            experts = [expert for expert in m_indices.unique().tolist() if expert >= 0]
            segments = [Segment(expert, (m_indices == expert).nonzero().squeeze(1)) for expert in experts]
            self._check("gemm_nt_contiguous", operands, out, segments)

    def masked(self, operands: Operands, out: torch.Tensor, masked_m: torch.Tensor) -> None:
        """For GEMMs, after the call: the first rows of every expert count."""
        if _runs(out):
            rows = torch.arange(out.shape[0] * out.shape[1], device=out.device).view(out.shape[:2])
            counts = [(expert, count) for expert, count in enumerate(masked_m.tolist()) if count]
            segments = [Segment(expert, rows[expert, :count]) for expert, count in counts]
            self._check("gemm_nt_masked", operands, out, segments)

    def _check(
        self,
        form: str,
        operands: Operands,
        out: torch.Tensor,
        segments: list[Segment],
        bias: torch.Tensor | None = None,
    ) -> None:
        if not segments:
            return
        a, _, b = operands
        *lead, n, k = b.shape
        site, experts = self._site(b), lead[0] if lead else None
        key = site, _operator(form, b), experts, n, k
        known = self._records.get(key)
        gemm = Gemm(operands, out, tuple(segments), bias, self._originals.find(a), self._weight(b))
        with torch.no_grad():
            figures = measure(gemm, known.calls + 1 if known else 1)
        rows = sum(len(segment.rows) for segment in segments)
        record = GemmRecord(*key, 1, rows, rows, **vars(figures))
        self._records[key] = known.merged(record) if known else record
        check_limits(record, self._limits)

    def _weight(self, b: Weight) -> torch.Tensor | None:
        original = self._original_of(_codes(b))
        if original is not None and tuple(original.shape) != b.shape:
            where, got = f"audit_gemms: original of the weight of {self._site(b)}", list(original.shape)
            raise BlockscaleError("wrong shape", where=where, expected=list(b.shape), got=got)
        return original

    def _site(self, b: Weight) -> str:
        name = self._name_of(_codes(b))
        parts = self._sites if name is None else [*self._sites, name]
        return ".".join(parts) if parts else _calling_line()


def _codes(weight: Weight) -> torch.Tensor:
    """The tensor that a weight is known by."""
    return weight.codes if isinstance(weight, FP8Weight) else weight.words


def _operator(form: str, weight: Weight) -> str:
    """Name of the operator that multiplies such a weight in a form as `gemm_nt_masked`."""
    grouped = "m_grouped_" if len(weight.shape) == 3 else ""
    return f"{grouped}{'fp8' if isinstance(weight, FP8Weight) else 'w4a8'}_{form}"


def _by_weight(source: OfWeight[T] | None) -> Callable[[torch.Tensor], T | None]:
    """A function from a weight; of a mapping, from any tensor object of the same memory and shape."""
    if source is None:
        return lambda weight: None
    if callable(source):
        return source
    # The mapping is kept: while its weights live, no other tensor has their memory.
    kept = {(key.data_ptr(), key.shape): (key, value) for key, value in source.items()}
    return lambda weight: kept.get((weight.data_ptr(), weight.shape), (None, None))[1]


def _calling_line() -> str:
    """folder/file:line function of the nearest frame outside of the ops and of PyTorch."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith((*_NOT_SITES, _COMPILED)):
        if frame.f_back is None:
            return "unknown"
        frame = frame.f_back
    code = frame.f_code
    place = "/".join(code.co_filename.split(os.sep)[-2:])
    return f"{place}:{frame.f_lineno} {getattr(code, 'co_qualname', code.co_name)}"


def _runs(tensor: torch.Tensor) -> bool:
    """Whether an op runs now, instead of being compiled; to put it into a CUDA graph is refused."""
    if torch.compiler.is_compiling():
        return False
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise BlockscaleError(
            "GEMMs cannot be audited while a CUDA graph is captured",
            where="audit_gemms",
            remedy="call them from Python, as code does that asks blockscale.ops.is_auditing()",
        )
    return True
