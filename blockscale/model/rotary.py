"""Rotary position embedding, plain or stretched by YaRN.

Pair i of a head's rotary dimensions turns by position * f_i, f_i = theta^(-2i/d). YaRN (Peng et al. 2023,
section 3.2) divides by `factor` the frequencies that make fewer than beta_slow turns within the original
context, keeps those that make more than beta_fast, and blends linearly between.
"""

from __future__ import annotations

import math

import torch

from blockscale.model.architecture import ModelConfig
from blockscale.reference.attention import RotaryTable


def frequencies(config: ModelConfig) -> torch.Tensor:
    """f_i in radians per position, float32 (qk_rope_head_dim / 2,)."""
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return plain

    def pair_of(turns: float) -> float:
        """The (fractional) pair that makes so many turns within the original context."""
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    return plain / yarn.factor * stretched + plain * (1 - stretched)


def rotary_table(config: ModelConfig, device: torch.device) -> RotaryTable:
    """cos and sin of every position that the config allows."""
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angle = positions[:, None] * frequencies(config)
    scale = config.rope_attention_scale
    cos, sin = (scale * angle.cos()).to(device), (scale * angle.sin()).to(device)
    return RotaryTable(cos, sin, config.rope_interleave)
