"""Casts and fused quantizers on one GPU: GB/s, and percent of a device copy of the same bytes.

    python benchmarks/bench_quantize.py [--cases activation silu] [--rounds 5] [--deepseek-kernel F]

Bytes are those that have to move: every input read once, every output written once. Every case of ours is
first compared with the reference, bit for bit; of a peer, the share of codes that differ is told. All are
then timed in one process, in rounds of random order, each round a median of `triton.testing.do_bench` with
the L2 cache flushed. Peers: the reference in eager PyTorch, torch.compile, and DeepSeek's `act_quant` if its
`inference/kernel.py` is given. Results: benchmarks/results/quantize.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from blockscale import ops, reference
from blockscale.ops._triton import quantize_weight as weight_kernels
from blockscale.ops.moe_permute import moe_permute, moe_unpermute
from blockscale.ops.rms_norm_quantize import rms_norm_quantize
from blockscale.ops.silu_mul_quantize import silu_mul_quantize
from blockscale.reference import fused, moe
from blockscale.testing.asserts import assert_bitwise_equal
from blockscale.testing.bench import (
    Spread,
    append_result,
    environment,
    flushed_microseconds,
    interleave,
    load_module,
)

RESULTS = Path(__file__).parent / "results" / "quantize.jsonl"
GROUP = 128
FLOOR = 1e-4
Tensors = tuple[torch.Tensor, ...]
Run = Callable[[], Tensors]


@dataclass(frozen=True)
class Case:
    """One op at one size: what it has to move, how to run it, what it has to give, and its peers."""

    name: str
    inputs: Tensors
    run: Run
    truth: Run
    peers: dict[str, Run] = field(default_factory=dict)


def gaussian(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal values on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(shape, device="cuda", dtype=dtype, generator=generator)


def activation(act_quant: Callable[..., Tensors] | None) -> Iterator[Case]:
    """quantize_activation in both layouts and formats of its scales."""
    for m, k in ((8192, 7168), (65536, 7168)):
        x = gaussian(m, k)
        peers: dict[str, Run] = {"torch.compile": _compiled(_quantize_rows, x)}
        if m == 8192:
            peers["eager torch"] = lambda x=x: reference.quantize_activation(x)
        if act_quant is not None:
            peers["DeepSeek act_quant"] = lambda x=x: act_quant(x, GROUP)
        yield Case(
            f"quantize_activation {m}x{k}",
            (x,),
            lambda x=x: ops.quantize_activation(x, scale_layout="column"),
            lambda x=x: reference.quantize_activation(x),
            peers,
        )
    x = gaussian(8192, 7168)
    options = {"row scales": {}, "ue8m0": {"scale_fmt": "ue8m0", "scale_layout": "column"}}
    for name, option in options.items():
        yield Case(
            f"quantize_activation 8192x7168 {name}",
            (x,),
            lambda option=option: ops.quantize_activation(x, **option),
            lambda option=option: reference.quantize_activation(x, **option),
        )
    wide = gaussian(8192, 7168, dtype=torch.float32)
    yield Case(
        "quantize_activation 8192x7168 F32",
        (wide,),
        lambda: ops.quantize_activation(wide),
        lambda: reference.quantize_activation(wide),
    )


def weight(_: object) -> Iterator[Case]:
    """quantize_weight, without and with the host's wait for the verdict on NaN and Inf; and the way back."""
    w = gaussian(18432, 7168)
    codes, scale = (
        torch.empty(w.shape, dtype=torch.float8_e4m3fn, device="cuda"),
        torch.empty(144, 56, device="cuda"),
    )
    blocks = w[None], codes[None], scale[None]

    def launch() -> Tensors:
        weight_kernels.quantize_weight(*blocks, (GROUP, GROUP), False)
        return codes, scale

    def truth() -> Tensors:
        return ops.quantize_weight(w, backend="reference")

    peers = {
        "torch.compile": _compiled(_quantize_blocks, w),
        "eager torch": lambda: reference.quantize_weight(w),
    }
    yield Case("quantize_weight 18432x7168, kernel", (w,), launch, truth, peers)
    yield Case("quantize_weight 18432x7168", (w,), lambda: ops.quantize_weight(w, out=(codes, scale)), truth)
    q, s = truth()
    for dtype in (torch.bfloat16, torch.float32):
        yield Case(
            f"dequantize_weight 18432x7168 to {str(dtype)[6:]}",
            (q, s),
            lambda dtype=dtype: (ops.dequantize_weight(q, s, dtype=dtype),),
            lambda dtype=dtype: (ops.dequantize_weight(q, s, dtype=dtype, backend="reference"),),
            {"torch.compile": _compiled(_dequantize_blocks, q, s)} if dtype == torch.bfloat16 else {},
        )


