"""Linear layers on weights as they are stored: BF16 or float32, or E4M3 codes with block scales.

    y = x W^T + b

FP8 weights are multiplied with activations quantized on the way, 1 x 128 groups in the checkpoint's scale
format. With `compute="high"` they are dequantized instead and activations stay as they are: what GPUs without
FP8 arithmetic need, and what shows how much the activations' quantization costs. Weights in blocks other than
128 x 128, which no FP8 GEMM takes, are dequantized always.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from blockscale import ops
from blockscale.formats import BlockFP8, ScaleFmt
from blockscale.reference import W4Weight

Compute = Literal["fp8", "high"]
_DEFAULT = BlockFP8()
GROUP = 128  # of activations, and the K step of every FP8 GEMM


@dataclass(frozen=True)
class W4Experts:
    """The experts of a layer with 4-bit weights (E, N, K), multiplied with FP8 activations.

    Attributes:
        weight: prepared.
        fmt: has the scale format of activations.
        compute: "fp8" to quantize activations, "high" to dequantize the weight instead.
    """

    weight: W4Weight
    fmt: BlockFP8
    compute: Compute = "fp8"

    @property
    def is_fp8(self) -> bool:
        """Whether products run on quantized activations."""
        return self.compute == "fp8"

    @property
    def quantizes(self) -> ScaleFmt | None:
        """Scales of the activations that it multiplies; None if it takes activations as they are."""
        return self.fmt.scale_fmt if self.is_fp8 else None


@dataclass(frozen=True)
class Linear:
    """One weight, or several of the same input one below the other.

    Attributes:
        weight: (N, K), or (E, N, K) for the experts of a layer; float8_e4m3fn or the dtype of the model.
        scale: float32 (..., ceil(N/bn), ceil(K/bk)) if the weight is FP8, else None.
        fmt: block size and scale format of an FP8 weight.
        bias: (N,) or None.
        compute: "fp8" to quantize activations, "high" to dequantize the weight instead.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    fmt: BlockFP8 = _DEFAULT
    bias: torch.Tensor | None = None
    compute: Compute = "fp8"

    @property
    def is_fp8(self) -> bool:
        """Whether products run on quantized activations."""
        return self.scale is not None and self.compute == "fp8" and self.fmt.block_size == (GROUP, GROUP)

    @property
    def quantizes(self) -> ScaleFmt | None:
        """Scales of the activations that it multiplies; None if it takes activations as they are."""
        return self.fmt.scale_fmt if self.is_fp8 else None

    def on(self, x: ops.Normed) -> torch.Tensor:
        """The product with a norm, quantized as `quantizes` says; (T, N), of the dtype of the norm."""
        if x.codes is None or x.scale is None:
            assert x.y is not None
            return self(x.y)
        return self.multiply(x.codes, x.scale, x.hidden.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, K) -> (T, N), of the dtype of x."""
        if not self.is_fp8:
            return F.linear(x, self.dequantized(x.dtype), self.bias)
        return self.multiply(*self.quantize(x), x.dtype)

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of activations (T, K), as `multiply` reads them."""
        return ops.quantize_activation(x, GROUP, self.fmt.scale_fmt, scale_layout="column")

    def multiply(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Quantized (T, K) -> (T, N)."""
        assert self.scale is not None
        out_dtype = dtype if dtype == torch.bfloat16 else torch.float32
        product = ops.fp8_gemm_nt(codes, scale, self.weight, self.scale, bias=self.bias, out_dtype=out_dtype)
        return product.to(dtype)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in `dtype`; not a copy if it is stored so."""
        if self.scale is None:
            return self.weight.to(dtype)
        return ops.dequantize_weight(self.weight, self.scale, self.fmt.block_size, dtype=dtype)
