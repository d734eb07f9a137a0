"""Generation: what ends a sequence, how tokens are drawn, what is refused; text that grows."""

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.metrics import kl_divergence
from blockscale.model.decode import decode
from blockscale.model.generate import Sampling, generate
from blockscale.model.load import load_model
from blockscale.model.prefill import prefill
from blockscale.model.text import Growing
from tests.model import models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.make(folder)
    return load_model(folder, device="cpu", dtype=torch.float32)


PROMPTS = [[5, 6, 7], [8]]


def test_stop_tokens_end_a_sequence_and_are_left_out(model):
    free = generate(model, PROMPTS, max_new_tokens=10, stop=[])
    stopped = generate(model, PROMPTS, max_new_tokens=10, stop=[free[0][4]])
    ends = [each.index(free[0][4]) if free[0][4] in each else None for each in free]
    assert stopped == [each[:end] for each, end in zip(free, ends, strict=True)]
    assert ends[0] is not None
    assert ends[0] < 10


def test_a_cache_in_fp8_is_smaller_and_near(model):
    prompt, token = [list(range(3, 90))], torch.tensor([9])
    plain, fp8 = (model.cache(1, 128, fp8=wanted) for wanted in (False, True))
    steps = [
        # Prefill expands what is cached; decoding reads it as it is.
        (prefill(model, cache, prompt), decode(model, cache, [0], token, [88]))
        for cache in (plain, fp8)
    ]
    for exact, near in zip(*steps, strict=True):
        # Random weights make the most of an error; without scales the codes would say anything.
        assert 0 < kl_divergence(exact, near) < 0.3
    config = model.config
    latent, key = config.kv_lora_rank, config.qk_rope_head_dim
    assert fp8.bytes_per_token == config.num_hidden_layers * (latent + 4 * key + 4)
    assert len(generate(model, prompt, max_new_tokens=5, stop=[], fp8_cache=True)[0]) == 5


def test_a_listener_hears_every_token_and_may_end_a_sequence(model):
    heard = []

    def listen(number, token):
        heard.append((number, token))
        return number == 0 and len(heard) >= 3

    result = generate(model, PROMPTS, max_new_tokens=6, stop=[], on_token=listen)
    assert len(result[0]) == 2
    assert len(result[1]) == 6
    for number, tokens in enumerate(result):
        assert [token for who, token in heard if who == number] == tokens


def test_draws_depend_on_the_seed_alone(model):
    def draw(seed, **options):
        sampling = Sampling(temperature=2.0, seed=seed, **options)
        return generate(model, PROMPTS, max_new_tokens=20, stop=[], sampling=sampling)

    greedy = generate(model, PROMPTS, max_new_tokens=20, stop=[])
    assert draw(1) == draw(1) != draw(2)
    assert draw(1) != greedy
    assert draw(1, top_p=1e-6) == greedy, "the likeliest token alone"


def test_top_p_draws_from_the_fewest_tokens(model, monkeypatch):
    from blockscale.model.generate import _chooser

    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    choose = _chooser(Sampling(temperature=1.0, top_p=0.6), torch.device("cpu"))
    share = torch.bincount(choose(logits), minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0.625, 0.375, 0.0, 0.0]), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1], []], 4, "prompt 1: empty prompt"),
        ([[1, 320]], 4, r"prompt 0: no such token \(expected token ids below 320, got 320\)"),
        ([[1] * 510], 3, r"do not fit the context \(expected up to 512 tokens, got 510 \+ 3\)"),
    ],
)
def test_bad_prompts_are_refused(model, prompts, count, message):
    with pytest.raises(BlockscaleError, match=message):
        generate(model, prompts, max_new_tokens=count)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_bad_sampling_is_refused(options):
    with pytest.raises(BlockscaleError, match="bad "):
        Sampling(**options)


class Letters:
    """A tokenizer of bytes, for `Growing`."""

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def grow(text, stop=()):
    growing, pieces = Growing(Letters(), stop), []
    for byte in text.encode():
        pieces.append(growing.push(byte))
        if growing.stopped:
            break
    return pieces, growing.rest()


def test_a_character_is_shown_when_it_is_whole():
    pieces, rest = grow("aé€b")
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "b"]
    assert rest == ""


def test_a_stop_string_ends_the_text_and_no_part_of_it_is_shown():
    pieces, rest = grow("one END two", stop=["END"])
    assert "".join(pieces) == "one "
    assert rest == ""
    pieces, rest = grow("one EN", stop=["END"])
    assert "".join(pieces) == "one "
    assert rest == "EN", "it was not one after all"
