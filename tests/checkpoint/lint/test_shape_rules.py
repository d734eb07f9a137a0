"""Rows, blocks and ranks that an engine cannot cut."""

import pytest
import torch

from blockscale import Recipe, quantize_checkpoint
from blockscale.checkpoint.lint.run import lint_checkpoint
from tests import data
from tests.checkpoint.lint.checkpoints import GATE, OUT, SERVERS, UP, S, W, aligned, findings, write


@pytest.mark.parametrize(("rows", "severity"), [(192, "silent"), (576, "error"), (100, None), (256, None)])
def test_ragged_rows_in_transformers(tmp_path, made, rows, severity):
    tensors, config = dict(made[0]), made[1]
    tensors[OUT + W] = torch.zeros(rows, 256).to(torch.float8_e4m3fn)
    tensors[OUT + S] = torch.ones(-(-rows // 128), 2)
    found = findings(write(tmp_path / "bad", tensors, config), "transformers")
    assert found == (set() if severity is None else {(severity, "ragged", OUT + W)})


@pytest.mark.parametrize("engine", SERVERS)
def test_a_merged_layer_may_be_ragged_in_its_last_part_alone(tmp_path, made, engine):
    for name, expected in ((GATE, {("error", "merged-rows", GATE + W)}), (UP, set())):
        tensors = dict(made[0])
        tensors[name + W] = torch.zeros(192, 256).to(torch.float8_e4m3fn)
        tensors[name + S] = torch.ones(2, 2)
        assert findings(write(tmp_path / name, tensors, made[1]), engine) == expected


@pytest.mark.parametrize("engine", SERVERS)
def test_ranks_cut_at_blocks(tmp_path, made, engine):
    folder = write(tmp_path / "out", *made)
    assert findings(folder, engine, tp=2) == set()
    names = {where for _, rule, where in findings(folder, engine, tp=4) if rule == "tensor-parallel"}
    # 256 rows or inputs are 2 blocks; the MLP has 512 of them.
    assert OUT + W in names
    assert GATE + W not in names
    assert all(name.startswith("model.layers.") for name in names)


def test_blocks_of_another_size_are_told(tmp_path):
    quantize_checkpoint(
        data.write(tmp_path / "source", aligned(data.llama())), tmp_path / "out", Recipe(block_size=(64, 64))
    )
    for engine in SERVERS:
        assert findings(tmp_path / "out", engine) == {("warning", "block-size", "config.json")}


def test_vllm_refuses_experts_that_its_w4a8_kernels_cannot_cut(tmp_path):
    pytest.importorskip("compressed_tensors")
    source = data.write(tmp_path / "source", aligned(data.deepseek_v3(), 128))
    recipe = Recipe(layout="compressed-tensors", precision={"default": "fp8", "experts": "int4:g128"})
    quantize_checkpoint(source, tmp_path / "out", recipe)
    found = lint_checkpoint(tmp_path / "out", "vllm")
    assert not found.ok
    assert {each.rule for each in found.findings} == {"w4a8"}
    quantize_checkpoint(
        source,
        tmp_path / "g64",
        Recipe(layout="compressed-tensors", precision={"default": "fp8", "experts": "int4:g64"}),
    )
    assert lint_checkpoint(tmp_path / "g64", "vllm").findings == ()  # the remedy it names
