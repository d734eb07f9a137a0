"""The operators at the speed of the machine, same signatures as `blockscale.reference`; one op a file."""

from blockscale.ops import operators as operators  # registers torch.ops.blockscale.*
from blockscale.ops.dequantize_group import dequantize_group
from blockscale.ops.dequantize_w4 import dequantize_w4
from blockscale.ops.dequantize_weight import dequantize_weight
from blockscale.ops.fake_quantize import fake_quantize_activation, fake_quantize_weight
from blockscale.ops.gemm import (
    fp8_gemm_nt,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from blockscale.ops.gemm_audit import GemmAudit, audit_gemms, is_auditing
from blockscale.ops.gemm_audit_records import GemmLimits, GemmRecord
from blockscale.ops.gemm_dispatch import GemmBackend
from blockscale.ops.given_scale import fake_quantize_scaled, quantize_scaled, scaled_gradients
from blockscale.ops.mla import mla_decode, mla_prefill, mla_prefill_quantize, mla_prologue
from blockscale.ops.moe_permute import moe_permute, moe_permute_masked, moe_unpermute
from blockscale.ops.moe_route import moe_choose, moe_route
from blockscale.ops.nonfinite import find_nonfinite, flag_nonfinite
from blockscale.ops.prepare_w4 import prepare_w4
from blockscale.ops.quantize_activation import quantize_activation
from blockscale.ops.quantize_group import quantize_group
from blockscale.ops.quantize_weight import quantize_weight
from blockscale.ops.rms_norm_quantize import Normed, rms_norm, rms_norm_quantize
from blockscale.ops.rounding import descend_columns, round_columns
from blockscale.ops.silu_mul_quantize import silu_mul, silu_mul_quantize
from blockscale.ops.transpose_codes import transpose_codes
from blockscale.ops.w4a8_gemm import (
    m_grouped_w4a8_gemm_nt_contiguous,
    m_grouped_w4a8_gemm_nt_masked,
    w4a8_gemm_nt,
)

__all__ = [
    "GemmAudit",
    "GemmBackend",
    "GemmLimits",
    "GemmRecord",
    "Normed",
    "audit_gemms",
    "dequantize_group",
    "dequantize_w4",
    "dequantize_weight",
    "descend_columns",
    "fake_quantize_activation",
    "fake_quantize_scaled",
    "fake_quantize_weight",
    "find_nonfinite",
    "flag_nonfinite",
    "fp8_gemm_nt",
    "is_auditing",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "m_grouped_w4a8_gemm_nt_contiguous",
    "m_grouped_w4a8_gemm_nt_masked",
    "mla_decode",
    "mla_prefill",
    "mla_prefill_quantize",
    "mla_prologue",
    "moe_choose",
    "moe_permute",
    "moe_permute_masked",
    "moe_route",
    "moe_unpermute",
    "prepare_w4",
    "quantize_activation",
    "quantize_group",
    "quantize_scaled",
    "quantize_weight",
    "rms_norm",
    "rms_norm_quantize",
    "round_columns",
    "scaled_gradients",
    "silu_mul",
    "silu_mul_quantize",
    "transpose_codes",
    "w4a8_gemm_nt",
]
