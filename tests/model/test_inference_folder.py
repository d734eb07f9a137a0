"""The scripts of `inference/` by the names and arguments of DeepSeek's folder."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from blockscale import reference
from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.checkpoint.shard import shard_checkpoint
from blockscale.metrics import calc_diff
from blockscale.testing.asserts import assert_bitwise_equal
from blockscale.testing.data import gaussian
from tests import data

FOLDER = Path(__file__).parent.parent.parent / "inference"


@pytest.fixture
def kernel():
    return runpy.run_path(str(FOLDER / "kernel.py"))


def run(monkeypatch, script, *arguments):
    """Exit code of a script."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0", "uf8m0"])
def test_the_kernels_are_those_of_the_reference(kernel, scale_fmt, dtype):
    x, w = gaussian((2, 3, 256)), gaussian((160, 256), seed=1)
    b, b_s = reference.quantize_weight(w)
    a, a_s = kernel["act_quant"](x, 128, scale_fmt)
    expected = reference.quantize_activation(x, 128, "ue8m0" if scale_fmt else "float32")
    assert_bitwise_equal(a, expected[0])
    assert_bitwise_equal(a_s, expected[1])
    torch.set_default_dtype(dtype)
    try:
        product, wide = kernel["fp8_gemm"](a, a_s, b, b_s), kernel["weight_dequant"](b, b_s)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (product.dtype, product.shape) == (dtype, (2, 3, 160))
    exact = reference.fp8_gemm_nt(a.view(6, 256), a_s.view(6, 2), b, b_s, out_dtype=torch.float32)
    assert calc_diff(product.view(6, 160).float(), exact) < 1e-5
    assert_bitwise_equal(wide, reference.dequantize_weight(b, b_s, dtype=dtype))


def test_convert_for_two_ranks(tmp_path, monkeypatch, capsys):
    source = data.write(tmp_path / "source", data.deepseek_v3())
    paths = ("--hf-ckpt-path", source, "--save-path", tmp_path / "out")
    assert run(monkeypatch, "convert.py", *paths, "--n-experts", 4, "--model-parallel", 2, "--no-mtp") == 0
    shard_checkpoint(source, tmp_path / "same", 2, mtp=False)
    assert data.contents(tmp_path / "out") == data.contents(tmp_path / "same")
    capsys.readouterr()
    wrong = ("--n-experts", 8, "--model-parallel", 2)
    assert run(monkeypatch, "convert.py", *paths, *wrong) == 2
    assert capsys.readouterr().err.endswith("argument --n-experts: config.json says 4, not 8\n")
    (source / "config.json").write_text("{")
    assert run(monkeypatch, "convert.py", *paths, "--n-experts", 4, "--model-parallel", 2) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{source}/config.json: is not JSON")
    assert err.count("\n") == 1


@pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")
def test_cast_and_generate_with_a_config_of_deepseek(tmp_path, monkeypatch, capsys):
    quantize_checkpoint(data.TINY_DEEPSEEK, tmp_path / "fp8")
    paths = ("--input-fp8-hf-path", tmp_path / "fp8", "--output-bf16-hf-path", tmp_path / "bf16")
    assert run(monkeypatch, "fp8_cast_bf16.py", *paths) == 0

    theirs = json.loads((data.TINY_DEEPSEEK / "config.json").read_text())
    names = {
        "vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size",
        "moe_inter_dim": "moe_intermediate_size", "n_layers": "num_hidden_layers",
        "n_dense_layers": "first_k_dense_replace", "n_heads": "num_attention_heads",
        "n_routed_experts": "n_routed_experts", "n_shared_experts": "n_shared_experts",
        "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group",
        "n_limited_groups": "topk_group", "route_scale": "routed_scaling_factor",
        "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank",
        "qk_nope_head_dim": "qk_nope_head_dim", "qk_rope_head_dim": "qk_rope_head_dim",
        "v_head_dim": "v_head_dim", "max_seq_len": "max_position_embeddings",
    }  # fmt: skip
    config = {name: theirs[key] for name, key in names.items()}
    config |= {"score_func": "sigmoid", "original_seq_len": 512, "rope_factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "prompts").write_text("Who are you?\n")
    texts = []
    for options in ((), ("--config", tmp_path / "config.json")):
        rest = ("--input-file", tmp_path / "prompts", "--max-new-tokens", 12, "--temperature", 0)
        capsys.readouterr()
        assert run(monkeypatch, "generate.py", "--ckpt-path", tmp_path / "bf16", *options, *rest) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("Prompt: Who are you?\nCompletion: ")
