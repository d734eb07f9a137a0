"""Pages say what the results say, in tables and in figures."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from blockscale.checkpoint.recipe import Recipe, read_recipe
from blockscale.evaluate.windows import Estimate
from blockscale.report import diagnosis as diagnosis_sections
from blockscale.report.page import render
from blockscale.report.pages import diagnose_page, evaluate_page, quantize_page, search_page
from blockscale.report.search import pareto
from blockscale.report.wording import kind_of, layer_of, number, percent, short
from blockscale.search.run import Measurement
from blockscale.wording import size
from tests.report import examples
from tests.report.parsed import Parsed


@pytest.fixture(scope="module")
def quantized(converted):
    return Parsed(render(quantize_page(converted)))


@pytest.fixture(scope="module")
def diagnosed(diagnosis, converted):
    return Parsed(render(diagnose_page(diagnosis, converted.destination, converted.source)))


def sizes_of(folder):
    return {path.name: path.stat().st_size for path in Path(folder).iterdir() if path.is_file()}


def test_quantize_shows_sizes_of_both(quantized, converted):
    assert quantized.headings[1:] == ["Sizes", "Recipe", "Files", "Versions"]
    rows = quantized.table("role", "format", "before", "after")
    assert rows[-1][2:4] == [size(converted.input_bytes), size(converted.output_bytes)]
    (experts,) = [row for row in rows if row[:2] == ["experts", "FP8"]]
    assert experts[2] == "\N{EN DASH}"
    assert int(experts[5]) == 2 * 4 * 3  # two sparse layers of four experts
    drawn = sum(sum(trace["x"]) for trace in quantized.traces("bar"))
    assert drawn == converted.input_bytes + converted.output_bytes


def test_checksums_are_those_of_the_manifest_and_shards_are_not_read(converted, monkeypatch):
    from blockscale.checkpoint.source import Source

    read, whole = Source.read, []

    def spy(self, name, start=0, length=None):
        whole.extend([name] if length is None else [])
        return read(self, name, start, length)

    monkeypatch.setattr(Source, "read", spy)
    found = Parsed(render(quantize_page(converted)))
    assert not [name for name in whole if name.endswith(".safetensors")]
    rows = {row[0]: row[1:] for row in found.table("file", "size", "SHA-256")}
    assert set(sizes_of(converted.destination)) <= set(rows)
    manifest = json.loads((Path(converted.destination) / "blockscale.json").read_text())
    for name, digest in manifest["files"].items():
        assert rows[name][1] == digest
    own = hashlib.sha256((Path(converted.destination) / "blockscale.json").read_bytes()).hexdigest()
    assert rows["blockscale.json"][1] == own
    assert rows["model.safetensors"][1] == f"of its {len(manifest['tensors'])} tensors, in blockscale.json"


def test_without_a_manifest_only_small_json_is_hashed(converted):
    found = Parsed(render(evaluate_page(examples.evaluation(converted.source, None), examples.WINDOWS)))
    rows = {row[0]: row[2] for row in found.table("file", "size", "SHA-256")}
    config = (Path(converted.source) / "config.json").read_bytes()
    assert rows["config.json"] == hashlib.sha256(config).hexdigest()
    assert rows["model.safetensors"] == "not computed"


def test_the_recipe_can_be_used(quantized, tmp_path):
    (tmp_path / "recipe.json").write_text(quantized.code[0])
    assert read_recipe(tmp_path / "recipe.json") == Recipe()


def test_versions(quantized):
    versions = dict(quantized.table("what", "version"))
    assert {"blockscale", "Python", "torch"} <= set(versions)


def test_diagnose_ranks_what_modules_cost(diagnosed, diagnosis):
    costs = sorted({tensor.cost for tensor in diagnosis.tensors}, key=lambda cost: -cost.kl)
    rows = diagnosed.table("module", "KL, nats")
    assert [row[0] for row in rows] == [cost.name for cost in costs]
    assert [row[1] for row in rows] == [number(cost.kl) for cost in costs]
    (ranking,) = [
        figure for figure in diagnosed.figures if figure["layout"]["xaxis"]["title"]["text"] == "nats a token"
    ]
    assert ranking["data"][0]["x"] == [cost.kl for cost in costs[:25]]


def test_the_heatmaps_hold_the_worst_of_each_cell(diagnosed, diagnosis):
    kl, _, noise = diagnosed.traces("heatmap")
    assert noise["y"] == ["0", "1", "2"]
    assert noise["x"][:2] == ["q_a_proj", "q_b_proj"]
    row, column = noise["y"].index("1"), noise["x"].index("experts up_proj")
    experts = [t for t in diagnosis.tensors if ".layers.1.mlp.experts." in t.name and "up_proj" in t.name]
    assert len(experts) == 4
    assert noise["z"][row][column] == min(t.weight.sqnr_db for t in experts)
    assert kl["z"][row][column] == pytest.approx(math.log10(max(t.cost.kl for t in experts)))
    # The first layer is dense: it has no experts.
    assert noise["z"][0][column] is None
    assert noise["reversescale"]
    assert not kl["reversescale"]


def test_every_weight_is_in_the_table(diagnosed, diagnosis):
    rows = diagnosed.table("tensor", "role")
    assert [row[0] for row in rows] == [tensor.name for tensor in diagnosis.tensors]
    first = diagnosis.tensors[0].weight
    assert rows[0][4] == f"{first.sqnr_db:.1f}"
    assert rows[0][7:10] == [percent(share) for share in (first.outliers, first.saturated, first.flushed)]


def test_the_worst_tensors_have_their_histogram(diagnosed, diagnosis):
    rows = diagnosed.table("tensor", "values")
    names = [tensor.name for tensor in diagnosis.tensors[:6]]
    assert [row[0] for row in rows] == names
    drawn = [figure for figure in diagnosed.figures if "log2" in figure["layout"]["xaxis"]["title"]["text"]]
    assert len(drawn) == len(names)
    for figure, tensor in zip(drawn, diagnosis.tensors, strict=False):
        bars = {trace["name"]: trace["y"] for trace in figure["data"] if trace["type"] == "bar"}
        assert sum(bars["saturated"]) == pytest.approx(tensor.weight.saturated)
        assert len(figure["data"][-1]["x"]) == 126


def test_a_diagnosis_of_weights_alone_has_no_sensitivity(diagnosis, converted):
    plain = replace(
        diagnosis, tensors=tuple(replace(tensor, cost=None) for tensor in diagnosis.tensors), keep=()
    )
    found = Parsed(render(diagnose_page(plain, converted.destination, converted.source)))
    assert "Sensitivity" not in found.headings
    assert len(found.traces("heatmap")) == 1


def test_faults_come_first_and_are_told(diagnosis, converted):
    first = replace(diagnosis.tensors[0], weight=None, problems=("FP8 weight <b>without</b> a scale",))
    spoilt = replace(diagnosis, tensors=(first, *diagnosis.tensors[1:]))
    found = Parsed(render(diagnose_page(spoilt, converted.destination, converted.source)))
    assert found.headings[1] == "Faults"
    assert found.table("where", "what") == [[first.name, first.problems[0]]]
    assert found.table("tensor", "values")[0][0] != first.name  # it has no scale to divide by


def test_long_tables_are_cut_and_say_so(diagnosis, monkeypatch):
    monkeypatch.setattr(diagnosis_sections, "_ROWS", 5)
    parts = [part for section in diagnosis_sections.sections(diagnosis, ()) for part in section.parts]
    assert max(len(part.rows) for part in parts if part.kind == "table") == 5
    said = [part.text for part in parts if part.kind == "note" and "--json" in part.text]
    assert any(f"the first 5 of {len(diagnosis.tensors)} rows" in text for text in said)


def test_evaluate_shows_figures_with_intervals(converted):
    result = examples.evaluation(converted.destination, converted.source)
    found = Parsed(render(evaluate_page(result, examples.WINDOWS)))
    rows = {row[0]: row[1:] for row in found.table("figure", "value")}
    kl = result.scores.against.kl
    assert rows["KL divergence, nats a token"] == [f"{kl.value:.5f}", f"{kl.low:.5f} to {kl.high:.5f}"]
    assert len(rows) == 5
    (line,) = [trace for trace in found.traces("scatter") if trace["mode"] == "lines+markers"]
    assert line["x"] == [score.begin for score in examples.WINDOWS]
    assert line["y"] == [score.kl / score.tokens for score in examples.WINDOWS]
    assert len(found.table("first token")) == len(examples.WINDOWS)
    versions = dict(found.table("what", "version"))
    assert versions["dtype"] == "torch.float32"
    assert "GEMMs" not in found.headings


def test_one_window_has_no_interval_and_no_reference_no_ratio(converted):
    result = examples.evaluation(converted.source, None, examples.WINDOWS[:1])
    found = Parsed(render(evaluate_page(result, examples.WINDOWS[:1])))
    (row,) = found.table("figure", "value")
    assert row == ["perplexity", f"{result.scores.perplexity.value:.3f}", "too few for an interval"]


def test_the_audit_of_gemms_is_a_table(converted):
    result = replace(examples.evaluation(converted.source, None), gemms=(examples.gemm("layers.0<o>"),))
    (row,) = Parsed(render(evaluate_page(result, ()))).table("site", "operator")
    dash = "\N{EN DASH}"
    assert row[:5] == ["layers.0<o>", "fp8_gemm_nt", "256 x 128", "4", "40"]
    assert row[5:10] == ["1e-09", "0.25", "0.0007", dash, dash]
    assert row[10:] == ["25.00 %", "2.00 %", "3.00 %", "1", "12.5"]


def test_tasks_alone_are_a_page_too(converted):
    plain = examples.evaluation(converted.source, None)
    result = replace(plain, text=None, scores=None, tasks=examples.TASKS)
    found = Parsed(render(evaluate_page(result, ())))
    assert "Figures" not in found.headings
    arc, gsm = found.table("task", "metric")
    first = examples.TASKS[0]
    assert arc[:5] == ["arc_easy", "acc", "100", "0", f"{first.score.value:.4f}"]
    low, high = first.difference.low, first.difference.high
    assert arc[6:] == [
        f"{first.reference.value:.4f}",
        f"{first.difference.value:.4f}",
        f"{low:.4f} to {high:.4f}",
    ]
    assert "questions of the same set for gsm8k." in found.source
    assert gsm[6:] == ["\N{EN DASH}"] * 3


def test_a_text_and_tasks_share_a_page(converted):
    result = replace(examples.evaluation(converted.destination, converted.source), tasks=examples.TASKS)
    found = Parsed(render(evaluate_page(result, examples.WINDOWS)))
    assert found.headings[1:3] == ["Figures", "Tasks"]
    assert len(found.table("task", "metric")) == len(examples.TASKS)
    assert len(found.table("figure", "value")) == 5
    assert f"{examples.TASKS[0].score.value:.4f}" in found.source.split("<h2", 1)[0]  # summed up at the top


def test_the_pareto_curve_leaves_out_what_is_beaten():
    small, beaten, middle, large = examples.POINTS
    assert pareto(examples.POINTS) == [small, middle, large]
    result = examples.search_result()
    found = Parsed(render(search_page(result)))
    series = {trace["name"]: trace for trace in found.traces("scatter")}
    assert series["curve, predicted"]["x"] == [1.0, 1.2, 2.0]
    assert series["measured"]["y"] == [small.measured_kl]
    assert series["other, predicted"]["y"] == [beaten.predicted_kl]
    assert series["chosen"]["x"] == [1.2]
    rows = {row[0]: row[1:] for row in found.table("what", "size")}
    assert rows["middle"] == ["1.20 GB", "0.1", "\N{EN DASH}", "on the curve", "chosen"]
    assert rows["beaten"][3:] == ["", ""]
    assert json.loads(found.code[0]) == result.recipe
    assert found.headings[1:] == ["Pareto curve", "Sensitivity", "Formats", "Recipe", "Versions"]


def test_search_ranks_what_units_cost_in_each_format():
    found = Parsed(render(search_page(examples.search_result())))
    rows = found.table("unit", "format")
    assert [row[1] for row in rows] == ["fp8"] * 4 + ["fp8:1x128"] * 4
    layers = [layer_of(row[0]) for row in rows]
    assert layers == [3, 2, 1, 0, 0, 1, 2, 3]
    assert rows[1][2:] == ["", "0.03", "0.03", "31.0", "250 MB"]  # that layer stays as it is
    assert rows[0][2] == "chosen"
    first, second = found.traces("bar")
    assert first["x"] == pytest.approx([0.04, 0.03, 0.02, 0.01])
    assert second["x"] == pytest.approx([0.05, 0.04, 0.03, 0.02])
    assert found.table("role", "format") == [["dense MLP", "bf16", "500 MB"], ["dense MLP", "fp8", "1.50 GB"]]


def test_search_says_what_was_asked_measured_and_warned_of():
    plain = Parsed(render(search_page(examples.search_result(units=()))))
    assert "not measured" in plain.source
    assert "at most 1.30 GB asked" in plain.source
    assert not {"Sensitivity", "Formats", "Warnings"} & set(plain.headings)
    kl, top1 = Estimate.around(0.11, 0.01, 10), Estimate.around(0.95, 0.01, 10)
    measured = Measurement(kl, top1, 1.1)
    found = Parsed(render(search_page(examples.search_result(measured=measured, warnings=("q <and> k",)))))
    assert found.headings[1] == "Warnings"
    assert "q &lt;and&gt; k" in found.source
    assert f"{kl.low:.5f} to {kl.high:.5f}" in found.source
    assert "0.9500" in found.source


def test_names_in_short():
    assert short("model.layers.12.mlp.down_proj.weight") == "12 down_proj"
    assert short("model.layers.3.mlp.experts.7.up_proj") == "3 experts 7 up_proj"
    assert short("model.layers.3.mlp.experts") == "3 experts"
    assert short("model.layers.3.mlp.shared_experts.up_proj.weight") == "3 shared up_proj"
    assert short("lm_head.weight") == "lm_head"
    assert layer_of("lm_head.weight") is None
    assert kind_of("model.layers.3.mlp.shared_experts.up_proj.weight").label == "shared up_proj"
    assert kind_of("model.layers.3.mlp.experts.7.up_proj.weight").label == "experts up_proj"


def test_numbers_in_words():
    assert [size(each) for each in (0, 999, 1000, 4.9e8, 1.342e12, 1.2e13)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "490 MB",
        "1342 GB",
        "12.00 TB",
    ]
    assert [percent(each) for each in (0.0, 0.12345, 1e-9)] == ["0 %", "12.345 %", "< 0.001 %"]
    assert [number(each) for each in (None, math.nan, math.inf, 0.012345)] == ["\N{EN DASH}"] * 2 + [
        "\N{INFINITY}",
        "0.0123",
    ]
