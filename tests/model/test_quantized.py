"""Models on FP8 weights: the formats a checkpoint may mix, what is refused, how far results move."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale import ops
from blockscale.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import BlockscaleError, CorruptCheckpointError, MissingScaleError
from blockscale.model.config import load_config
from blockscale.model.generate import generate
from blockscale.model.load import load_model
from blockscale.model.prefill import prefill
from tests import data
from tests.model import models

# Widths that no block of 128 divides, and a latent query of two blocks.
SHAPE = {
    "hidden_size": 256,
    "q_lora_rank": 256,
    "kv_lora_rank": 80,
    "intermediate_size": 336,
    "initializer_range": 0.05,
}


def tokens(count, seed=0):
    return torch.randint(320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [tokens(30), tokens(5, 1), tokens(64, 2)]


def load(folder, compute="fp8", **options):
    return load_model(folder, device="cpu", dtype=torch.float32, compute=compute, **options)


def logits(model):
    return prefill(model, model.cache(len(PROMPTS), 100), PROMPTS)


def divergence(expected, got):
    """Kullback-Leibler divergence of the next token's distribution, nats, per prompt."""
    p, q = expected.log_softmax(-1), got.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    models.make(folder, rope_parameters=models.YARN, **SHAPE)
    return folder


@pytest.fixture(scope="module", params=["float32", "ue8m0"])
def fp8(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / request.param
    quantize_checkpoint(source, folder, Recipe(scale_fmt=request.param))
    return folder


def test_without_quantized_activations_it_is_the_dequantized_model(fp8, tmp_path):
    dequantize_checkpoint(fp8, tmp_path / "wide", dtype="F32")
    expected = logits(load(tmp_path / "wide"))
    torch.testing.assert_close(logits(load(fp8, "high")), expected, rtol=0, atol=1e-4)


def test_quantized_activations_move_results_a_little(fp8, source):
    exact = logits(load(source))
    high, low = (divergence(exact, logits(load(fp8, compute))) for compute in ("high", "fp8"))
    assert 0 < high.max() < 0.1
    assert 0 < low.max() < 0.2
    assert not torch.equal(high, low)


def test_all_activations_that_are_multiplied_have_scales_of_the_format(fp8, monkeypatch):
    seen = {}

    def spy(name):
        real = getattr(ops, name)

        def run(codes, scale, *rest, **options):
            known = scale[scale.isfinite()]  # rows that pad an expert's segment hold anything
            powers = torch.equal(known, torch.exp2(known.log2().round()))
            seen.setdefault(name, []).append(powers)
            return real(codes, scale, *rest, **options)

        monkeypatch.setattr(ops, name, run)

    for name in ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_masked"):
        spy(name)
    logits(load(fp8))
    # Four products of attention in three layers and two of a dense one; two of experts in two layers.
    assert {name: len(each) for name, each in seen.items()} == {
        "fp8_gemm_nt": 14,
        "m_grouped_fp8_gemm_nt_masked": 4,
    }
    assert {powers for each in seen.values() for powers in each} == {fp8.name == "ue8m0"}


def test_the_log_says_what_was_found(fp8, caplog):
    with caplog.at_level(logging.INFO):
        load(fp8)
    line = caplog.records[-1].message
    assert line.startswith("linear layers: 1 in float32, ")
    assert line.endswith(f"in float8_e4m3fn; FP8 blocks of 128x128, {fp8.name} scales")


@pytest.mark.parametrize(
    "recipe",
    [
        {"exclude": ["*kv_a_proj_with_mqa*", "*q_a_proj*"]},
        {"include": ["*.experts.*"]},
        {"exclude": ["*shared_experts*", "*layers.0.*"]},
        {"include": ["*o_proj*", "*down_proj*"]},
    ],
    ids=["attention in part", "experts alone", "not the shared", "outputs alone"],
)
def test_formats_mix(source, tmp_path, recipe):
    quantize_checkpoint(source, tmp_path / "mixed", Recipe(**recipe))
    dequantize_checkpoint(tmp_path / "mixed", tmp_path / "wide", dtype="F32")
    expected = logits(load(tmp_path / "wide"))
    torch.testing.assert_close(logits(load(tmp_path / "mixed", "high")), expected, rtol=0, atol=1e-4)
    assert divergence(expected, logits(load(tmp_path / "mixed"))).max() < 0.2


def _edit(folder, target, change):
    """A copy of a checkpoint of one file with its tensors and config changed."""
    target.mkdir()
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def test_a_missing_scale_is_refused_or_kept_on_request(fp8, tmp_path, caplog):
    folder = _edit(fp8, tmp_path / "x", lambda tensors, config: tensors.pop(f"{O_PROJ}_scale_inv"))
    with pytest.raises(MissingScaleError, match=f"{O_PROJ}: FP8 weight without .*o_proj.weight_scale_inv"):
        load(folder)
    load(folder, on_missing_scale="keep")
    assert sum(f"{O_PROJ} is FP8 without a scale" in record.message for record in caplog.records) == 1


def test_tensors_that_nobody_asks_for_are_told(fp8, tmp_path, caplog):
    folder = _edit(fp8, tmp_path / "x", lambda tensors, config: tensors.update(extra=torch.zeros(2)))
    with caplog.at_level(logging.INFO):
        load(folder)
    assert caplog.records[-1].message.endswith("; 1 tensors not used, the first extra")


def test_a_scale_of_other_blocks_is_refused(fp8, tmp_path):
    def change(tensors, config):
        config["quantization_config"]["weight_block_size"] = [64, 64]

    with pytest.raises(CorruptCheckpointError, match="scale does not fit blocks of 64x64, which the config"):
        load(_edit(fp8, tmp_path / "x", change))


def test_a_config_that_contradicts_the_checkpoint_is_refused(fp8):
    config = load_config(fp8 / "config.json")
    other = {"float32": "ue8m0", "ue8m0": "float32"}[fp8.name]
    given = config.model_copy(update={"scale_fmt": other})
    with pytest.raises(BlockscaleError, match=f"scale_fmt of the given config .*got {other}"):
        load(fp8, config=given)
    load(fp8, config=config)
    with pytest.raises(BlockscaleError, match=r"weight_block_size .*as its config.json says, got \(64, 64\)"):
        load(fp8, config=config.model_copy(update={"weight_block_size": (64, 64)}))


def test_a_folder_without_a_config_wants_one(fp8, tmp_path):
    folder = _edit(fp8, tmp_path / "x", lambda tensors, config: None)
    (folder / "config.json").unlink()
    with pytest.raises(BlockscaleError, match=r"no config \(expected config.json\); name a config file"):
        load(folder)
    load(folder, config=load_config(fp8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("gate_proj", "up_proj", "down_proj"), "experts of a layer differ in format"),
        (("gate_proj",), "experts of a layer differ in format"),
    ],
)
def test_experts_of_different_formats_are_refused(fp8, tmp_path, changed, message):
    def change(tensors, config):
        for name in changed:
            weight = f"model.layers.1.mlp.experts.5.{name}.weight"
            tensors.pop(f"{weight}_scale_inv")
            tensors[weight] = tensors[weight].float()

    with pytest.raises(CorruptCheckpointError, match=f"layers.1.mlp.experts.5: {message}"):
        load(_edit(fp8, tmp_path / "x", change))


