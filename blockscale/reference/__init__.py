"""The truth in plain PyTorch, on any device: slow, short, what every other implementation must equal."""

from blockscale.reference.fp8 import (
    dequantize_activation,
    dequantize_weight,
    find_nonfinite,
    is_power_of_two,
    quantize_activation,
    quantize_weight,
    round_up_to_power_of_two,
)

__all__ = [
    "dequantize_activation",
    "dequantize_weight",
    "find_nonfinite",
    "is_power_of_two",
    "quantize_activation",
    "quantize_weight",
    "round_up_to_power_of_two",
]
