"""The converter on a GPU writes the bytes that it writes on the CPU, and says the same where it refuses.

Without a GPU the processor stands in for one: strips travel the same way, through the same buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from blockscale import BlockscaleError, Recipe, RunOptions, dequantize_checkpoint, quantize_checkpoint
from blockscale.checkpoint import convert, engine, tasks
from blockscale.checkpoint.lanes import Lanes, open_lanes
from tests import data

HERE = RunOptions(device="cpu")
THERE = RunOptions(device="cuda", workers=3)
UP = "model.layers.0.mlp.up_proj.weight"
MODELS = {
    "deepseek": data.deepseek_v3(),
    "float16": data.llama(dtype=torch.float16),
    "float32": data.llama(dtype=torch.float32),
    "fused nk": data.fused_experts("qwen3_5_moe", "nk"),
    "fused kn": data.fused_experts("gpt_oss", "kn"),
}


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What "cuda" means in a test."""
    if request.param == "stand-in":
        name = {"cuda": "cpu:0"}
        monkeypatch.setattr(convert, "usable_device", lambda asked: name.get(asked, asked))
    return request.param


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Lanes]:
    """The lanes of every run."""
    found: list[Lanes] = []

    def watched(device: str) -> Lanes | None:
        lanes = open_lanes(device)
        if lanes is not None:
            found.append(lanes)
        return lanes

    monkeypatch.setattr(engine, "open_lanes", watched)
    return found


@pytest.mark.parametrize(
    ("model", "recipe", "values"),
    [
        *((name, recipe, 5000) for name in MODELS for recipe in (Recipe(), Recipe("ue8m0", (32, 48)))),
        ("deepseek", Recipe("ue8m0"), 1),  # strips one block high
        ("deepseek", Recipe("float32", (1, 1)), tasks.STRIP_VALUES),  # more scales than codes
    ],
)
def test_quantized_files_are_byte_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, recipe: Recipe, values: int
) -> None:
    monkeypatch.setattr(tasks, "STRIP_VALUES", values)
    source = data.write(tmp_path / "source", MODELS[model], shards=3)
    for place, run in (("here", HERE), ("there", THERE)):
        quantize_checkpoint(source, tmp_path / place, recipe, run=run)
    assert data.contents(tmp_path / "there") == data.contents(tmp_path / "here")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    ("block_size", "values"), [((128, 128), 5000), ((32, 48), 1), ((1, 1), tasks.STRIP_VALUES)]
)
def test_dequantized_files_are_byte_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block_size: tuple[int, int], values: int
) -> None:
    monkeypatch.setattr(tasks, "STRIP_VALUES", values)
    model = data.in_fp8(data.deepseek_v3(), block_size=block_size)
    source = data.write(tmp_path / "source", model, shards=3)
    for place, run in (("here", HERE), ("there", THERE)):
        dequantize_checkpoint(source, tmp_path / place, dtype=dtype, run=run)
    assert data.contents(tmp_path / "there") == data.contents(tmp_path / "here")


def test_fused_experts_come_back_the_same(tmp_path: Path) -> None:
    source = data.write(tmp_path / "source", MODELS["fused kn"])
    quantize_checkpoint(source, tmp_path / "fp8", run=HERE)
    for place, run in (("here", HERE), ("there", THERE)):
        dequantize_checkpoint(tmp_path / "fp8", tmp_path / place, run=run)
    assert data.contents(tmp_path / "there") == data.contents(tmp_path / "here")


def test_a_strip_larger_than_the_buffers_makes_them_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[Lanes]
) -> None:
    # One row of blocks of `wide`, which comes last, is more than a strip of any tensor before it.
    monkeypatch.setattr(tasks, "STRIP_VALUES", 4096)
    wide = "model.layers.0.self_attn.v_proj.weight"
    model = data.llama().changed({wide: data.weight(wide, 200, 3000)})
    source = data.write(tmp_path / "source", model)
    quantize_checkpoint(source, tmp_path / "here", run=HERE)
    quantize_checkpoint(source, tmp_path / "there", run=RunOptions(device="cuda", workers=1))
    assert data.contents(tmp_path / "there") == data.contents(tmp_path / "here")
    ((lane,),) = [lanes.free for lanes in opened]
    assert max(len(slot.inputs.here) for slot in lane) == 128 * 3000 * 2


