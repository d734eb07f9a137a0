"""Tensors that are hard to quantize: each maker is deterministic in its seed and says what is hard."""

from __future__ import annotations

import torch

from blockscale.formats import E4M3_MAX

Shape = tuple[int, ...]


def gaussian(shape: Shape, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Weights of a trained layer: normal with deviation 0.02, and one value in 1000 up to 30 times larger."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 0.02
    outlier = torch.rand(shape, generator=generator) < 1e-3
    factor = 1 + 29 * torch.rand(shape, generator=generator)
    return torch.where(outlier, x * factor, x).to(dtype)


def wide_range(shape: Shape, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Magnitudes over 24 binades, zeros of both signs: subnormal and zero codes beside saturated ones."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-20, 4, shape, generator=generator)
    x = torch.ldexp(torch.randn(shape, generator=generator), exponent)
    kind = torch.rand(shape, generator=generator)
    x = torch.where(kind < 0.05, torch.zeros(()), x)
    return torch.where(kind > 0.95, -torch.zeros(()), x).to(dtype)


def zero_block(
    shape: Shape, block_size: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Gaussian, but the first block of every matrix is all zeros of alternating sign."""
    x = gaussian(shape, dtype)
    corner = x[..., : block_size[0], : block_size[1]]
    corner.zero_()
    corner[..., 1::2].neg_()
    return x


def around_powers_of_two(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Powers of two among the normal float32 numbers, one ulp below and above: where log2 rounds wrong."""
    exponents = torch.arange(-125, 127)
    powers = torch.ldexp(torch.ones(exponents.shape), exponents)
    bits = powers.view(torch.int32)
    return torch.stack([(bits + step).view(torch.float32) for step in (-1, 0, 1)]).to(dtype)


def e4m3_ties() -> torch.Tensor:
    """float32 row of every value halfway between two E4M3 numbers, both signs, and 448: scale exactly 1."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    ties = (codes[1:] + codes[:-1]) / 2
    return torch.cat([ties, -ties, torch.tensor([E4M3_MAX])]).unsqueeze(0)


def e4m3_boundary() -> torch.Tensor:
    """float32 row around the largest codes, one ulp either side of 416 and 432, with amax exactly 448."""
    points = torch.tensor([416.0, 432.0, 448.0]).view(torch.int32)
    around = torch.cat([points - 1, points, points[:2] + 1]).view(torch.float32)
    return torch.cat([around, -around]).unsqueeze(0)


def denormals(shape: Shape, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Subnormal BF16 or float32 values with a few of the smallest normal ones: scales at their minimum."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-(1 << 23), 1 << 23, shape, generator=generator).to(torch.float32) * 2.0**-149
    return torch.where(torch.rand(shape, generator=generator) < 0.02, x.sign() * 2.0**-126, x).to(dtype)


def huge(shape: Shape, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Values over the top eight binades of the dtype, its largest number among them."""
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(dtype).max
    x = torch.ldexp(torch.rand(shape, generator=generator), torch.randint(-8, 1, shape, generator=generator))
    x = x.clamp_max(1.0) * largest * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
    x.view(-1)[0] = largest
    return x.to(dtype)


def all_bf16() -> torch.Tensor:
    """Every finite BF16 bit pattern once, ascending as unsigned integers: 65280 values."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    return every[every.isfinite()]
