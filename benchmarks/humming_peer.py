"""humming-kernels (PyPI) as a peer of bench_w4a8.py: FP8 activations in groups of 128, INT4 weights."""

from __future__ import annotations

from typing import Any

import torch
from w4a8_problem import Problem, Run

from blockscale.reference.w4 import W4Weight, dequantize_w4


def humming_layer(w4: W4Weight) -> Any:
    """The same INT4 weights as one of its layers: codes + 8, scales in BF16."""
    from humming.layer import HummingLayer

    *lead, n, k = w4.shape
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": "uint4", "group_size": 128},
        input_config={"dtype": "float8e4m3", "group_size": 128},
        num_experts=lead[0] if lead else 0,
        torch_dtype=torch.bfloat16,
    ).cuda()
    words = torch.empty((*lead, n, k // 8), dtype=torch.int32, device="cuda")
    shifts = 4 * torch.arange(8, device="cuda")
    for expert in range(lead[0] if lead else 1):
        one = w4[expert] if lead else w4
        unscaled = W4Weight(one.words, torch.full_like(one.scale, 512.0), k, "int4")
        offset = (dequantize_w4(unscaled) + 8).to(torch.int64).view(n, -1, 8)
        packed = (offset << shifts).sum(-1)
        (words[expert] if lead else words).copy_((packed + 2**31) % 2**32 - 2**31)
    scale = (w4.scale / 512).transpose(-1, -2).to(torch.bfloat16).contiguous()
    layer.load_from_tensors({"weight": words, "weight_scale": scale})
    layer.transform()
    return layer


def run_humming(p: Problem, layer: Any) -> Run:
    """humming's product: contiguous rows without padding, as it wants them."""
    case = p.case
    if case.layout == "dense":
        scale = p.a_scale.contiguous()
        return lambda: layer(p.a, input_scale=scale, compute_config={"gemm_type": "dense"})
    if case.layout == "contiguous":
        a, scale = p.a.view(torch.uint8)[p.counted].view(torch.float8_e4m3fn), p.a_scale[p.counted]
        ends = torch.arange(case.experts + 1, device="cuda") * case.tokens
        return lambda: layer(
            a, input_scale=scale, expert_layout=ends, compute_config={"gemm_type": "grouped_contiguous"}
        )
    a, scale = p.a.flatten(0, 1), p.a_scale.contiguous().flatten(0, 1)
    return lambda: layer(
        a, input_scale=scale, expert_layout=p.rows, compute_config={"gemm_type": "grouped_masked"}
    )
