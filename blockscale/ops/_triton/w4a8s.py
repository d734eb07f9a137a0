"""The Triton W4A8 GEMMs in one place, as `ops.w4a8_gemm` looks for them; arguments have been checked."""

from blockscale.ops._triton.w4a8 import w4a8_gemm_nt
from blockscale.ops._triton.w4a8_grouped import (
    m_grouped_w4a8_gemm_nt_contiguous,
    m_grouped_w4a8_gemm_nt_masked,
)

__all__ = ["m_grouped_w4a8_gemm_nt_contiguous", "m_grouped_w4a8_gemm_nt_masked", "w4a8_gemm_nt"]
