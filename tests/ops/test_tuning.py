"""What `blockscale tune` measures, how it decides, and what it leaves in the table; no GPU, no clock."""

import types

import pytest
import torch

from blockscale import ops
from blockscale.errors import BlockscaleError
from blockscale.metrics import calc_diff
from blockscale.ops import gemm_dispatch, tuning, tuning_problem, tuning_run, tuning_table
from blockscale.ops._cuda.configs import FewTile, Tile, choose
from blockscale.ops.tuning import KINDS, Case, candidate_tiles, cases
from blockscale.ops.tuning_run import Outcome, best_of, tune, updated
from blockscale.ops.tuning_table import Choice, Entry, Key, is_sound, read_table, write_table

H100 = 132
GPU = "Test GPU"
DENSE, CONTIGUOUS, MASKED = tuning_table.OPERATORS
CPU = torch.device("cpu")
CASE = Case(DENSE, (16, 4096, 7168))
A, B, C, D, E = (Choice("cuda", FewTile(16, splits=splits, occupancy=o)) for o, splits in
                 ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)))  # fmt: skip


def _every_case():
    weights = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (576, 576))
    return cases(weights, (), 1, (1, 16, 64, 128, 256, 4096)) + cases((), weights, 32, (1, 128, 1024, 8192))


@pytest.mark.parametrize("case", _every_case(), ids=str)
def test_candidate_tiles_are_few_fit_and_begin_with_the_heuristics(case):
    tiles = candidate_tiles(case, H100)
    assert tiles[0] == choose(KINDS[case.op], case.sizes, case.experts, H100)
    assert 8 <= len(tiles) <= 40
    assert len(set(tiles)) == len(tiles)
    for tile in tiles:
        assert is_sound(tile, case.op), tile
        assert tile.stages(False) >= 3, tile


def test_few_rows_get_both_kinds_of_tiles_and_many_rows_wide_ones():
    few = candidate_tiles(Case(DENSE, (16, 4096, 7168)), H100)
    assert {tile.rows for tile in few if isinstance(tile, FewTile)} == {16}
    assert {tile.splits for tile in few if isinstance(tile, FewTile)} == {1, 2, 4, 8}
    assert any(isinstance(tile, Tile) for tile in few)
    many = candidate_tiles(Case(DENSE, (4096, 4096, 7168)), H100)
    assert all(isinstance(tile, Tile) for tile in many)
    assert {Tile(128, waves=2, share="a"), Tile(256, waves=2, side=True, share="b")} <= set(many)


def test_k_is_not_divided_into_more_parts_than_it_has():
    tiles = candidate_tiles(Case(DENSE, (16, 576, 512)), H100)
    assert max(tile.splits for tile in tiles[1:] if isinstance(tile, FewTile)) == 4


def test_cases_are_buckets_of_every_weight():
    found = cases([(4096, 7168)], [(7168, 2048)], 8, [1, 100, 128, 2000])
    assert [(case.op, case.sizes, case.experts) for case in found] == [
        (DENSE, (1, 4096, 7168), 1),
        (DENSE, (128, 4096, 7168), 1),
        (DENSE, (2048, 4096, 7168), 1),
        (MASKED, (1, 7168, 2048), 8),
        (MASKED, (128, 7168, 2048), 8),
        (CONTIGUOUS, (2048, 7168, 2048), 8),
    ]
    assert found[1].key == Key(DENSE, 4096, 7168, 128)


@pytest.mark.parametrize("weight", [(4096, 100), (8, 128), (0, 128)])
def test_a_size_no_kernel_takes_is_told(weight):
    with pytest.raises(BlockscaleError, match=f"no FP8 GEMM has this size .*got N = {weight[0]}"):
        cases([weight], [], 1, [1])


def test_nothing_to_tune_is_told():
    with pytest.raises(BlockscaleError, match=r"no product to tune \(expected M up to 128 .*, got \[256\]"):
        cases([], [(4096, 7168)], 8, [200])
    with pytest.raises(BlockscaleError, match="no product to tune"):
        cases([], [], 1, [1])


def test_candidates_are_the_heuristics_choice_then_all_that_is_there(monkeypatch):
    properties = types.SimpleNamespace(multi_processor_count=H100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gemm_dispatch, "heuristic", lambda op, device: ("cublas", print))
    monkeypatch.setattr(gemm_dispatch, "available", lambda op, device, names: ("cuda", "triton", "cublas"))
    found = tuning.candidates(CASE, CPU)
    tiles = candidate_tiles(CASE, H100)
    assert found == (Choice("cublas"), *(Choice("cuda", tile) for tile in tiles), Choice("triton"))
    monkeypatch.setattr(gemm_dispatch, "heuristic", lambda op, device: ("cuda", print))
    assert tuning.candidates(CASE, CPU)[0] == Choice("cuda", tiles[0])


