"""Operands of GEMMs that are audited, and a fault in their results."""

import torch

from blockscale import ops
from blockscale.ops import gemm_dispatch
from blockscale.testing import data

M, N, K = 6, 144, 320  # ragged blocks and groups


def weight(*shape, seed=1, scale_fmt="float32"):
    """An original weight, and its codes and scales."""
    original = data.gaussian(shape, seed=seed)
    return original, *ops.quantize_weight(original, scale_fmt=scale_fmt)


def activations(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def plant(monkeypatch, position, value):
    """Make every backend return `value` at `position`."""
    find = gemm_dispatch.implementation

    def broken(*args):
        run = find(*args)

        def fault(*operands, out, **more):
            run(*operands, out=out, **more)
            out[position] = value
            return out

        return fault

    monkeypatch.setattr(gemm_dispatch, "implementation", broken)
