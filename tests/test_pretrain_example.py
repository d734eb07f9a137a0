"""The example that trains a small DeepSeek-V3 learns, balances its experts, and makes a checkpoint of use."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from blockscale import quantize_checkpoint, verify_checkpoint
from blockscale.checkpoint.recipe import PRESETS
from blockscale.testing.bench import load_module
from tests import data

transformers = pytest.importorskip("transformers")
example = load_module(Path(__file__).parent.parent / "examples" / "pretrain_deepseek.py")
TINY = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(losses, folder) of a short training."""
    folder = tmp_path_factory.mktemp("pretrain")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "seven", "wizards"]
    order = torch.randint(len(words), (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(words[i] + (".\n" if i == 3 else "") for i in order))
    arguments = [folder / "model", "--text", folder / "text.txt", "--val", folder / "text.txt"]
    sizes = ["--steps", 25, "--batch", 4, "--context", 32, "--lr", 5e-3, "--every", 10]
    return example.main([str(each) for each in [*arguments, *sizes]], TINY), folder / "model"


def test_it_learns(trained):
    losses, _ = trained
    assert len(losses) == 25
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]


def test_the_checkpoint_is_quantized_to_four_bits_and_keeps_its_biases(trained, tmp_path):
    _, folder = trained
    quantize_checkpoint(folder, tmp_path / "w4", PRESETS["w4a8"])
    assert verify_checkpoint(tmp_path / "w4", folder).ok
    biases = {name: each for name, each in data.read(folder).items() if name.endswith("correction_bias")}
    assert len(biases) == 1
    for bias in biases.values():
        assert bias.dtype == torch.float32
        assert bool((bias != 0).any())
        assert float(bias.abs().max()) <= 25 * example.RATE * 1.001
    assert transformers.AutoTokenizer.from_pretrained(folder)("the lazy dog")["input_ids"]


def test_biases_move_towards_even_use_and_counts_start_again():
    router = torch.nn.Module()
    router.e_score_correction_bias = torch.tensor([0.0, 0.5, 0.0, 0.0])
    loads = {router: torch.tensor([9, 3, 0, 4])}
    assert example.balance(loads, 0.1) == pytest.approx(9 / 4)
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([-0.1, 0.6, 0.1, 0.0]))
    assert loads[router].tolist() == [0, 0, 0, 0]


def test_the_rate_rises_then_falls_to_a_tenth():
    rates = [example.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(one >= two for one, two in pairwise(rates[5:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
