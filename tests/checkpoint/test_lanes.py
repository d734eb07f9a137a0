"""Strips on their way through a device, one step at a time; the processor stands in for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blockscale import RunOptions, dequantize_checkpoint, quantize_checkpoint
from blockscale.checkpoint import lanes as lanes_module
from blockscale.checkpoint.lanes import Buffer, Lanes, Slot, Tensors, Work, open_lanes, through, usable_device
from blockscale.checkpoint.strips import Span
from blockscale.errors import BlockscaleError
from tests import data

INT = torch.int32


@pytest.fixture
def lanes() -> Lanes:
    opened = open_lanes("cpu:0")
    assert opened is not None
    return opened


def spans(*heights: int) -> Iterator[Span]:
    return (Span(0, number, rows, 0) for number, rows in enumerate(heights))


def work(events: list[str]) -> Work:
    """Numbers a strip's rows there, negates them there, and tells each step."""

    def load(span: Span, inputs: Tensors) -> None:
        events.append(f"read {span.row}")
        inputs[0].fill_(span.row + 1)

    def compute(inputs: Tensors, outputs: Tensors) -> None:
        events.append(f"compute {int(inputs[0][0]) - 1}")
        torch.neg(inputs[0], out=outputs[1])
        outputs[0].fill_(len(inputs[0]))

    return Work(lambda span: ([((span.rows,), INT)], [((1,), INT), ((span.rows,), INT)]), load, compute)


def test_a_strip_is_computed_while_the_one_before_is_written_and_the_next_one_read(lanes: Lanes) -> None:
    events: list[str] = []
    for span, _, _ in through(lanes, spans(3, 3, 3, 3), work(events)):
        events.append(f"write {span.row}")
    expected = ["read 0", "compute 0", "read 1", "compute 1", "write 0", "read 2", "compute 2"]
    assert events == [*expected, "write 1", "read 3", "compute 3", "write 2", "write 3"]


@pytest.mark.parametrize("heights", [(), (1,), (5, 5, 2), (2, 900, 1, 900, 3)])
def test_what_comes_back_belongs_to_its_strip(lanes: Lanes, heights: tuple[int, ...]) -> None:
    rows = []
    for span, (sent,), (size, returned) in through(lanes, spans(*heights), work([])):
        assert sent.tolist() == [span.row + 1] * span.rows
        assert returned.tolist() == [-span.row - 1] * span.rows
        rows.append(int(size))
    assert rows == list(heights)


def test_a_result_stays_until_the_next_step_only_and_two_slots_serve_all(lanes: Lanes) -> None:
    places = []
    for _ in range(3):
        for _, _, (_, returned) in through(lanes, spans(8, 8, 8, 8, 8), work([])):
            places.append(returned.data_ptr())
    assert places[:5] == [places[0], places[1], places[0], places[1], places[0]]
    assert len(set(places)) == 2
    ((first, second),) = lanes.free
    assert [len(first.inputs.here), len(first.outputs.here)] == [256, 512]
    assert [len(second.inputs.there), len(second.outputs.there)] == [256, 512]


def test_a_buffer_grows_to_the_largest_strip_and_no_further(lanes: Lanes) -> None:
    for heights in ((10, 10), (1000, 10), (10, 10)):
        assert len(list(through(lanes, spans(*heights), work([])))) == 2
    (lane,) = lanes.free
    assert sorted(len(slot.inputs.here) for slot in lane) == [256, 4096]


def test_workers_at_the_same_time_have_lanes_of_their_own(lanes: Lanes) -> None:
    one, other = (through(lanes, spans(4, 4, 4), work([])) for _ in range(2))
    for (_, _, (_, a)), (_, _, (_, b)) in zip(one, other, strict=True):
        assert a.data_ptr() != b.data_ptr()
    assert len(lanes.free) == 2


def test_a_lane_does_not_come_back_from_an_error(lanes: Lanes) -> None:
    def fail(span: Span, inputs: Tensors) -> None:
        if span.row == 2:
            raise OSError("the disk is gone")

    steps = work([])
    strips = through(lanes, spans(1, 1, 1, 1), Work(steps.parts, fail, steps.compute))
    assert next(strips)[0].row == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(strips)
    assert lanes.free == []


