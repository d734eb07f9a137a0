"""Choose block sizes by the values of the weights: measure every candidate on every weight, then judge.

Weights are read once more for it, strip by strip as the converter does, in parallel threads on the CPU. A
strip is 128 rows or a multiple, whole blocks of every candidate, and sums run in float64 in an order that
depends on the tensor alone: threads and interruptions do not change the choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from blockscale import ops
from blockscale.checkpoint.block_choice import CANDIDATES, BlockChoice, Measured, choose
from blockscale.checkpoint.blocks import is_free
from blockscale.checkpoint.families import Family, family_of, stored_block_size
from blockscale.checkpoint.index import TensorEntry
from blockscale.checkpoint.names import sharing_groups
from blockscale.checkpoint.plan import ConversionPlan
from blockscale.checkpoint.progress import Progress, Silent
from blockscale.checkpoint.recipe import Recipe
from blockscale.checkpoint.scan import scan
from blockscale.checkpoint.source import Source
from blockscale.checkpoint.strips import Reader, Span, nonfinite_of, strips
from blockscale.errors import NonFiniteError
from blockscale.formats import ScaleFmt, scale_shape, tensor_nbytes

STRIP_ROWS = math.lcm(*(side for size in CANDIDATES for side in size))


def choose_blocks(
    plan: ConversionPlan,
    source: Source,
    recipe: Recipe,
    workers: int | None = None,
    progress: Progress | None = None,
) -> BlockChoice:
    """The block sizes of all weights of a plan that are free.

    In the DeepSeek layout all of them have the same, else those that engines fuse.

    Args:
        plan: made without a choice.
        source, recipe: what it was made of.
        workers: threads; None means one a core and two more.
        progress: told of bytes read and weights measured.

    Raises:
        NonFiniteError: a weight holds NaN or Inf.
    """
    free = [
        task.source
        for shard in plan.shards
        for task in shard.tasks
        if task.action == "quantize" and is_free(task.source.name, recipe)
    ]
    names, progress = {entry.name for entry in free}, progress or Silent()
    family = family_of(plan.config)
    progress.start(sum(entry.nbytes for entry in free), len(free))

    def look(entry: TensorEntry, reader: Reader) -> Measured | None:
        if entry.name not in names:
            return None
        parts = strips(entry, reader, STRIP_ROWS)
        try:
            found = measure(entry.shape, parts, family, recipe.scale_fmt)
        except NonFiniteError as error:
            raise nonfinite_of(entry, reader) or error from None
        progress.advance(entry.nbytes, 1)
        return found

    measured = {entry.name: found for entry, found in scan(plan, source, workers, look) if found is not None}
    groups = [tuple(measured)] if recipe.layout == "deepseek" and measured else sharing_groups(measured)
    alone = measured.keys() - {name for group in groups for name in group}
    groups += [(name,) for name in measured if name in alone]
    return BlockChoice(plan.digest(), choose([{name: measured[name] for name in group} for group in groups]))


def measure(
    shape: tuple[int, ...], parts: Iterable[tuple[Span, torch.Tensor]], family: Family, scale_fmt: ScaleFmt
) -> Measured:
    """The figures of a weight for every candidate.

    Args:
        shape: (N, K) or that of fused experts.
        parts: of it, all rows in strips of `STRIP_ROWS` or a multiple; BF16, F16 or F32.
        family: says on which axis of fused experts the outputs are.
        scale_fmt: of the scales.

    Raises:
        NonFiniteError: a part holds NaN or Inf.
    """
    sizes = [stored_block_size(size, shape, family) for size in CANDIDATES]
    by_row = sizes[-1] == CANDIDATES[-1]  # else the axes are stored as (in, out)
    signal = torch.zeros(math.prod(shape[:-2]), shape[-2] if by_row else shape[-1], dtype=torch.float64)
    noise = torch.zeros(len(sizes), *signal.shape, dtype=torch.float64)
    for span, strip in parts:
        here = slice(span.row, span.row + span.rows) if by_row else slice(None)
        exact = strip.float()
        signal[span.expert, here] += _power(exact, by_row)
        for place, size in enumerate(sizes):
            codes, scale = ops.quantize_weight(strip, size, scale_fmt, threads=1)
            difference = ops.dequantize_weight(codes, scale, size, torch.float32, threads=1).sub_(exact)
            noise[place, span.expert, here] += _power(difference, by_row)
    heard = signal > 0
    means = [float((each[heard] / signal[heard]).mean()) if heard.any() else 0.0 for each in noise]
    scales = (tensor_nbytes("F32", scale_shape(shape, size)) for size in sizes)
    return Measured(math.prod(shape), tuple(means), tuple(scales))


def _power(values: torch.Tensor, by_row: bool) -> torch.Tensor:
    """Sums of squares in float64 over rows, or columns."""
    return torch.linalg.vector_norm(values, dim=1 if by_row else 0, dtype=torch.float64).square()