@pytest.mark.parametrize("workers", [1, 3])
def test_memory_is_that_of_two_strips_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[Lanes], workers: int
) -> None:
    values = 128 * 320
    monkeypatch.setattr(tasks, "STRIP_VALUES", values)
    model = data.llama(layers=2).changed({UP: data.weight(UP, 5000, 192)})
    run = RunOptions(device="cuda", workers=workers)
    quantize_checkpoint(data.write(tmp_path / "source", model), tmp_path / "fp8", run=run)
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back", run=run)
    assert [1 <= len(lanes.free) <= workers for lanes in opened] == [True, True]
    for lanes, there, back in zip(opened, (2, 1), (1, 2), strict=True):
        for slot in (slot for lane in lanes.free for slot in lane):
            for buffer, width in ((slot.inputs, there), (slot.outputs, back)):
                assert len(buffer.here) <= width * values + 1024  # flag and scales
                assert len(buffer.here) == len(buffer.there)


@contextmanager
def _refused(folder: Path) -> Iterator[list[str]]:
    lines: list[str] = []
    with pytest.raises(BlockscaleError) as caught:
        yield lines
    lines.append(str(caught.value))
    assert not folder.exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("position", [(0, 0), (301, 7)])
def test_a_weight_that_is_not_finite_is_refused_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, position: tuple[int, int]
) -> None:
    monkeypatch.setattr(tasks, "STRIP_VALUES", 128 * 192)
    tensor = data.llama().tensors[UP].clone()
    tensor[position] = value
    source = data.write(tmp_path / "source", data.llama().changed({UP: tensor}))
    lines = []
    for run in (HERE, THERE):
        with _refused(tmp_path / "out") as line:
            quantize_checkpoint(source, tmp_path / "out", run=run)
        lines += line
    assert lines[0] == lines[1]
    said = f"{UP} in model.safetensors: 1 NaN or Inf value, the first at {list(position)}"
    assert lines[0].startswith(said)


@pytest.mark.parametrize("damage", ["NaN code", "overflow", "both"])
def test_codes_without_a_finite_value_are_refused_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(tasks, "STRIP_VALUES", 128 * 192)
    model = data.in_fp8(data.llama())
    if damage != "NaN code":  # in the first strip
        scale = model.tensors[f"{UP}_scale_inv"].clone()
        scale[0, 1] = 2.0**125
        model = model.changed({f"{UP}_scale_inv": scale})
    if damage != "overflow":  # in the last
        codes = model.tensors[UP].view(torch.uint8).clone()
        codes[300, 5] = 0xFF
        model = model.changed({UP: codes.view(torch.float8_e4m3fn)})
    source = data.write(tmp_path / "source", model)
    # The first strip is looked at before the last.
    monkeypatch.setattr("blockscale.checkpoint.strips.CHUNK_BYTES", 128 * 192)
    lines = []
    for run in (HERE, THERE):
        with _refused(tmp_path / "out") as line:
            dequantize_checkpoint(source, tmp_path / "out", run=run)
        lines += line
        dequantize_checkpoint(source, tmp_path / f"kept-{run.device}", on_nonfinite="keep", run=run)
    assert lines[0] == lines[1]
    assert ("beyond the largest of BF16" in lines[0]) == (damage != "NaN code")
    assert data.contents(tmp_path / "kept-cuda") == data.contents(tmp_path / "kept-cpu")


def test_a_run_that_is_out_of_memory_is_told_so_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    # The last shard holds the only strip that asks for more than a megabyte.
    big = "model.layers.0.mlp.down_proj.weight"
    model = data.llama().changed({big: data.weight(big, 2048, 2048)})
    shards = {name: f"{int(name == big)}.safetensors" for name in model.tensors}
    source = data.write(tmp_path / "source", model, shards)
    quantize_checkpoint(source, tmp_path / "whole", run=HERE)

    def quantize() -> None:
        quantize_checkpoint(source, tmp_path / "out", run=RunOptions(device="cuda", workers=1))

    with _little_memory(device, monkeypatch):
        line = data.refusal(quantize, source, tmp_path / "out", keeps_shards=True)
    assert ": out of memory (expected room for a few strips for each worker, got CUDA " in line
    assert line.endswith("; run again with fewer --workers or --device cpu: finished shards are kept")
    assert quantize_checkpoint(source, tmp_path / "out", run=HERE).resumed_shards == 1
    assert data.contents(tmp_path / "out") == data.contents(tmp_path / "whole")


@contextmanager
def _little_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (8 << 20)) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    empty = torch.empty

    def limited(*shape: int, **options: object) -> torch.Tensor:
        if options.get("device") == torch.device("cpu:0") and shape[0] > 1 << 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 MiB. GPU 0 has")
        return empty(*shape, **options)

    with monkeypatch.context() as patch:
        patch.setattr("blockscale.checkpoint.lanes.torch.empty", limited)
        yield
