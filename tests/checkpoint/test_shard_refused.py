"""Checkpoints that cannot be divided over ranks, and destinations that cannot take the shards."""

import os

import pytest
import torch
from safetensors import safe_open

from blockscale import RunOptions
from blockscale.checkpoint import convert
from blockscale.checkpoint.shard import shard_checkpoint
from tests import data


def _line(tmp_path, model, world=2):
    source, out = data.write(tmp_path / "source", model), tmp_path / "out"
    return data.refusal(lambda: shard_checkpoint(source, out, world), source, out)


def test_heads_that_do_not_divide_though_their_rows_do(tmp_path):
    assert _line(tmp_path, data.deepseek_v3(), 4).startswith(
        "model.layers.0.self_attn.kv_b_proj.weight: cannot be divided over 4 ranks (expected whole heads, "
        "got 2); choose a number of ranks that divides num_attention_heads"
    )


def test_experts(tmp_path):
    model = data.deepseek_v3(6).changed({"model.embed_tokens.weight": None, "lm_head.weight": None})
    dense = {name: None for name in model.tensors if ".layers.0.mlp" in name or "shared_experts" in name}
    assert _line(tmp_path, model.changed(dense), 3).startswith(
        "model.layers.1.mlp.experts.0.down_proj.weight: cannot be divided over 3 ranks "
        "(expected whole experts, got 4); choose a number of ranks that divides n_routed_experts"
    )


def test_an_expert_that_the_config_does_not_have(tmp_path):
    model = data.deepseek_v3().changed({}, n_routed_experts=2)
    line = _line(tmp_path, model)
    assert line.startswith("model.layers.1.mlp.experts.2.down_proj.weight: is of an unknown expert")


def test_a_vocabulary(tmp_path):
    vocabulary = {"model.embed_tokens.weight": data.weight("e", 49, 160)}
    assert _line(tmp_path, data.deepseek_v3().changed(vocabulary)) == (
        "model.embed_tokens.weight: cannot be divided over 2 ranks (expected a multiple of 2 in "
        "dimension 0, got shape [49, 160]); choose a number of ranks that divides it"
    )


def test_a_row_parallel_weight_that_is_no_matrix(tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight"
    line = _line(tmp_path, data.deepseek_v3().changed({name: data.weight("o", 160)}))
    assert line.startswith(f"{name}: cannot be divided over 2 ranks")


def test_a_missing_scale(tmp_path):
    model = data.in_fp8(data.deepseek_v3(), block_size=(4, 4))
    name = "model.layers.1.self_attn.o_proj.weight"
    assert _line(tmp_path, model.changed({f"{name}_scale_inv": None})) == (
        f"{name}: 1 of 49 FP8 weights have no scale (expected {name}_scale_inv); fetch the missing "
        "shard, or quantize the original checkpoint again"
    )


def test_a_scale_without_its_weight(tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    line = _line(tmp_path, data.deepseek_v3().changed({name: torch.ones(2, 1)}))
    assert line.startswith(f"{name}: scale without its weight")


def test_a_scale_of_another_grid(tmp_path):
    model = data.in_fp8(data.deepseek_v3(), block_size=(4, 4))
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    line = _line(tmp_path, model.changed({name: torch.ones(2, 1)}))
    assert line.startswith(f"{name}: scale grid does not fit the 4x4 blocks of config.json")


def test_fp8_without_a_block_size(tmp_path):
    model = data.in_fp8(data.deepseek_v3()).changed({}, quantization_config=None)
    assert "FP8 weight of unknown format" in _line(tmp_path, model)


def test_another_architecture(tmp_path):
    line = _line(tmp_path, data.llama())
    assert line.startswith("model.layers.0.self_attn.k_proj.weight: has no place in DeepSeek's")


def test_packed_weights(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    model = data.deepseek_v3().changed({name: torch.ones(200, 20, dtype=torch.int32)})
    assert _line(tmp_path, model) == (
        f"{name}: dtype cannot be divided (expected F8_E4M3 | BF16 | F16 | F32, got I32)"
    )


def test_no_ranks(tmp_path):
    assert "number of ranks" in _line(tmp_path, data.deepseek_v3(), 0)


def test_a_source_that_is_not_local():
    line = data.told(shard_checkpoint, "memory://", "out", 2)
    assert line is not None
    assert "cannot be divided: no local folder" in line


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.deepseek_v3(), shards=3)


def test_the_same_command_again_does_nothing(tmp_path, source):
    shard_checkpoint(source, tmp_path / "out", 2)
    before = data.snapshot(tmp_path / "out")
    assert shard_checkpoint(source, tmp_path / "out", 2).already_complete
    assert data.snapshot(tmp_path / "out") == before


def test_shards_for_another_number_of_ranks_are_not_mixed_with_these(tmp_path, source):
    out = tmp_path / "out"
    shard_checkpoint(source, out, 2)
    line = data.refusal(lambda: shard_checkpoint(source, out, 1), source, out)
    assert line.startswith(f"{out}: already holds a checkpoint")
    shard_checkpoint(source, out, 1, run=RunOptions(overwrite=True))
    assert [path.name for path in out.glob("*.safetensors")] == ["model0-mp1.safetensors"]


def test_what_the_reference_script_left_is_not_written_over(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model3-mp8.safetensors").write_bytes(b"theirs")
    line = data.refusal(lambda: shard_checkpoint(source, out, 2), source, out)
    assert "got model3-mp8.safetensors" in line


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, source, monkeypatch):
    verify, out = convert.verify_shard, tmp_path / "out"

    def flipped(path, hashes):
        with open(path, "r+b") as file:
            file.seek(-3, 2)
            byte = file.read(1)[0]
            file.seek(-3, 2)
            file.write(bytes([byte ^ 1]))
        verify(path, hashes)

    monkeypatch.setattr(convert, "verify_shard", flipped)
    line = data.refusal(lambda: shard_checkpoint(source, out, 2), source, out)
    assert "1 tensors read back are not what was written (got " in line


def test_the_bytes_do_not_depend_on_threads(tmp_path, source):
    for workers in (1, 3):
        shard_checkpoint(source, tmp_path / str(workers), 2, run=RunOptions(workers=workers))
    assert data.contents(tmp_path / "1") == data.contents(tmp_path / "3")


def test_a_source_that_changes_during_the_run(tmp_path, source, monkeypatch):
    finish, out = convert.finish_shard, tmp_path / "out"

    def after(*arguments):
        finish(*arguments)
        os.utime(source / "model-00002-of-00003.safetensors", ns=(1, 1))

    monkeypatch.setattr(convert, "finish_shard", after)
    line = data.told(shard_checkpoint, source, out, 2)
    assert line is not None
    assert line.startswith("model-00002-of-00003.safetensors: source file changed during the run")
    assert all(name.startswith(".blockscale/") for name in data.contents(out))


def test_safetensors_reads_the_shards(tmp_path, source):
    shard_checkpoint(source, tmp_path / "out", 2)
    with safe_open(tmp_path / "out" / "model0-mp2.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
