"""The Gluon names that differ between Triton 3.6 and later releases; kernels import them from here."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

# Renamed after 3.6; same arguments.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