def test_a_lane_does_not_come_back_from_a_reader_that_stops(lanes: Lanes) -> None:
    strips = through(lanes, spans(1, 1, 1), work([]))
    next(strips)
    strips.close()
    assert lanes.free == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB.\nSee docs"
        ),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
    ],
)
def test_no_memory_left_is_told_in_one_line(lanes: Lanes, error: Exception, monkeypatch) -> None:
    def reserve(buffer: Buffer, nbytes: int) -> None:
        raise error

    monkeypatch.setattr(Buffer, "reserve", reserve)
    with pytest.raises(BlockscaleError) as caught:
        list(through(lanes, spans(1), work([])))
    said = str(error).splitlines()[0].partition(". GPU")[0]
    assert str(caught.value) == (
        "device cpu:0: out of memory (expected room for a few strips for each worker, "
        f"got {said}); run again with fewer --workers or --device cpu: finished shards are kept"
    )


def test_a_defect_of_a_kernel_is_not_taken_for_a_users_error(lanes: Lanes) -> None:
    def compute(inputs: Tensors, outputs: Tensors) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    steps = work([])
    with pytest.raises(RuntimeError, match="illegal"):
        list(through(lanes, spans(1), Work(steps.parts, steps.load, compute)))


def test_the_cpu_needs_no_lanes() -> None:
    assert open_lanes("cpu") is None
    assert usable_device("cpu") == "cpu"
    with pytest.raises(BlockscaleError, match=r"unknown device \(expected auto | cpu | cuda, got 'tpu'\)"):
        usable_device("tpu")


def test_a_gpu_that_nothing_runs_on_is_told_in_one_line(monkeypatch) -> None:
    def busy(*arguments: object, **options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nSearch for it")

    monkeypatch.setattr(lanes_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lanes_module.torch, "zeros", busy)
    for device in ("cuda", "auto"):
        with pytest.raises(BlockscaleError) as caught:
            usable_device(device)
        assert str(caught.value) == (
            "device cuda: the GPU cannot be used (expected a GPU to run on, "
            "got CUDA error: all CUDA-capable devices are busy or unavailable); use --device cpu"
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", [quantize_checkpoint, dequantize_checkpoint])
def test_cuda_without_a_gpu_is_refused_before_anything_is_written(tmp_path: Path, command) -> None:
    source = data.write(tmp_path / "source", data.llama())
    line = data.refusal(
        lambda: command(source, tmp_path / "out", run=RunOptions(device="cuda")), source, tmp_path / "out"
    )
    assert line.startswith("device cuda: no CUDA device (expected a GPU to run on, got PyTorch ")
    assert line.endswith("; use --device cpu")


@pytest.mark.gpu
def test_gpu_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path: Path) -> None:
    big = torch.zeros(24576, 4096, dtype=torch.bfloat16)
    model = data.llama().changed({"model.layers.0.mlp.up_proj.weight": big})
    source = data.write(tmp_path / "source", model)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantize_checkpoint(source, tmp_path / "fp8", run=RunOptions(device="cuda", workers=2))
    # Two workers, two strips each, 8 MiB there and 4 MiB back.
    assert torch.cuda.max_memory_allocated() - before < (2 * 2 * 13) << 20


@pytest.mark.gpu
def test_slots_on_a_gpu_have_streams_of_their_own_and_pinned_memory() -> None:
    lanes = open_lanes("cuda")
    assert lanes is not None
    with lanes.take() as lane:
        assert len({slot.stream for slot in lane}) == len(lane) == 2
        assert torch.cuda.default_stream() not in {slot.stream for slot in lane}
        slot: Slot = lane[0]
        with slot.current():
            assert torch.cuda.current_stream() == slot.stream
            slot.inputs.reserve(1000)
        assert slot.inputs.here.is_pinned()
        assert slot.inputs.there.device == lanes.device
    assert lanes.device.index == torch.cuda.current_device()