def _times(**microseconds):
    """A `prepare` whose timers return these in turn, the last one from then on; None: it cannot run."""
    calls = []

    def prepare(choice):
        name = next(name for name, each in globals().items() if each is choice)
        values = microseconds[name]

        def timer():
            calls.append(name)
            return values[min(calls.count(name), len(values)) - 1]

        return None if values is None else timer

    return prepare, calls


def test_the_fastest_by_median_of_repeated_rounds_wins():
    # C is lucky twice: taken at its best, it would be the winner.
    prepare, calls = _times(A=[15.0], B=[9.0], C=[5.0, 5.0, 11.0], D=[12.0], E=[20.0])
    outcome = best_of(CASE, (A, B, C, D, E), prepare)
    assert outcome == Outcome(CASE, B, 9.0, A, 15.0, 5)
    assert outcome.worth_it
    assert {name: calls.count(name) for name in "ABCDE"} == {"A": 6, "B": 6, "C": 6, "D": 6, "E": 1}


def test_what_cannot_run_is_passed_over_but_not_the_heuristics():
    prepare, _ = _times(A=[10.0], B=None, C=[9.9])
    outcome = best_of(CASE, (A, B, C), prepare)
    assert (outcome.best, outcome.candidates, outcome.worth_it) == (C, 2, False)
    with pytest.raises(BlockscaleError, match="the heuristics' own choice does not work"):
        best_of(CASE, (B, A), prepare)


def _outcome(us, heuristic_us, m=16):
    return Outcome(Case(DENSE, (m, 4096, 7168)), B, us, A, heuristic_us, 5)


def test_a_table_keeps_gains_of_more_than_two_percent_and_drops_old_ones():
    other, old = Key(DENSE, 7168, 2048, 16), Entry(C, 1.0, 2.0, "2026-01-01", "old")
    table = {other: old, _outcome(1, 1, m=32).case.key: old}
    found = updated(table, [_outcome(9.7, 10.0), _outcome(9.9, 10.0, m=32)], {}, "new")
    assert list(found) == [other, CASE.key]
    assert found[other] == old
    entry = found[CASE.key]
    assert (entry.choice, entry.microseconds, entry.heuristic_microseconds) == (B, 9.7, 10.0)
    assert entry.versions == "new"


