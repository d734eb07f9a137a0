"""The truth in plain PyTorch, on any device: slow, short, what every other implementation must equal."""

from blockscale.reference.fp4 import fp8_from_mxfp4, nvfp4_scale
from blockscale.reference.fp8 import (
    dequantize_activation,
    dequantize_weight,
    find_nonfinite,
    is_power_of_two,
    quantize_activation,
    quantize_weight,
    round_up_to_power_of_two,
)
from blockscale.reference.fused import rms_norm_quantize, silu_mul_quantize
from blockscale.reference.gemm import (
    fp8_gemm_nt,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from blockscale.reference.group import dequantize_group, quantize_group
from blockscale.reference.moe import moe_permute, moe_unpermute
from blockscale.reference.w4 import W4Weight, dequantize_w4, prepare_w4
from blockscale.reference.w4a8 import (
    m_grouped_w4a8_gemm_nt_contiguous,
    m_grouped_w4a8_gemm_nt_masked,
    w4a8_gemm_nt,
)

__all__ = [
    "W4Weight",
    "dequantize_activation",
    "dequantize_group",
    "dequantize_w4",
    "dequantize_weight",
    "find_nonfinite",
    "fp8_from_mxfp4",
    "fp8_gemm_nt",
    "is_power_of_two",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "m_grouped_w4a8_gemm_nt_contiguous",
    "m_grouped_w4a8_gemm_nt_masked",
    "moe_permute",
    "moe_unpermute",
    "nvfp4_scale",
    "prepare_w4",
    "quantize_activation",
    "quantize_group",
    "quantize_weight",
    "rms_norm_quantize",
    "round_up_to_power_of_two",
    "silu_mul_quantize",
    "w4a8_gemm_nt",
]
