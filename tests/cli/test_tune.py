"""`blockscale tune`: the sizes it takes from a model or the command line, what it prints, its errors."""

import json

import pytest
import torch

from blockscale.cli.products import Products, merged, products_of
from blockscale.ops import tuning_run
from blockscale.ops._cuda.configs import FewTile
from blockscale.ops.tuning_run import Outcome
from blockscale.ops.tuning_table import Choice
from tests import data

ATTENTION = "model.layers.0.self_attn."
SHAPES = {
    f"{ATTENTION}q_a_proj.weight": (1536, 7168),
    f"{ATTENTION}kv_a_proj_with_mqa.weight": (576, 7168),
    f"{ATTENTION}o_proj.weight": (7168, 16384),
    "model.layers.3.mlp.shared_experts.gate_proj.weight": (2048, 7168),
    "model.layers.3.mlp.shared_experts.up_proj.weight": (2048, 7168),
    "model.layers.3.mlp.shared_experts.down_proj.weight": (7168, 2048),
}
DENSE = ((576, 7168), (1536, 7168), (2048, 7168), (2112, 7168), (4096, 7168), (7168, 2048), (7168, 16384))


def _experts(layer, count):
    names = {"gate_proj": (512, 1024), "up_proj": (512, 1024), "down_proj": (1024, 512)}
    path = f"model.layers.{layer}.mlp.experts."
    return {f"{path}{expert}.{name}.weight": s for expert in range(count) for name, s in names.items()}


def test_dense_weights_count_alone_and_as_engines_merge_them():
    assert merged(SHAPES) == Products(DENSE)


def test_experts_count_with_gate_and_up_as_one():
    found = merged({**SHAPES, **_experts(3, 8), **_experts(4, 8)})
    assert found == Products(DENSE, ((1024, 512), (1024, 1024)), 8)


def test_fused_experts_count_in_either_order_of_axes():
    path = "model.layers.0.mlp.experts."
    stored = {f"{path}gate_up_proj": (4, 512, 256), f"{path}down_proj": (4, 256, 128)}
    assert merged(stored) == Products((), ((256, 128), (512, 256)), 4)
    swapped = {name: (e, k, n) for name, (e, n, k) in stored.items()}
    assert merged(swapped, swapped=True) == merged(stored)


def test_sizes_that_no_kernel_takes_are_left_out():
    assert merged({f"{ATTENTION}o_proj.weight": (7168, 100)}) == Products(())


def test_a_model_has_the_same_products_before_and_after_quantizing(tmp_path, blockscale):
    source = data.write(tmp_path / "source", data.deepseek_v3(), shards=3)
    assert blockscale("quantize", source, tmp_path / "fp8")[0] == 0
    found = products_of(str(source))
    assert found.dense
    assert found.grouped
    assert found.experts > 1
    assert products_of(str(tmp_path / "fp8")) == found
    assert products_of(str(source / "config.json")) == found


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU by name, on which every second product has a choice that is twice as fast."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning_run, "find_gpu", lambda: (torch.device("cuda", 0), "Test GPU"))
    asked = []

    def tune(cases, device, path, show):
        asked.append((cases, path))
        best, builtin = Choice("cuda", FewTile(16, splits=2)), Choice("triton")
        found = tuple(Outcome(c, best, 10.0 / (1 + i % 2), builtin, 10.0, 7) for i, c in enumerate(cases))
        for outcome in found:
            show(outcome)
        return found

    monkeypatch.setattr(tuning_run, "tune", tune)
    return asked


def test_shapes_of_the_command_line_are_tuned(gpu, blockscale, tmp_path):
    arguments = ("--shape", "4096,7168", "--shape", "7168,2048", "--rows", "1,100")
    code, out, err = blockscale("tune", *arguments)
    assert code == 0
    ((cases, path),) = gpu
    assert [case.sizes for case in cases] == [
        (m, n, k) for n, k in ((4096, 7168), (7168, 2048)) for m in (1, 128)
    ]
    assert path == tmp_path / "blockscale" / "tuning" / "test-gpu.jsonl"
    assert "dense N=4096 K=7168 M=128: 10.0 -> 5.0 us, 2.00 x, cuda FewTile(rows=16, splits=2)" in err
    assert len(err.splitlines()) == 4
    assert "Test GPU: a faster choice for 2 of 4, 1.414 x over all" in out
    assert out.endswith(f"table: {path}\n")


def test_experts_make_the_products_grouped(gpu, blockscale):
    assert blockscale("tune", "--shape", "4096,7168", "--rows", "16,4096", "--experts", 8)[0] == 0
    ((cases, _),) = gpu
    assert [(case.op.rpartition("_")[2], case.experts) for case in cases] == [
        ("masked", 8),
        ("contiguous", 8),
    ]


def test_a_model_is_tuned_for_one_json_object(gpu, blockscale, tmp_path):
    source = data.write(tmp_path / "source", data.deepseek_v3(), shards=3)
    code, out, err = blockscale("tune", source, "--rows", "16", "--output", tmp_path / "mine.jsonl", "--json")
    assert (code, err) == (0, "")
    ((cases, path),) = gpu
    assert path == tmp_path / "mine.jsonl"
    assert {case.op.rpartition("_")[2] for case in cases} == {"nt", "masked"}
    found = json.loads(out)
    assert (found["gpu"], found["table"]) == ("Test GPU", str(path))
    assert len(found["outcomes"]) == len(cases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "blockscale tune: give a model or --shape N,K, one of them"),
        (("model", "--shape", "16,16"), "blockscale tune: give a model or --shape N,K, one of them"),
        (("--shape", "16"), "--shape: not a shape (expected N,K, got '16')"),
        (("--shape", "16,x"), "--shape: not a shape (expected N,K, got '16,x')"),
        (("--shape", "16,16", "--rows", "0"), "--rows: not a list of rows (expected 1,16,4096, got '0')"),
        (
            ("--shape", "16,24"),
            "no FP8 GEMM has this size (expected N and K multiples of 16, got N = 16, K = 24)",
        ),
    ],
)
def test_errors_are_one_line(gpu, blockscale, arguments, message):
    assert blockscale("tune", *arguments) == (2, "", f"{message}\n")


def test_without_a_gpu_it_says_so(blockscale, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = blockscale("tune", "--shape", "16,16")
    assert (code, out, err) == (2, "", "blockscale tune: no CUDA GPU here; run it where the model runs\n")
