"""Latent attention around its cache: the fast form of `blockscale.reference.attention`."""

from __future__ import annotations

from types import ModuleType

import torch

from blockscale.formats import ScaleFmt, activation_format
from blockscale.ops import dispatch, gemm_audit
from blockscale.ops.quantize_activation import quantize_activation
from blockscale.reference import attention
from blockscale.reference.attention import CacheSlots, RotaryTable, Spans
from blockscale.reference.fp8 import empty_scale
from blockscale.reference.fused import rms_norm

_HALF = (torch.bfloat16, torch.float16)
_GROUP = 128  # values of a scale, of activations


def mla_prologue(
    query: torch.Tensor,
    compressed: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    table: RotaryTable,
    slots: CacheSlots,
    scale_fmt: ScaleFmt | None = None,
    *,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Turn the rotary part of queries in place and put latents and rotary keys into the cache; one pass.

    Args:
        query: (T, H, D), the last R of D rotary; unit stride along D.
        compressed: (T, C + R), latent before its norm and rotary key before its turn; rows at any stride.
        norm: (C,), weight of the latent's RMSNorm.
        eps: of this norm.
        table: of the rotary embedding.
        slots: where the tokens are put.
        scale_fmt: quantize the latents too, in groups of 128 with such scales, for a product; None not to.
        backend: "auto" takes the fastest that works for the tensors' device.

    Returns:
        With a scale format: of the normalized latents, as `quantize_activation(latent, 128, scale_fmt,
        "column")`, codes (T, C) and scales (T, ceil(C/128)), column-major.

    Raises:
        BlockscaleError: dtypes or widths that do not fit together, unknown scale format or backend.
    """
    op = "mla_prologue"
    attention.check_prologue(op, query, compressed, norm, slots)
    fmt = None if scale_fmt is None else activation_format(_GROUP, scale_fmt)
    kernels = dispatch.triton_kernels(op, op, query.device, backend)
    if kernels is None:
        latent = attention.mla_prologue(query, compressed, norm, eps, table, slots)
        if fmt is None:
            return None
        return quantize_activation(latent, _GROUP, fmt.scale_fmt, "column", backend=backend)
    quantized = None
    if fmt is not None:
        tokens, width = query.shape[0], norm.shape[0]
        codes = torch.empty((tokens, width), dtype=torch.float8_e4m3fn, device=query.device)
        quantized = codes, empty_scale((tokens, -(-width // _GROUP)), "column", query.device)
    if query.numel():
        kernels.mla_prologue(query, compressed, norm, eps, table, slots, quantized, scale_fmt)
        if quantized is not None and gemm_audit.current is not None:
            gemm_audit.current.remember(quantized[0], rms_norm(compressed[:, : norm.shape[0]], norm, eps))
    return quantized


def mla_prefill(
    query: torch.Tensor,
    expanded: torch.Tensor,
    slots: CacheSlots,
    spans: Spans,
    scale: float,
    *,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Attention of new tokens to their sequences, with float32 sums; all sequences in one launch.

    Args:
        query: (T, H, N + R), the last R turned; any strides with unit stride along the last dimension.
        expanded: (S, H, N + V), keys without their rotary part, then values, of all tokens of the sequences,
            cached ones and new ones; strides as those of query.
        slots: of the new tokens; rotary keys of all of them are in its cache.
        spans: of the new tokens.
        scale: factor of the scores.
        backend: "auto" takes the fastest that works for the tensors' device.

    Returns:
        (T, H, V), of the dtype of query.

    Raises:
        BlockscaleError: dtypes, shapes or widths that do not fit together, unknown backend.
    """
    op = "mla_prefill"
    attention.check_prefill(op, query, expanded, slots, spans)
    kernels = _for_tensor_cores(op, query, backend)
    if kernels is None:
        return attention.mla_prefill(query, expanded, slots, spans, scale)
    value = expanded.shape[-1] - query.shape[-1] + slots.keys.shape[-1]
    out = torch.empty((*query.shape[:2], value), dtype=query.dtype, device=query.device)
    if out.numel():
        kernels.mla_prefill(query, expanded, slots.keys, spans, scale, out)
    return out


def mla_prefill_quantize(
    query: torch.Tensor,
    expanded: torch.Tensor,
    slots: CacheSlots,
    spans: Spans,
    scale: float,
    scale_fmt: ScaleFmt = "float32",
    *,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_activation(mla_prefill(...).flatten(1), 128, scale_fmt, "column"), in one pass on the GPU.

    Args:
        query, expanded, slots, spans, scale, backend: as of `mla_prefill`.
        scale_fmt: of the scales.

    Returns:
        codes: float8_e4m3fn (T, H V).
        scales: float32 (T, ceil(H V / 128)), column-major.

    Raises:
        BlockscaleError: dtypes, shapes or widths that do not fit together, unknown scale format or backend.
    """
    op = "mla_prefill_quantize"
    fmt = activation_format(_GROUP, scale_fmt)
    attention.check_prefill(op, query, expanded, slots, spans)
    value = expanded.shape[-1] - query.shape[-1] + slots.keys.shape[-1]
    kernels = _for_tensor_cores("mla_prefill", query, backend)
    if kernels is None or not kernels.quantizes(value):
        out = mla_prefill(query, expanded, slots, spans, scale, backend=backend)
        return quantize_activation(out.flatten(1), _GROUP, fmt.scale_fmt, "column", backend=backend)
    tokens, heads, _ = query.shape
    codes = torch.empty((tokens, heads, value), dtype=torch.float8_e4m3fn, device=query.device)
    scales = empty_scale((tokens, heads), "column", query.device)
    if codes.numel():
        kernels.mla_prefill(query, expanded, slots.keys, spans, scale, codes, scales, fmt.scale_fmt)
        if gemm_audit.current is not None:
            plain = mla_prefill(query, expanded, slots, spans, scale, backend=backend)
            gemm_audit.current.remember(codes.flatten(1), plain.flatten(1))
    return codes.flatten(1), scales


def _for_tensor_cores(op: str, query: torch.Tensor, backend: dispatch.Backend) -> ModuleType | None:
    """The kernels, or None for the reference; products of float32 would be TF32."""
    kernels = dispatch.triton_kernels(op, op, query.device, backend)
    return kernels if query.dtype in _HALF else None


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
    kernels = _for_tensor_cores(op, latent, backend)
    if kernels is None:
        return attention.mla_decode(latent, rope, slots, scale, longest)
    out = torch.empty(latent.shape, dtype=latent.dtype, device=latent.device)
    if out.numel():
        kernels.mla_decode(latent, rope, slots, scale, longest, out)
    return out
