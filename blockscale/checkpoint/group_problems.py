"""What headers and config.json show to be wrong with weights of fewer than 8 bits."""

from __future__ import annotations

from collections.abc import Mapping

from blockscale.checkpoint.groups import PACKED, check_group_scale, group_scale_name
from blockscale.checkpoint.problem import Problem
from blockscale.checkpoint.skip_list import Signature
from blockscale.errors import BlockscaleError
from blockscale.formats import scaled_weight_name
from blockscale.group_spelling import WrittenFormat, spell_group_format
from blockscale.quantization_config import Quantization


def group_problems(
    tensors: Mapping[str, Signature], quantization: Quantization, low: Mapping[str, WrittenFormat]
) -> list[Problem]:
    """Scales that are missing or do not fit, and weights that config.json describes wrongly or not at all."""
    problems = []
    for name, fmt in low.items():
        try:
            check_group_scale(name, fmt, tensors)
        except BlockscaleError as error:
            problems.append(Problem("error", name, str(error)))
    for name, (dtype, shape) in tensors.items():
        is_scale = scaled_weight_name(name) in tensors
        declared = quantization.group_format_of(name) if len(shape) > 1 and not is_scale else None
        if declared is not None and dtype != PACKED:
            text = f"is {dtype} but config.json says {spell_group_format(declared)}"
            problems.append(Problem("error", name, text))
        elif dtype == PACKED and name not in low and group_scale_name(name) in tensors:
            problems.append(Problem("error", name, "is packed, and config.json does not say how"))
    return problems
