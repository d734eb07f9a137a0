"""The casts at memory speed, same signatures and same bits as `blockscale.reference`; one op a file."""

from blockscale.ops.dequantize_weight import dequantize_weight
from blockscale.ops.nonfinite import find_nonfinite
from blockscale.ops.quantize_activation import quantize_activation
from blockscale.ops.quantize_weight import quantize_weight

__all__ = ["dequantize_weight", "find_nonfinite", "quantize_activation", "quantize_weight"]