def silu(_: object) -> Iterator[Case]:
    """silu_mul_quantize at the width of a dense layer and of an expert."""
    for m, i in ((4096, 18432), (32768, 2048)):
        x = gaussian(m, 2 * i)
        yield Case(
            f"silu_mul_quantize {m}x2x{i}",
            (x,),
            lambda x=x: silu_mul_quantize(x, scale_layout="column"),
            lambda x=x: fused.silu_mul_quantize(x),
            {"torch.compile": _compiled(_silu_quantize, x), "eager torch": lambda x=x: _silu_quantize(x)},
        )


def rms(_: object) -> Iterator[Case]:
    """rms_norm_quantize with and without a residual."""
    x, residual, w = gaussian(16384, 7168), gaussian(16384, 7168) * 0.5, gaussian(7168) * 0.1 + 1
    for added in (None, residual):
        inputs = (x, w) if added is None else (x, w, added)
        yield Case(
            f"rms_norm_quantize 16384x7168{'' if added is None else ' + residual'}",
            inputs,
            lambda added=added: rms_norm_quantize(x, w, residual=added, scale_layout="column"),
            lambda added=added: fused.rms_norm_quantize(x, w, residual=added),
            {
                "torch.compile": _compiled(_norm_quantize, *inputs),
                "eager torch": lambda inputs=inputs: _norm_quantize(*inputs),
            },
        )


def permute(_: object) -> Iterator[Case]:
    """moe_permute of FP8 rows and scales, moe_unpermute of BF16 rows: 4096 tokens, 8 of 256 experts each."""
    codes, scale = ops.quantize_activation(gaussian(4096, 7168))
    ids = torch.rand(4096, 256, device="cuda").topk(8, dim=1).indices
    weights = torch.rand(4096, 8, device="cuda")
    expected = moe.moe_permute(codes, ids, 256, scale)
    used = expected.m_indices >= 0

    def there() -> Tensors:
        got = moe_permute(codes, ids, 256, scale)
        return got.positions, got.m_indices, got.rows, got.scale

    yield Case(
        "moe_permute 4096 tokens x 8, FP8",
        (codes, scale, ids),
        there,
        lambda: (
            expected.positions,
            expected.m_indices,
            expected.rows.view(torch.uint8)[used],
            expected.scale[used],
        ),
        {"torch gather": lambda: (codes.view(torch.uint8).repeat_interleave(8, dim=0),)},
    )
    rows = gaussian(len(used), 7168)
    yield Case(
        "moe_unpermute 4096 tokens x 8, BF16",
        (rows[: 4096 * 8], expected.positions, weights),
        lambda: (moe_unpermute(rows, expected.positions, weights),),
        lambda: (moe.moe_unpermute(rows, expected.positions, weights),),
    )


CASES = {"activation": activation, "weight": weight, "silu": silu, "rms": rms, "permute": permute}


