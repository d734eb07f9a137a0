"""A rank's shard read as if it were a Hugging Face checkpoint, and folders that no rank can read."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.ranks import read_rank_index, world_size_of
from blockscale.checkpoint.shard import shard_checkpoint
from blockscale.checkpoint.source import open_source
from blockscale.checkpoint.strips import dtype_of
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data


@pytest.fixture
def model():
    return data.in_fp8(data.deepseek_v3(), block_size=(4, 4))


@pytest.fixture
def folder(tmp_path, model):
    source = data.write(tmp_path / "source", model, shards=3)
    shard_checkpoint(source, tmp_path / "out", 2)
    return tmp_path / "out"


def _read(folder, index):
    """Every tensor, from the file and the bytes that the index says."""
    tensors = {}
    for name, entry in index.tensors.items():
        raw = np.fromfile(folder / entry.file, np.uint8, entry.nbytes, offset=entry.start)
        tensors[name] = torch.from_numpy(raw).view(dtype_of(entry)).view(entry.shape)
        assert entry.name == name
    return tensors


def test_a_rank_has_its_part_under_the_names_of_hugging_face(folder, model):
    assert world_size_of(open_source(folder)) == 2
    ranks = [_read(folder, read_rank_index(open_source(folder), rank, 2)) for rank in (0, 1)]
    assert ranks[0].keys() | ranks[1].keys() == model.tensors.keys()
    mlp = "model.layers.1.mlp."
    for rank, tensors in enumerate(ranks):
        experts = {name.split(".")[5] for name in tensors if name.startswith(f"{mlp}experts.")}
        assert experts == ({"0", "1"}, {"2", "3"})[rank]
        for name, start, stop, dim in (
            ("model.embed_tokens.weight", 24 * rank, 24 * rank + 24, 0),
            ("model.layers.0.mlp.gate_proj.weight", 100 * rank, 100 * rank + 100, 0),
            ("model.layers.0.mlp.down_proj.weight", 100 * rank, 100 * rank + 100, 1),
            ("model.layers.0.mlp.down_proj.weight_scale_inv", 25 * rank, 25 * rank + 25, 1),
            (f"{mlp}gate.e_score_correction_bias", 0, 4, 0),
            ("model.layers.2.eh_proj.weight", 0, 160, 0),
        ):
            assert_bitwise_equal(tensors[name], model.tensors[name].narrow(dim, start, stop - start), name)


def test_a_hugging_face_folder_was_made_for_no_number_of_ranks(tmp_path):
    source = open_source(data.write(tmp_path, data.deepseek_v3(), shards=3))
    assert world_size_of(source) is None
    line = data.told(read_rank_index, source, 0, 2)
    assert line is not None
    assert line.startswith(f"{tmp_path}/model0-mp2.safetensors: the shard of this rank is missing")


def test_a_folder_of_the_reference_script(tmp_path):
    """Without a config, metadata or manifest."""
    save_file({"head.weight": torch.ones(2, 3)}, tmp_path / "model3-mp8.safetensors")
    assert world_size_of(open_source(tmp_path)) == 8
    index = read_rank_index(open_source(tmp_path), 3, 8)
    assert {name: entry.shape for name, entry in index.tensors.items()} == {"lm_head.weight": (2, 3)}


def test_another_number_of_ranks(folder):
    assert data.told(read_rank_index, open_source(folder), 0, 4) == (
        f"{folder}: was converted for 2 ranks (expected 4, the ranks of this run); run it on 2 ranks, "
        "or convert it with --mp 4"
    )


def test_the_file_of_a_rank_is_missing(folder):
    (folder / "model1-mp2.safetensors").unlink()
    read_rank_index(open_source(folder), 0, 2)
    line = data.told(read_rank_index, open_source(folder), 1, 2)
    assert line == (
        f"{folder}/model1-mp2.safetensors: the shard of this rank is missing; copy it from where the "
        "checkpoint was converted, or convert it again"
    )


@pytest.mark.parametrize(
    ("other", "got"),
    [
        ("model0-mp4.safetensors", "model0-mp2.safetensors, model0-mp4.safetensors"),
        ("model.safetensors.index.json", "model0-mp2.safetensors, model.safetensors.index.json"),
        ("model.safetensors", "model0-mp2.safetensors, model.safetensors"),
    ],
)
def test_more_than_one_checkpoint(folder, other, got):
    (folder / other).write_bytes(b"")
    for call in (
        lambda: world_size_of(open_source(folder)),
        lambda: read_rank_index(open_source(folder), 0, 2),
    ):
        assert data.told(call) == (
            f"{folder}: holds more than one checkpoint (expected the shards of one number of ranks, "
            f"got {got}); keep one of them here"
        )


def test_a_tensor_that_has_no_name(tmp_path):
    save_file({"freqs_cis": torch.ones(2)}, tmp_path / "model0-mp1.safetensors")
    line = data.told(read_rank_index, open_source(tmp_path), 0, 1)
    assert line is not None
    assert line.startswith("freqs_cis: is no tensor of DeepSeek's inference shards")


def test_a_damaged_shard(folder):
    file = folder / "model0-mp2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    line = data.told(read_rank_index, open_source(folder), 0, 2)
    assert line is not None
    assert line.startswith("model0-mp2.safetensors: file is truncated")


@pytest.mark.parametrize("world", [1, 2])
def test_what_wants_a_hugging_face_folder_says_what_it_got(tmp_path, world):
    shard_checkpoint(data.write(tmp_path / "source", data.deepseek_v3()), tmp_path / "out", world)
    line = data.told(read_index, open_source(tmp_path / "out"))
    assert line is not None
    assert line.startswith(
        f"{tmp_path}/out: shards of DeepSeek's inference folder, made for a number of ranks"
    )
