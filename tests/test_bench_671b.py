"""The benchmark of DeepSeek-V3 671B: bytes of the full shape, and a run of it in small."""

import importlib
import json
from pathlib import Path

import pytest

from blockscale.errors import BlockscaleError
from blockscale.group_spelling import parse_group_format
from blockscale.model.config import load_config
from blockscale.model.ranks import ONE
from blockscale.ops import _dequantized_w4a8
from tests.processes import torchrun

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("bench_671b")


def case(bench, experts="int4:g128"):
    config = load_config(bench.CONFIG).model_copy(update=bench.TINY)
    return bench.Case(config, parse_group_format(experts), ONE)


@pytest.mark.parametrize(
    ("experts", "gigabytes"), [("int4:g128", 356.25), ("int4:g128:ue8m0", 351.15), ("mxfp4", 366.47)]
)
def test_the_whole_model_has_the_bytes_that_plan_says(bench, experts, gigabytes):
    whole = bench.Case(load_config(bench.CONFIG), parse_group_format(experts), ONE)
    assert whole.stored(61) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_it_runs_in_small(bench, tmp_path, capsys):
    bench.main(["--config", "tiny", "--results", str(tmp_path / "found.jsonl")])
    (line,) = (tmp_path / "found.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    assert (found["layers"], found["ranks"], found["experts"]) == (3, 1, "int4:g128")
    kinds, experts = found["memory_bytes_by_kind"], 2 * 16 * 3 * 256 * 128
    assert kinds["4-bit codes"] == experts // 2
    assert kinds["4-bit scales"] == experts // 128 * 4
    assert sum(kinds.values()) == found["memory_bytes"] == found["all_layers"]["memory_bytes"]
    assert found["file_bytes"] == found["all_layers"]["file_bytes"] < found["memory_bytes"]
    assert [each["batch"] for each in found["decode"]] == [1, 2]
    assert all(0 < each["of_memory_floor"] < 1 for each in found["decode"])
    assert len(found["prefill_tokens_per_second"]) == 2
    assert "3 of 3 layers on 1 x cpu" in capsys.readouterr().out


def test_two_processes_share_the_experts(tmp_path):
    file = tmp_path / "found.jsonl"
    done = torchrun("benchmarks/bench_671b.py", "--config", "tiny", "--experts", "mxfp4", "--results", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["ranks"], len(found["memory_bytes_by_gpu"])) == (2, 2)
    assert found["memory_bytes_by_kind"]["4-bit codes"] == 2 * 16 * 3 * 256 * 128 // 2
    assert found["memory_bytes"] == found["all_layers"]["memory_bytes"] == sum(found["memory_bytes_by_gpu"])
    assert done.stdout.count("3 of 3 layers on 2 x cpu") == 1


def test_a_step_reads_the_experts_that_were_chosen(bench):
    """Of two sequences at least as many as of one, and never those of other processes."""
    made = case(bench)
    model = made.make(3)
    one, two = (bench.bytes_of_step(model, batch, 0, "different", made.own) for batch in (1, 2))
    none = bench.bytes_of_step(model, 1, 0, "different", range(0))
    per_expert = 3 * 256 * 128 * (0.5 + 4 / 128)
    assert one - none == 2 * 2 * per_expert  # two layers, two experts of a token
    assert one < two <= none + 2 * 4 * per_expert


def test_a_wrong_product_ends_it(bench, monkeypatch):
    real = _dequantized_w4a8.m_grouped_w4a8_gemm_nt_masked

    def wrong(*operands):
        real(*operands)
        operands[-1].mul_(1.01)

    monkeypatch.setattr(_dequantized_w4a8, "m_grouped_w4a8_gemm_nt_masked", wrong)
    with pytest.raises(BlockscaleError, match=r"m_grouped_w4a8_gemm_nt_masked, layers\.1\.mlp\.gate_up"):
        bench.check(case(bench), bench.SMALL)


def test_other_weights_than_the_dequantized_ones_end_it(bench, monkeypatch):
    real = bench.random_model

    def other(*arguments, compute, **options):
        return real(*arguments, compute=compute, seed=compute == "high", **options)

    monkeypatch.setattr(bench, "random_model", other)
    with pytest.raises(SystemExit, match="not the model of its dequantized weights: KL divergence"):
        bench.check(case(bench), bench.SMALL)


def test_layers_that_do_not_fit_are_left_out(bench, monkeypatch):
    made = case(bench)
    sizes = [bench.weight_bytes(made.make(layers)) for layers in (1, 2)]
    room = bench.RESERVE + sizes[0] + 3 * (sizes[1] - sizes[0]) // 2
    monkeypatch.setattr(bench, "free_bytes", lambda device: room)
    assert bench.depth(made, "auto")[0] == 2
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1 << 60)
    assert bench.depth(made, "auto")[0] == 3
    monkeypatch.setattr(bench, "free_bytes", lambda device: bench.RESERVE)
    with pytest.raises(SystemExit, match="no layer with experts fits"):
        bench.depth(made, "auto")
