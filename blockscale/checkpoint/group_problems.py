"""What headers and config.json show to be wrong with weights of fewer than 8 bits."""

from __future__ import annotations

from collections.abc import Mapping

from blockscale.checkpoint.group_storage import LowBitWeight, check_companions
from blockscale.checkpoint.problem import Problem
from blockscale.checkpoint.skip_list import Signature
from blockscale.compressed_tensors import ALL_LINEARS
from blockscale.errors import BlockscaleError
from blockscale.formats import scaled_weight_name
from blockscale.group_spelling import spell_group_format
from blockscale.quantization_config import Quantization


def group_problems(
    tensors: Mapping[str, Signature], quantization: Quantization, low: Mapping[str, LowBitWeight]
) -> list[Problem]:
    """Scales that are missing or do not fit, and weights that config.json describes wrongly or not at all."""
    problems = []
    for each in low.values():
        try:
            check_companions(each, tensors)
        except BlockscaleError as error:
            problems.append(Problem("error", each.codes, str(error)))
    everything = any(ALL_LINEARS in group.targets for group in quantization.low)
    companions = {name for each in low.values() for name in each.companions}
    for name, (dtype, shape) in tensors.items():
        is_scale = scaled_weight_name(name) in tensors or name in companions
        plain = not everything and len(shape) > 1 and not is_scale and name not in low
        declared = quantization.group_format_of(name) if plain else None
        if declared is not None:
            text = f"is {dtype} but config.json says {spell_group_format(declared)}"
            problems.append(Problem("error", name, text))
        elif dtype == "U8" and name not in low and f"{name}_scale" in tensors:
            problems.append(Problem("error", name, "is packed, and config.json does not say how"))
    return problems
