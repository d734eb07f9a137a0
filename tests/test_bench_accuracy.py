"""The table of accuracy in the README is what the committed results say."""

from pathlib import Path

from blockscale.testing.bench import load_module

ROOT = Path(__file__).parent.parent
bench = load_module(ROOT / "benchmarks" / "bench_accuracy.py")


def test_the_readme_has_the_figures_of_the_results():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    table = list(bench.table(bench.RESULTS))
    assert len(table) > 10
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table


def test_the_newest_record_of_a_case_counts(tmp_path):
    lines = bench.RESULTS.read_text(encoding="utf-8").splitlines()
    newer = lines[1].replace('"bytes": 162', '"bytes": 992')
    assert newer != lines[1]
    (tmp_path / "results.jsonl").write_text("\n".join([*lines, newer]), encoding="utf-8")
    table = list(bench.table(tmp_path / "results.jsonl"))
    assert len(table) == len(list(bench.table(bench.RESULTS)))
    assert sum("| 993 |" in line for line in table) == 1