def check(case: Case) -> int:
    """Compare ours with the truth, tell how peers differ, and count the bytes that have to move."""
    got, truth = case.run(), case.truth()
    if case.name.startswith("moe_permute"):
        used = got[1] >= 0
        got = (*got[:2], got[2].view(torch.uint8)[used], got[3][used])
    for number, (one, other) in enumerate(zip(got, truth, strict=True)):
        assert_bitwise_equal(one, other, f"{case.name}, output {number}")
    for name, run in case.peers.items():
        theirs = run()[0]
        if theirs.dtype == truth[0].dtype and theirs.dtype.itemsize == 1:
            differ = theirs.view(torch.uint8) != truth[0].view(torch.uint8)
            print(f"{case.name}: {name} differs in {100 * float(differ.float().mean()):.4f} % of the codes")
    return sum(tensor.nbytes for tensor in (*case.inputs, *truth))


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deepseek-kernel", type=Path)
    parser.add_argument("--no-append", action="store_true", help="print only")
    arguments = parser.parse_args()
    where = environment()
    kernel = arguments.deepseek_kernel
    act_quant = None if kernel is None else load_module(kernel).act_quant
    print(f"{where['machine']['gpu']}: microseconds, GB/s, percent of a copy of the same bytes")
    for name in arguments.cases:
        for case in CASES[name](act_quant):
            moved = check(case)
            source = torch.randint(0, 255, (moved // 2,), dtype=torch.uint8, device="cuda")
            target = torch.empty_like(source)
            runs = {"copy": lambda source=source, target=target: target.copy_(source), "ours": case.run}
            timers = {
                run: partial(flushed_microseconds, call) for run, call in {**runs, **case.peers}.items()
            }
            times = interleave(timers, arguments.rounds)
            spreads = {run: Spread.of(values) for run, values in times.items()}
            copy = spreads["copy"].median
            cells = [
                f"{run} {s.median:.1f} us ({moved / s.median / 1e3:.0f} GB/s, {100 * copy / s.median:.0f} %)"
                for run, s in spreads.items()
            ]
            print(f"{case.name}, {moved / 1e6:.0f} MB: " + " | ".join(cells), flush=True)
            record = {"benchmark": "quantize", "case": case.name, "bytes": moved, "rounds": arguments.rounds}
            if not arguments.no_append:
                microseconds = {run: asdict(spread) for run, spread in spreads.items()}
                append_result(RESULTS, {**record, "microseconds": microseconds, **where})


def _compiled(function: Callable[..., Tensors], *inputs: torch.Tensor) -> Run:
    compiled = torch.compile(function, dynamic=False)
    return lambda: compiled(*inputs)


def _quantize_rows(x: torch.Tensor) -> Tensors:
    groups = x.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(FLOOR) / 448.0
    codes = (groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes.flatten(-2), scale.squeeze(-1)


def _silu_quantize(x: torch.Tensor) -> Tensors:
    gate, up = x.float().chunk(2, dim=-1)
    return _quantize_rows((torch.nn.functional.silu(gate) * up).to(x.dtype))


def _norm_quantize(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor | None = None) -> Tensors:
    hidden = x if residual is None else x + residual
    wide = hidden.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    quantized = _quantize_rows(normalized.to(x.dtype) * w)
    return quantized if residual is None else (*quantized, hidden)


def _quantize_blocks(w: torch.Tensor) -> Tensors:
    blocks = w.float().view(w.shape[0] // GROUP, GROUP, w.shape[1] // GROUP, GROUP)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.where(amax == 0, 1.0, (amax / 448.0).clamp_min(2.0**-126))
    codes = (blocks / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes.view(w.shape), scale[:, 0, :, 0]


def _dequantize_blocks(codes: torch.Tensor, scale: torch.Tensor) -> Tensors:
    blocks = codes.view(scale.shape[0], GROUP, scale.shape[1], GROUP).float() * scale[:, None, :, None]
    return (blocks.view(codes.shape).to(torch.bfloat16),)


if __name__ == "__main__":
    main()