def test_the_heuristics_take_the_place_of_a_shipped_entry_that_gains_nothing():
    shipped = {CASE.key: Entry(C, 1.0, 2.0, "2026-01-01", "old")}
    found = updated({}, [_outcome(9.9, 10.0)], shipped, "new")
    assert (found[CASE.key].choice, found[CASE.key].microseconds) == (A, 10.0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU by name, on which choice B takes 8, C 9 and all others 10 microseconds."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(tuning_run, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning_run, "candidates", lambda case, device: (A, B))
    monkeypatch.setattr(tuning_run, "compile_tiles", list)

    def timer(choice):
        return lambda: {B: 8.0, C: 7.0}.get(choice, 10.0)

    problem = types.SimpleNamespace(timer=timer)
    monkeypatch.setattr(tuning_run, "make_problem", lambda case, device: problem)
    return tmp_path


def test_tune_writes_what_it_found_beside_what_was_there(machine):
    path, other = machine / "table.jsonl", Key(DENSE, 7168, 2048, 16)
    write_table(path, GPU, {other: Entry(D, 1.0, 2.0, "2026-01-01", "old")})
    shown = []
    outcomes = tune(cases([(4096, 7168)], [], 1, [1, 16]), CPU, path, shown.append)
    assert tuple(shown) == outcomes
    assert [outcome.gain for outcome in outcomes] == [1.25, 1.25]
    table = read_table(path, GPU)
    assert set(table) == {other, *(outcome.case.key for outcome in outcomes)}
    assert table[CASE.key].choice == B


def test_tune_also_measures_what_the_shipped_table_says(machine):
    shipped = machine / "shipped" / tuning_table.file_name(GPU)
    write_table(shipped, GPU, {CASE.key: Entry(C, 1.0, 2.0, "2026-01-01", "old")})
    (outcome,) = tune([CASE], CPU, machine / "table.jsonl", lambda outcome: None)
    assert outcome.best == C


def test_tune_keeps_what_was_measured_before_memory_ran_out(machine, monkeypatch):
    make = tuning_run.make_problem

    def out_of_memory(case, device):
        if case.sizes[0] == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(case, device)

    monkeypatch.setattr(tuning_run, "make_problem", out_of_memory)
    with pytest.raises(BlockscaleError, match="not enough memory on the GPU; leave out the largest"):
        tune(cases([(4096, 7168)], [], 1, [16, 32]), CPU, machine / "table.jsonl", lambda outcome: None)
    assert set(read_table(machine / "table.jsonl", GPU)) == {CASE.key}


def test_tune_refuses_a_damaged_table_before_measuring(machine, monkeypatch):
    monkeypatch.setattr(tuning_run, "make_problem", None)
    (machine / "table.jsonl").write_text("[]\n")
    with pytest.raises(BlockscaleError, match=r"table.jsonl:1: damaged tuning table"):
        tune([CASE], CPU, machine / "table.jsonl", lambda outcome: None)


def test_tune_says_where_there_is_nothing_to_choose_from(machine, monkeypatch):
    monkeypatch.setattr(tuning_run, "candidates", lambda case, device: (Choice("triton"),))
    with pytest.raises(BlockscaleError, match="Test GPU: nothing to choose from on this GPU"):
        tune([CASE], CPU, machine / "table.jsonl", lambda outcome: None)


SMALL = [Case(DENSE, (16, 144, 320)), Case(CONTIGUOUS, (512, 48, 144), 3), Case(MASKED, (4, 48, 144), 3)]


@pytest.fixture
def on_cpu(monkeypatch):
    """Problems on the CPU, with timers that run everything once and return how many calls that were."""

    def captured(calls):
        for call in calls:
            call()
        return lambda: float(len(calls))

    monkeypatch.setattr(tuning_problem, "copies_past_cache", lambda nbytes, device: 3)
    monkeypatch.setattr(tuning_problem, "captured", captured)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.usefixtures("on_cpu")
def test_a_timer_takes_turns_with_copies_of_the_weights(case):
    problem = tuning_problem.make_problem(case, CPU)
    assert problem.timer(Choice("dequantized"))() == 3.0
    weights = {operands[2].data_ptr() for operands in problem.operands}
    assert len(weights) == 3
    if case.op == CONTIGUOUS:
        experts, counts = problem.operands[0][4].unique(return_counts=True)
        assert (experts.tolist(), counts.tolist()) == ([0, 1, 2], [256, 128, 128])


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("wrong", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("on_cpu")
def test_a_wrong_product_has_no_timer(case, wrong, monkeypatch, caplog):
    right = gemm_dispatch.chosen(case.op, Choice("dequantized"))

    def one_value_off(*operands, out, **keywords):
        right(*operands, out=out, **keywords)
        if out.dtype == wrong:
            out.view(-1)[0] += 1e7
        return out

    monkeypatch.setattr(gemm_dispatch, "chosen", lambda op, choice: one_value_off)
    assert tuning_problem.make_problem(case, CPU).timer(A) is None
    assert "cuda FewTile(rows=16, occupancy=1) is wrong" in caplog.text


@pytest.mark.usefixtures("on_cpu")
def test_what_writes_nothing_or_fails_has_no_timer(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel image")

    problem = tuning_problem.make_problem(SMALL[0], CPU)
    for run in (fail, lambda *_, **__: None, None):
        monkeypatch.setattr(gemm_dispatch, "chosen", lambda op, choice, run=run: run)
        assert problem.timer(A) is None


@pytest.mark.usefixtures("on_cpu")
def test_too_little_memory_is_no_fault_of_a_choice(monkeypatch):
    def run(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gemm_dispatch, "chosen", lambda op, choice: run)
    with pytest.raises(torch.OutOfMemoryError):
        tuning_problem.make_problem(SMALL[0], CPU).timer(A)


def test_without_a_gpu_there_is_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BlockscaleError, match="no CUDA GPU here"):
        tuning_run.find_gpu()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [Case(DENSE, (m, 2112, 1024)) for m in (1, 64, 128, 1024)]
    + [Case(MASKED, (m, 256, 1024), 8) for m in (8, 128)]
    + [Case(CONTIGUOUS, (1024, 512, 1024), 4)],
    ids=str,
)
def test_on_a_gpu_every_candidate_is_right_and_the_winner_runs(case, monkeypatch, tmp_path, caplog):
    device, gpu = tuning_run.find_gpu()
    monkeypatch.setattr(tuning_table, "table_file", lambda name: tmp_path / "table.jsonl")
    monkeypatch.setattr(tuning_run, "_WORTH_IT", 0.0)  # an entry in any case
    caplog.set_level("INFO", "blockscale.ops.tuning_problem")
    (outcome,) = tune([case], device, tmp_path / "table.jsonl", lambda outcome: None)
    assert not [record.message for record in caplog.records if "cublas" not in record.message]
    assert 0 < outcome.microseconds <= outcome.heuristic_microseconds
    assert read_table(tmp_path / "table.jsonl", gpu)[case.key].choice == outcome.best
    tuning_table._choices.cache_clear()
    try:
        assert tuning_table.find_choice(case.op, device, case.sizes) == outcome.best
        problem = tuning_problem.make_problem(case, device)
        getattr(ops, case.op)(*problem.operands[0], out=problem.out.fill_(torch.nan))
    finally:
        tuning_table._choices.cache_clear()
    assert calc_diff(problem.out[problem.counted], problem.exact) < 1e-5
