"""Latent attention around its cache: the fast form of `blockscale.reference.attention`."""

from __future__ import annotations

import torch

from blockscale.ops import dispatch
from blockscale.reference import attention
from blockscale.reference.attention import CacheSlots, RotaryTable

_HALF = (torch.bfloat16, torch.float16)


def mla_prologue(
    query: torch.Tensor,
    compressed: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    table: RotaryTable,
    slots: CacheSlots,
    *,
    backend: dispatch.Backend = "auto",
) -> None:
    """Turn the rotary part of queries in place and put latents and rotary keys into the cache; one pass.

    Args:
        query: (T, H, D), the last R of D rotary; unit stride along D.
        compressed: (T, C + R), latent before its norm and rotary key before its turn; rows at any stride.
        norm: (C,), weight of the latent's RMSNorm.
        eps: of this norm.
        table: of the rotary embedding.
        slots: where the tokens are put.
        backend: "auto" takes the fastest that works for the tensors' device.

    Raises:
        BlockscaleError: dtypes or widths that do not fit together, unknown backend.
    """
    op = "mla_prologue"
    attention.check_prologue(op, query, compressed, norm, slots)
    kernels = dispatch.triton_kernels(op, op, query.device, backend)
    if kernels is None:
        attention.mla_prologue(query, compressed, norm, eps, table, slots)
    elif query.numel():
        kernels.mla_prologue(query, compressed, norm, eps, table, slots)


def mla_decode(
    latent: torch.Tensor,
    rope: torch.Tensor,
    slots: CacheSlots,
    scale: float,
    longest: int,
    *,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Attention of single queries to what their sequences have cached, with float32 sums.

    A sequence is divided among programs, as many as `longest` asks for, so that few queries fill a GPU.

    Args:
        latent: (T, H, C), queries in the space of the latents; any strides with unit stride along C.
        rope: (T, H, R), turned; any strides with unit stride along R.
        slots: of the queries' own tokens; a query sees its sequence up to and with its own position.
        scale: factor of the scores.
        longest: cached tokens to look at, more than any position: a hint on the device, not read from it.
        backend: "auto" takes the fastest that works for the tensors' device.

    Returns:
        (T, H, C), of the dtype of latent.

    Raises:
        BlockscaleError: dtypes or widths that do not fit together, unknown backend.
    """
    op = "mla_decode"
    attention.check_decode(op, latent, rope, slots)
    kernels = dispatch.triton_kernels(op, op, latent.device, backend)
    # Products of float32 would be TF32 on tensor cores.
    if kernels is None or latent.dtype not in _HALF:
        return attention.mla_decode(latent, rope, slots, scale, longest)
    out = torch.empty(latent.shape, dtype=latent.dtype, device=latent.device)
    if out.numel():
        kernels.mla_decode(latent, rope, slots, scale, longest, out)
    return out
