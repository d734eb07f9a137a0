"""The runtime against transformers: every branch of the architecture with random weights, a trained model."""

import pytest
import torch

from blockscale.model.decode import decode
from blockscale.model.generate import generate
from blockscale.model.load import load_model
from blockscale.model.prefill import all_logits, prefill
from tests import data
from tests.model import models

LIMIT = 1e-4
BRANCHES = {
    "v3": ("v3", {}),
    "v3 plain rotary": ("v3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "v3 yarn": ("v3", {"rope_parameters": models.YARN}),
    "v3 halves": ("v3", {"rope_interleave": False}),
    "v3 no query latent": ("v3", {"q_lora_rank": None}),
    "v3 one group": ("v3", {"n_group": 1, "topk_group": 1}),
    "v3 unnormalized": ("v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    "v3 two shared": ("v3", {"n_shared_experts": 2}),
    "v3 all dense": ("v3", {"first_k_dense_replace": 3}),
    "v3 biases": ("v3", {"attention_bias": True}),
    "v3 tied": ("v3", {"tie_word_embeddings": True}),
    "v2": ("v2", {}),
    "v2 greedy": ("v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "v2 lite": ("v2", {"q_lora_rank": None, "rope_parameters": models.YARN, "n_shared_experts": 2}),
}


def load(folder, **options):
    return load_model(folder, device="cpu", dtype=torch.float32, **options)


def tokens(count, seed=0, vocabulary=320):
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(model, sequence):
    return all_logits(model, model.cache(1, len(sequence)), [sequence])[0]


@pytest.mark.parametrize("branch", BRANCHES)
def test_logits_are_those_of_transformers(tmp_path, branch):
    family, changes = BRANCHES[branch]
    theirs = models.make(tmp_path, family, **changes)
    sequence = tokens(90)
    expected = models.logits(theirs, sequence)
    assert expected.abs().max() > 0.5, "nothing to compare"
    torch.testing.assert_close(logits_of(load(tmp_path), sequence), expected, rtol=0, atol=LIMIT)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    theirs = models.make(folder, rope_parameters=models.YARN)
    return theirs, load(folder)


def test_absorbed_attention_is_naive_attention(pair):
    theirs, ours = pair
    sequence = tokens(40)
    cache = ours.cache(1, 300)
    prefill(ours, cache, [sequence[:1]])
    for length in range(2, len(sequence) + 1):
        step = decode(ours, cache, [0], torch.tensor([sequence[length - 1]]), [length])
    torch.testing.assert_close(step[0], models.logits(theirs, sequence)[-1], rtol=0, atol=LIMIT)


def test_a_prompt_read_in_pieces_is_the_prompt(pair, monkeypatch):
    theirs, ours = pair
    prompts = [tokens(50), tokens(7, 1), tokens(33, 2)]
    monkeypatch.setattr("blockscale.model.prefill._PREFILL_TOKENS", 16)
    got = prefill(ours, ours.cache(3, 64), prompts)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(got[row], models.logits(theirs, prompt)[-1], rtol=0, atol=LIMIT)


def test_a_batch_is_its_sequences_one_by_one(pair):
    _, ours = pair
    prompts = [tokens(count, count) for count in (3, 40, 1, 17)]
    together = generate(ours, prompts, max_new_tokens=12, stop=[])
    assert together == [generate(ours, [prompt], max_new_tokens=12, stop=[])[0] for prompt in prompts]


@pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")
def test_a_trained_model_writes_what_transformers_writes():
    import transformers

    ours, folder = load(data.TINY_DEEPSEEK), data.TINY_DEEPSEEK
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    starts = (
        "The old man",
        "Once upon a time",
        "def main():",
        "In the year 1815",
        "A letter from",
        "She said",
    )
    words = (" and the sea", ", who had", " was", " of the house and of the garden behind it")
    prompts = [tokenizer(start + word)["input_ids"] for start in starts for word in words][:20]
    written = generate(ours, prompts, max_new_tokens=64, stop=[])
    for prompt, new in zip(prompts, written, strict=True):
        expected = models.logits(theirs, prompt + new)
        # Token by token what transformers finds likeliest after the same text: what it would have written.
        assert new == expected.argmax(-1)[len(prompt) - 1 : -1].tolist()
        torch.testing.assert_close(logits_of(ours, prompt + new), expected, rtol=0, atol=LIMIT)