def test_a_missing_tensor_is_named(fp8, tmp_path):
    folder = _edit(fp8, tmp_path / "x", lambda tensors, config: tensors.pop("model.norm.weight"))
    with pytest.raises(CorruptCheckpointError, match=r"model\.norm\.weight: tensor is missing"):
        load(folder)


def test_without_fp8_arithmetic_it_says_so_once(fp8, source, caplog):
    model = load_model(fp8, device="cpu", dtype=torch.bfloat16)
    assert sum("CPU has no FP8 arithmetic" in record.message for record in caplog.records) == 1
    caplog.clear()
    load_model(source, device="cpu")
    load(fp8, "high")
    assert not caplog.records, "no FP8 weights, and nothing that was not asked for"
    assert len(generate(model, PROMPTS, max_new_tokens=3, stop=[])[0]) == 3


@pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")
def test_a_trained_model_stays_itself(tmp_path):
    quantize_checkpoint(data.TINY_DEEPSEEK, tmp_path / "fp8", Recipe(scale_fmt="ue8m0"))
    prompts = [[501, 1911, 4287, 279, 2386], [1362, 265, 2455], [51, 1774, 647, 263, 606, 484, 327]]
    exact = load(data.TINY_DEEPSEEK)
    expected = prefill(exact, exact.cache(3, 8), prompts)
    for compute, limit in (("high", 0.02), ("fp8", 0.05)):
        model = load(tmp_path / "fp8", compute)
        assert divergence(expected, prefill(model, model.cache(3, 8), prompts)).max() < limit
