"""Models of which only a part is in memory, against those that transformers loads as a whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError
from tests import data

checkpoints = pytest.importorskip("tests.huggingface.checkpoints")
partials = pytest.importorskip("blockscale.huggingface.partial")
load_as_stored = pytest.importorskip("blockscale.huggingface.load").load_as_stored
open_partial, parameters_outside = partials.open_partial, partials.parameters_outside


@pytest.fixture(params=["llama", "qwen3_moe", "deepseek_v3"])
def folder(request, tmp_path):
    return checkpoints.make(tmp_path, request.param)


def values(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(ours, theirs):
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_layer_by_layer_it_becomes_the_model_of_transformers(folder):
    partial, whole = open_partial(open_source(folder)), load_as_stored(open_source(folder))
    assert all(each.is_meta for each in partial.model.parameters())
    buffers = dict(partial.model.named_non_persistent_buffers())
    assert buffers
    assert all(same(each, values(whole)[name]) for name, each in buffers.items())
    for part in ("model.layers.0.", "model.layers.1."):
        names = [name for name in partial.model.state_dict() if name.startswith(part)]
        partial.load(names)
        assert all(same(values(partial.model)[name], values(whole)[name]) for name in names)
    assert partial.model.model.embed_tokens.weight.is_meta
    partial.load(parameters_outside(partial.model, "model.layers"))
    there = {name: each for name, each in values(partial.model).items() if not each.is_meta}
    assert all(same(each, values(whole)[name]) for name, each in there.items())
    missing = values(partial.model).keys() - there.keys()
    assert missing <= {"lm_head.weight"}


def test_tied_embeddings_are_one_tensor(tmp_path):
    folder = checkpoints.make(tmp_path, "llama")
    partial = open_partial(open_source(folder))
    partial.load(parameters_outside(partial.model, "model.layers"))
    assert partial.model.lm_head.weight is partial.model.model.embed_tokens.weight


def test_buffers_that_a_checkpoint_keeps_in_float32_stay_so(tmp_path):
    folder = checkpoints.make(tmp_path, "deepseek_v3")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = torch.linspace(-1, 1, 8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    partial = open_partial(open_source(folder))
    partial.load([each for each in partial.model.state_dict() if each.startswith("model.layers.1.")])
    assert same(values(partial.model)[name], torch.linspace(-1, 1, 8))


@pytest.mark.parametrize("gone", ["model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.experts.3."])
def test_a_tensor_that_is_missing_is_told_of(gone, tmp_path):
    folder = checkpoints.make(tmp_path, "qwen3_moe")
    tensors = {name: each for name, each in data.read(folder).items() if not name.startswith(gone)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    partial = open_partial(open_source(folder))
    with pytest.raises(BlockscaleError, match=r"does not fit the model.*layers\.1|layers\.1.*does not fit"):
        partial.load([each for each in partial.model.state_dict() if each.startswith("model.layers.1.")])


def test_a_checkpoint_whose_config_names_no_dtype_keeps_that_of_its_tensors(tmp_path):
    folder = checkpoints.make(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": None}))
    assert open_partial(open_source(folder)).model.dtype == torch.bfloat16
