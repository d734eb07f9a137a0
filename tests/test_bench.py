"""The bookkeeping of the benchmarks: every competitor once a round, ratios within a round."""

from blockscale.testing.bench import Timings, interleave, load_module, time_interleaved


def test_every_timer_is_called_once_a_round_in_changing_order():
    calls = []

    def timer(name):
        return lambda: (calls.append(name), float(len(calls)))[1]

    found = interleave({name: timer(name) for name in "abc"}, 20)
    rounds = [calls[start : start + 3] for start in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert found["b"] == [1.0 + 3 * place + one.index("b") for place, one in enumerate(rounds)]


def test_seconds_are_the_difference_of_the_clock_after_a_warm_up():
    now, warm = [0.0], []

    def call():
        warm.append(now[0])
        now[0] += 2.5

    timings = time_interleaved({"one": call}, 3, clock=lambda: now[0])
    assert timings.seconds == {"one": [2.5] * 3}
    assert len(warm) == 4


def test_ratios_are_taken_within_a_round():
    timings = Timings({"base": [1.0, 4.0, 9.0], "fast": [1.0, 2.0, 3.0]})
    assert (timings.speedup("fast", "base").median, timings.speedup("fast", "base").high) == (2.0, 3.0)


def test_a_file_is_loaded_as_a_module(tmp_path):
    (tmp_path / "kernel.py").write_text("def answer():\n    return 42\n")
    assert load_module(tmp_path / "kernel.py").answer() == 42
