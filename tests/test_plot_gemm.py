"""The picture of the GEMM benchmark: latest records, geometric means, a file that is a picture."""

import json
from pathlib import Path

import pytest

from blockscale.testing.bench import load_module
from blockscale.testing.shapes import GEMM_SHAPES

pytest.importorskip("matplotlib")
plot = load_module(Path(__file__).parent.parent / "benchmarks" / "plot_gemm.py")


def _record(m, n, k, date, gpu="H100", timing="graph", **microseconds):
    where = {"m_n_k": [m, n, k], "timing": timing, "date": date, "machine": {"gpu": gpu}}
    return {**where, "microseconds": {name.replace("_", " "): each for name, each in microseconds.items()}}


def _write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_best_round_of_the_latest_record_of_the_latest_gpu_counts(tmp_path):
    records = [
        _record(1, 16, 16, "2026-11-23", deepgemm=[3.0, 1.0, 2.0]),
        _record(1, 16, 16, "2026-11-22", deepgemm=[9.0]),
        _record(16, 16, 16, "2026-11-22", deepgemm=[7.0]),
        _record(16, 16, 16, "2026-11-22", deepgemm=[8.0]),
        _record(1, 16, 16, "2026-11-21", timing="flushed", deepgemm=[5.0]),
        _record(64, 16, 16, "2026-11-22", gpu="A100", deepgemm=[5.0]),
    ]
    gpu, tables = plot.latest(_write(tmp_path / "gemm.jsonl", records))
    assert gpu == "H100"
    assert tables["graph"] == {(1, 16, 16): {"deepgemm": 1.0}, (16, 16, 16): {"deepgemm": 8.0}}
    assert tables["flushed"] == {(1, 16, 16): {"deepgemm": 5.0}}


def test_a_point_is_the_geometric_mean_over_all_weights():
    # Every weight at 2 TFLOPS, but one at 128: the mean is 2 * 64 ** (1 / 6) = 4.
    table = {(16, n, k): {"deepgemm": 2e-6 * 16 * n * k / 2, "bf16 matmul": 1.0} for n, k in GEMM_SHAPES}
    first = (16, *GEMM_SHAPES[0])
    table[first] = {"deepgemm": table[first]["deepgemm"] / 64}
    table[8192, 8192, 8192] = {"deepgemm": 1.0}
    assert plot.mean_tflops(table) == {"deepgemm": {16: pytest.approx(4.0)}}


def test_a_picture_is_drawn_from_what_there_is(tmp_path):
    records = [
        _record(m, n, k, "2026-11-22", blockscale_auto=[1.0], deepgemm=[2.0])
        for m in (1, 4096)
        for n, k in GEMM_SHAPES
    ]
    path = tmp_path / "images" / "gemm.png"
    plot.draw(path, *plot.latest(_write(tmp_path / "gemm.jsonl", records)))
    assert path.read_bytes().startswith(b"\x89PNG")
