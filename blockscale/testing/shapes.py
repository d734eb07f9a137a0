"""Weight shapes that tests and benchmarks use, as (N, K) = (out features, in features)."""

from __future__ import annotations

# DeepSeek-V3 attention: weight -> (shape, shape of its 128 x 128 scale grid). 576 rows leave half a block.
DEEPSEEK_V3_ATTENTION: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "q_a_proj": ((1536, 7168), (12, 56)),
    "q_b_proj": ((24576, 1536), (192, 12)),
    "kv_a_proj_with_mqa": ((576, 7168), (5, 56)),
    "kv_b_proj": ((32768, 512), (256, 4)),
    "o_proj": ((7168, 16384), (56, 128)),
}
# Feed-forward: dense layers, routed and shared experts (gate and up as one, and down).
DEEPSEEK_V3_FEED_FORWARD: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "dense_gate_proj": ((18432, 7168), (144, 56)),
    "dense_down_proj": ((7168, 18432), (56, 144)),
    "expert_gate_up_proj": ((4096, 7168), (32, 56)),
    "expert_down_proj": ((7168, 2048), (56, 16)),
}
DEEPSEEK_V3 = {**DEEPSEEK_V3_ATTENTION, **DEEPSEEK_V3_FEED_FORWARD}

# Casts are timed on one shape that fills memory with whole blocks, and one whose rows end in half a block.
CAST_SHAPES: tuple[tuple[int, int], ...] = ((16384, 7168), (18432, 576))

# Dense GEMMs are timed on these weights (N, K) of DeepSeek-V3: q_a + kv_a, q_b, kv_b, o, gate + up, down.
GEMM_SHAPES: tuple[tuple[int, int], ...] = (
    (2112, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
)
