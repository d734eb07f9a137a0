"""Two tokens a step: the same text as one a step, whatever is drafted; what ends it; what is counted."""

import copy

import pytest
import torch

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.model import generate as generating
from blockscale.model.generate import Sampling, generate
from blockscale.model.load import load_model
from blockscale.model.prefill import prefill
from blockscale.model.speculative import Drafting
from tests import data
from tests.model import models

KINDS = {
    "float32": ("wide", torch.float32, None),
    "bf16": ("wide", torch.bfloat16, None),
    "fp8": ("fp8", torch.bfloat16, "fp8"),
    "fp8 as bf16": ("fp8", torch.bfloat16, "high"),
}
NEW = 16
# By how much, of the logits' standard deviation, two tokens may differ that change places where products of
# other numbers of rows are rounded otherwise: not at all in float32.
TIE = {"float32": 0.0, "bf16": 0.05, "fp8": 0.2, "fp8 as bf16": 0.05}


def prompt(count, seed=0):
    return torch.randint(320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(1 + 5 * number % 37, number) for number in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likely")
    models.make_mtp(folder / "wide", likely=True, rope_parameters=models.YARN)
    quantize_checkpoint(folder / "wide", folder / "fp8")
    return folder


def load(folder, kind="float32"):
    name, dtype, compute = KINDS[kind]
    return load_model(folder / name, device="cpu", dtype=dtype, compute=compute, mtp=True)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def without_drafts(model):
    plain = copy.copy(model)
    plain.mtp = None
    return plain


def counted(model, prompts, **options):
    """New tokens, and of each prompt whether its drafts were right."""
    drafts = [[] for _ in prompts]
    tokens = generate(model, prompts, on_draft=lambda number, right: drafts[number].append(right), **options)
    return tokens, drafts


def check_same(model, kind, prompts, new):
    """What is drafted leads to the text of one token a step, or to another that is as likely up to TIE."""
    plain = without_drafts(model)
    expected = generate(plain, prompts, max_new_tokens=new, stop=[])
    got = generate(model, prompts, max_new_tokens=new, stop=[])
    for prompt, one, other in zip(prompts, expected, got, strict=True):
        assert len(one) == len(other) == new
        place = next((place for place in range(new) if one[place] != other[place]), None)
        if place is not None:
            so_far = prompt + one[:place]
            logits = prefill(plain, plain.cache(1, len(so_far)), [so_far])[0]
            assert abs(logits[one[place]] - logits[other[place]]) <= TIE[kind] * logits.std()
            assert TIE[kind], "in float32 they are the same"


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_one_token_a_step(folder, kind):
    model = load(folder, kind)
    check_same(model, kind, PROMPTS, NEW)
    for alone in PROMPTS if kind == "float32" else PROMPTS[:4]:
        check_same(model, kind, [alone], NEW // 2)


def test_a_batch_is_its_sequences_one_by_one(model):
    together = counted(model, PROMPTS, max_new_tokens=NEW, stop=[])
    rights = [right for each in together[1] for right in each]
    assert 0.2 < sum(rights) / len(rights) < 0.9, "drafts are to be right and wrong"
    for number in range(0, 20, 3):
        alone = counted(model, [PROMPTS[number]], max_new_tokens=NEW, stop=[])
        assert alone == ([together[0][number]], [together[1][number]])


@pytest.mark.parametrize("branch", ["v2", "v3 no query latent"])
def test_other_branches(tmp_path, branch):
    changes = {"q_lora_rank": None} if "no query" in branch else {}
    models.make_mtp(tmp_path / "wide", branch[:2], likely=True, **changes)
    model = load(tmp_path)
    expected = generate(without_drafts(model), PROMPTS, max_new_tokens=NEW, stop=[])
    tokens, drafts = counted(model, PROMPTS, max_new_tokens=NEW, stop=[])
    assert tokens == expected
    assert {right for each in drafts for right in each} == {True, False}


@pytest.fixture
def told(monkeypatch):
    """Replaces drafts by what a function of (prompt, place in the new tokens) says."""

    def replace(prompts, draft):
        start, advance = Drafting.start, Drafting.advance

        def changed(state, rows):
            state = state.clone()
            for line, row in zip(state, rows, strict=True):
                line[2] = draft(row, int(line[0]) - len(prompts[row]) + 1)
            return state

        monkeypatch.setattr(
            Drafting, "start", lambda self, prompts: changed(start(self, prompts), range(len(prompts)))
        )
        monkeypatch.setattr(
            Drafting, "advance", lambda self, rows, *rest: changed(advance(self, rows, *rest), rows)
        )

    return replace


WRONG = {"always right": set(), "always wrong": {0, 1, 2, 3, 4}, "now and then": {1, 4}, "first": {0, 2, 3}}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("new", [1, 2, 3, 8, 9])
def test_drafts_change_steps_and_nothing_else(model, told, wrong, new):
    prompts = [prompt(4), prompt(1, 1), prompt(9, 2)]
    expected = generate(without_drafts(model), prompts, max_new_tokens=new + 2, stop=[])

    def is_wrong(row, place):
        return (row + place) % 5 in WRONG[wrong]

    told(prompts, lambda row, place: (expected[row] + [0, 0])[place] + is_wrong(row, place))
    tokens, drafts = counted(model, prompts, max_new_tokens=new, stop=[])
    assert tokens == [each[:new] for each in expected]
    for row, found in enumerate(drafts):
        # After the first token: a step has a draft of the next place, and two places if it is right.
        place, steps = 1, []
        while place < new:
            steps.append(not is_wrong(row, place))
            place += 1 + steps[-1]
        assert found == steps


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("place", range(5))
def test_a_stop_token_ends_a_sequence_wherever_it_comes(model, told, right, place):
    prompts = [prompt(4), prompt(7, 1)]
    expected = generate(without_drafts(model), prompts, max_new_tokens=12, stop=[])
    told(prompts, lambda row, at: (expected[row] + [0])[at] + (not right))
    stop = expected[0][place]
    ends = [each.index(stop) if stop in each else None for each in expected]
    assert generate(model, prompts, max_new_tokens=10, stop=[stop]) == [
        each[:10][:end] for each, end in zip(expected, ends, strict=True)
    ]


@pytest.mark.parametrize("end", [1, 2, 3, 4])
def test_a_listener_hears_tokens_in_order_and_may_end_a_sequence_between_two(model, told, end):
    prompts = [prompt(4), prompt(7, 1)]
    expected = generate(without_drafts(model), prompts, max_new_tokens=12, stop=[])
    told(prompts, lambda row, at: (expected[row] + [0])[at])
    heard = [[], []]

    def listen(number, token):
        heard[number].append(token)
        return number == 0 and len(heard[0]) == end

    tokens = generate(model, prompts, max_new_tokens=9, stop=[], on_token=listen)
    assert tokens == heard == [expected[0][:end], expected[1][:9]]


@pytest.mark.parametrize("right", [True, False])
def test_the_context_may_be_filled_to_its_end(model, told, right):
    """Also by sequences whose host is a step behind, and that go on past their end for one step."""
    long, short = prompt(501), prompt(3, 1)
    expected = generate(without_drafts(model), [long, short], max_new_tokens=11, stop=[])
    told([long, short], lambda row, at: (expected[row] + [0, 0, 0])[at] + (not right))
    assert generate(model, [long, short], max_new_tokens=11, stop=[]) == expected


class Late(generating._OnHost):
    """What a GPU does: the next step is started before the tokens of this one are looked at."""

    def __init__(self, state):
        super().__init__(state.clone())
        self.is_late = True

    def values(self):
        return self._state.tolist()


def test_a_host_that_is_a_step_behind_sees_the_same(model, told, monkeypatch):
    prompts = [prompt(4), prompt(500, 1), prompt(9, 2)]
    expected, drafts = counted(model, prompts, max_new_tokens=12, stop=[])
    stop = expected[2][5]
    stopped = counted(model, prompts, max_new_tokens=12, stop=[stop])
    plain = generate(without_drafts(model), prompts, max_new_tokens=12, stop=[stop])
    monkeypatch.setattr(generating, "_OnHost", Late)
    assert counted(model, prompts, max_new_tokens=12, stop=[]) == (expected, drafts)
    assert counted(model, prompts, max_new_tokens=12, stop=[stop]) == stopped
    assert generate(without_drafts(model), prompts, max_new_tokens=12, stop=[stop]) == plain == stopped[0]


def test_prompts_read_in_pieces_are_drafted_for_as_whole_ones(model, monkeypatch):
    expected = counted(model, PROMPTS, max_new_tokens=NEW, stop=[])
    monkeypatch.setattr("blockscale.model.prefill._PREFILL_TOKENS", 16)
    assert counted(model, PROMPTS, max_new_tokens=NEW, stop=[]) == expected


def test_drawn_tokens_are_distributed_as_the_model_says(tmp_path):
    """Frequencies of the first three new tokens in many draws, against their probabilities."""
    # Narrow, for thousands of sequences are drawn at once.
    narrow = {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    models.make_mtp(tmp_path / "wide", likely=True, vocab_size=5, initializer_range=0.1, **narrow)
    model, start, count = load(tmp_path), [1, 4], 4000
    options = {"max_new_tokens": 3, "stop": [], "sampling": Sampling(temperature=1.5, top_p=0.9)}
    tokens, drafts = counted(model, [start] * count, **options)
    rights = [right for each in drafts for right in each]
    assert 0.2 < sum(rights) / len(rights) < 0.8, "some drafts are to be right"
    plain = generate(without_drafts(model), [start] * count, **options)
    drawn, expected = (
        torch.bincount(torch.tensor([25 * a + 5 * b + c for a, b, c in each]), minlength=125) / count
        for each in (tokens, plain)
    )
    # Both are estimates: four standard errors of their difference.
    limit = 4 * (2 * expected.clamp(min=1 / count) / count).sqrt()
    assert ((drawn - expected).abs() < limit).all()
    assert (expected > 0.01).sum() > 8, "nothing to compare"


@pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")
@pytest.mark.parametrize("kind", ["float32", "bf16", "fp8"])
def test_a_trained_model_writes_the_same(tmp_path, kind):
    import transformers

    models.tiny_mtp(tmp_path / "wide")
    if KINDS[kind][0] == "fp8":
        quantize_checkpoint(tmp_path / "wide", tmp_path / "fp8")
    model = load(tmp_path, kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(data.TINY_DEEPSEEK)
    starts = ("The old man", "Once upon a time", "def main():", "In the year 1815", "She said")
    words = (", who had", " of the house and of the garden behind it")
    prompts = [tokenizer(start + word)["input_ids"] for start in starts for word in words]
    check_same(model, kind, prompts, 32 if kind == "float32" else 16)
    check_same(model, kind, prompts[3:4], 16)
    _, drafts = counted(model, prompts, max_new_tokens=16, stop=[])
    assert {right for each in drafts for right in each} == {True, False}
