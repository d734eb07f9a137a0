"""transformers' own code reads what we write, and gets the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blockscale import Recipe, dequantize_checkpoint, quantize_checkpoint
from tests.data import TINY_DEEPSEEK

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
def test_its_fp8_loader_dequantizes_to_our_values(tmp_path: Path, scale_fmt: str) -> None:
    # Dimensions are multiples of 128: on ragged ones its loader derives the block size from the scale grid.
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    quantize_checkpoint(tmp_path / "src", tmp_path / "fp8", Recipe(scale_fmt))
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back")
    ours = _load(tmp_path / "back")
    theirs = _load(tmp_path / "fp8", transformers.FineGrainedFP8Config(dequantize=True))
    original = _load(tmp_path / "src")
    assert ours.keys() == theirs.keys() == original.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    quantized = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(original[quantized], ours[quantized])


@pytest.mark.skipif(not TINY_DEEPSEEK.exists(), reason="the trained tiny model is not here")
def test_a_deepseek_v3_checkpoint_loads_after_the_round_trip(tmp_path: Path) -> None:
    quantize_checkpoint(TINY_DEEPSEEK, tmp_path / "fp8")
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back")
    original, back = _load(TINY_DEEPSEEK), _load(tmp_path / "back")
    assert original.keys() == back.keys()
    kept = [name for name in original if name.endswith(("norm.weight", "gate.weight", "embed_tokens.weight"))]
    assert kept
    for name in kept:
        assert torch.equal(original[name], back[name]), name
    for name, value in back.items():
        difference = (value.float() - original[name].float()).norm()
        assert difference <= 0.03 * original[name].float().norm(), name


def test_transformers_runs_int4_beside_fp8(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    recipe = Recipe(layout="compressed-tensors", precision={"attention": "fp8", "dense_mlp": "int4:g128"})
    quantize_checkpoint(tmp_path / "src", tmp_path / "int4", recipe)
    dequantize_checkpoint(tmp_path / "int4", tmp_path / "back")
    theirs, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        for folder in ("int4", "back")
    )
    assert any(name.endswith("weight_packed") for name in theirs.state_dict())
    ids = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        got, expected = (model(ids).logits.float() for model in (theirs, ours))
    # Inputs are rounded to FP8 there, and weights are unpacked by the first forward.
    assert (got - expected).norm() <= 0.05 * expected.norm()
    unpacked = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if ".mlp." in name:
            assert torch.equal(unpacked[name], value), name


def _load(folder: Path, quantization: object = None) -> dict[str, torch.Tensor]:
    options = {"quantization_config": quantization} if quantization else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    return dict(model.state_dict())
