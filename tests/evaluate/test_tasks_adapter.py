"""What lm-eval is answered: log-likelihoods token by token, texts against the model's own generation."""

import math

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from blockscale.errors import BlockscaleError
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.subjects import TransformersSubject, open_subject
from blockscale.evaluate.tasks.adapter import SubjectLM
from tests.evaluate.models import save_byte_tokenizer, tiny_llama
from tests.model import models

VOCABULARY = 258
PAIRS = [
    ("The question is", " this"),
    ("The question is", " t"),
    ("The question is", " o"),  # reads what the line before it reads
    ("A much longer context, with a comma. ", "short"),
    ("x", "a continuation that is longer than its context"),
    ("", "no context"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(1, vocab_size=VOCABULARY, max_position_embeddings=64)


@pytest.fixture
def lm(model, tokenizer):
    return SubjectLM(TransformersSubject("model", model), tokenizer)


def ask(method, requests):
    kind = method.__name__
    return method([Instance(kind, {}, arguments, number) for number, arguments in enumerate(requests)])


def one_by_one(model, context, continuation):
    """(log-likelihood, greedy), each token from a forward pass of its own."""
    value, greedy, ids = 0.0, True, list(context)
    for token in continuation:
        with torch.no_grad():
            logits = model(torch.tensor([ids[-64:]])).logits[0, -1].double()
        value += math.log(logits.softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        ids.append(token)
    return value, greedy


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_log_likelihood_is_that_of_its_tokens_one_by_one(model, tokenizer, lm, batch_size):
    lm = SubjectLM(TransformersSubject("model", model), tokenizer, batch_size)
    for (context, continuation), found in zip(PAIRS, ask(lm.loglikelihood, PAIRS), strict=True):
        # What follows a space belongs to the continuation; a text begins with <bos>.
        stripped = context.rstrip()
        whole = tokenizer(context + continuation)["input_ids"]
        start = len(tokenizer(stripped)["input_ids"])
        expected = one_by_one(model, whole[:start], whole[start:])
        assert found == (pytest.approx(expected[0], rel=1e-5), expected[1])


def test_a_continuation_is_greedy_if_the_model_would_write_it(model, tokenizer, lm):
    ids = tokenizer("some text")["input_ids"]
    with torch.no_grad():
        likeliest = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    pairs = [(None, ids, [likeliest]), (None, ids, [likeliest - 1]), (None, ids, [likeliest, likeliest - 1])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs)][:2] == [True, False]
    assert lm._loglikelihood_tokens(pairs)[2][1] == one_by_one(model, ids, pairs[2][2])[1]


def test_what_shares_its_input_is_computed_once_and_answers_are_counted(lm, monkeypatch):
    rows, told = [], []
    real = lm._subject.logits
    monkeypatch.setattr(lm._subject, "logits", lambda ids: rows.append(len(ids)) or real(ids))
    lm.on_request = told.append
    ask(lm.loglikelihood, [("Answer:", f" {letter}") for letter in "ABCD"])
    # A space is a byte here, and so every choice has two tokens and reads the first.
    assert sum(rows) == 1
    assert told == [4] * 4


def test_of_what_does_not_fit_the_context_loses_its_beginning(model, tokenizer, lm):
    context = "0123456789" * 9
    (found,) = ask(lm.loglikelihood, [(context, "end")])
    ids = tokenizer(context + "end")["input_ids"]
    expected = model(torch.tensor([ids[-65:-1]])).logits[0].log_softmax(-1)
    expected = expected[-3:].gather(-1, torch.tensor(ids[-3:])[:, None]).sum().item()
    assert found[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(BlockscaleError, match="a continuation does not fit the model's context"):
        ask(lm.loglikelihood, [("x", "y" * 80)])


def test_a_whole_text_is_scored_once_in_windows(model, tokenizer, lm):
    text = "A text. " * 20
    (found,) = ask(lm.loglikelihood_rolling, [(text,)])
    ids = tokenizer(text)["input_ids"]
    windows = [([256, *ids[:63]], ids[:64]), (ids[63:127], ids[64:128]), (ids[-65:-1], ids[128:])]
    expected = 0.0
    for read, scored in windows:
        rows = model(torch.tensor([read])).logits[0].log_softmax(-1)[-len(scored) :]
        expected += rows.gather(-1, torch.tensor(scored)[:, None]).sum().item()
    assert found == pytest.approx(expected, rel=1e-5)


def generated(model, tokenizer, prompt, count):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    new = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def test_texts_are_those_of_greedy_generation_up_to_a_stop(model, tokenizer, lm):
    prompts = ["Question: why?", "Q", "Another"]
    whole = [generated(model, tokenizer, prompt, 12) for prompt in prompts]
    options = {"until": ["@@@"], "max_gen_toks": 12, "do_sample": False}
    assert ask(lm.generate_until, [(prompt, options) for prompt in prompts]) == whole
    stop = whole[0][3:5]
    assert len(stop) == 2
    found = ask(lm.generate_until, [(prompts[0], options | {"until": [stop, "@@@"]})])
    assert found == [whole[0][: whole[0].index(stop)]]


def test_texts_of_our_runtime_are_those_of_transformers_whatever_the_batch(tmp_path):
    models.make(tmp_path, vocab_size=VOCABULARY, initializer_range=0.4)
    tokenizer = save_byte_tokenizer(tmp_path)
    options = {"until": "@@@", "max_gen_toks": 8}
    requests = [("A prompt", options), ("Another, longer one", options), ("x", options)]
    found = [
        ask(
            SubjectLM(open_subject(str(tmp_path), Loading(runtime, "cpu")), tokenizer, size).generate_until,
            requests,
        )
        for runtime, size in (("transformers", 1), ("blockscale", 1), ("blockscale", 2))
    ]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 3


def test_what_cannot_be_answered_is_refused(lm, tokenizer):
    with pytest.raises(BlockscaleError, match="its context is too short"):
        ask(lm.generate_until, [("x", {"until": [], "max_gen_toks": 64})])
    with pytest.raises(BlockscaleError, match="a task that samples its texts"):
        ask(lm.generate_until, [("x", {"until": [], "do_sample": True, "temperature": 0.7})])
    broken = tiny_llama(1, vocab_size=VOCABULARY)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    lm = SubjectLM(TransformersSubject("model", broken), tokenizer)
    with pytest.raises(BlockscaleError, match=r"NaN or Inf in the logits.*layers\.1\.mlp\.up_proj"):
        ask(lm.loglikelihood, [("a", "b")])
