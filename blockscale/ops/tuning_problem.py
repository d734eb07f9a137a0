"""A GEMM on the GPU to tune for: operands, the exact product, and a timer of each choice that gives it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from blockscale import reference
from blockscale.errors import BlockscaleError
from blockscale.metrics import calc_diff
from blockscale.ops import gemm_dispatch
from blockscale.ops.timing import captured, copies_past_cache
from blockscale.ops.tuning import KINDS, Case
from blockscale.ops.tuning_table import Choice

Timer = Callable[[], float]  # microseconds
_TOLERANCE = 1e-5  # of calc_diff: rounding to BF16 is 1e-6
_RESULTS = (torch.bfloat16, torch.float32)  # a table is asked whatever the type of the result
_GROUP = 128
_M_MAX = 128  # rows of an expert that a masked product has room for
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """Operands of a case.

    Attributes:
        operands: positional arguments of the operator, once for every copy of the weights.
        out: bfloat16, what all write to.
        exact: the product in float32, of the rows that count.
        counted: index of these rows in the result.
    """

    case: Case
    operands: tuple[tuple[Any, ...], ...]
    out: torch.Tensor
    exact: torch.Tensor
    counted: tuple[slice, ...]

    def timer(self, choice: Choice) -> Timer | None:
        """A timer of a choice whose product is right; None, with a line in the log, if there is none."""
        run = gemm_dispatch.chosen(self.case.op, choice)
        if run is None:
            return None
        try:
            for dtype in _RESULTS:
                diff = self._error(run, dtype)
                if not diff < _TOLERANCE:
                    _logger.warning("%s is wrong at %s: calc_diff %.2e; passed over", choice, self.case, diff)
                    return None
            calls = [partial(run, *each, **self._keywords(self.out)) for each in self.operands]
            return captured(calls)
        except torch.OutOfMemoryError:
            raise
        except (BlockscaleError, RuntimeError) as error:
            _logger.info("%s cannot run %s: %s", choice, self.case, error)
            return None

    def _error(self, run: Callable[..., torch.Tensor], dtype: torch.dtype) -> float:
        """calc_diff of a product, into an output poisoned before."""
        out = self.out if dtype == self.out.dtype else torch.empty_like(self.out, dtype=dtype)
        out.fill_(math.nan)
        run(*self.operands[0], **self._keywords(out))
        return calc_diff(out[self.counted], self.exact)

    def _keywords(self, out: torch.Tensor) -> dict[str, Any]:
        dense = {"bias": None, "out_dtype": out.dtype} if self.case.op == "fp8_gemm_nt" else {}
        return {**dense, "out": out}


def make_problem(case: Case, device: torch.device) -> Problem:
    """Gaussian operands, random scales; copies of the weights, more than the L2 cache holds."""
    generator = torch.Generator(device).manual_seed(0)
    m, n, k = case.sizes
    groups, kind = math.ceil(k / _GROUP), KINDS[case.op]
    lead = () if kind == "dense" else (case.experts,)
    rows = (case.experts, max(m, _M_MAX)) if kind == "masked" else (m,)

    def codes(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
        return (32 * values).to(torch.float8_e4m3fn)  # far from its largest number, 448

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device, generator=generator) + 0.5

    a = codes(*rows, k)
    a_scale = scales(*rows[:-1], groups, math.ceil(rows[-1] / 4) * 4)[..., : rows[-1]].mT
    b, b_scale = codes(*lead, n, k), scales(*lead, math.ceil(n / _GROUP), groups)
    rest: tuple[Any, ...] = ()
    if kind == "masked":
        rest = torch.full(lead, m, dtype=torch.int32, device=device), m
    elif kind == "contiguous":
        # The experts take turns, 128 rows each; some have none if there are more of them than turns.
        turns = torch.arange(m // _GROUP, device=device) % case.experts
        rest = (turns.sort().values.to(torch.int32).repeat_interleave(_GROUP),)
    counted = (slice(None), slice(m)) if kind == "masked" else (slice(None),)
    out = torch.empty(*rows, n, dtype=torch.bfloat16, device=device)
    wide = torch.empty_like(out, dtype=torch.float32)
    exact = getattr(reference, case.op)(a, a_scale, b, b_scale, *rest, out=wide, **_wide(case))[counted]
    copies = copies_past_cache(b.nbytes, device)
    weights = ((b.clone(), b_scale.clone()) for _ in range(copies))
    return Problem(case, tuple((a, a_scale, *each, *rest) for each in weights), out, exact, counted)


def _wide(case: Case) -> dict[str, torch.dtype]:
    return {"out_dtype": torch.float32} if case.op == "fp8_gemm_nt" else {}


def compile_tiles(cases_and_choices: Iterable[tuple[Case, Choice]]) -> None:
    """Compile the CUDA kernels of all choices, several at a time, into the cache on disk."""
    jobs = {
        (KINDS[case.op], choice.tile, out_float32)
        for case, choice in cases_and_choices
        if choice.tile is not None
        for out_float32 in (False, True)
    }
    if not jobs:
        return
    from blockscale.ops._cuda.compile import machine_code
    from blockscale.ops._cuda.fp8_gemm import kernel_sources

    def compile_one(job: tuple[Any, Any, bool]) -> None:
        with suppress(BlockscaleError):  # told by whoever wants to run it
            machine_code(*kernel_sources(*job, 0))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
