"""Perplexity against a brute-force computation, token by token, with a tiny random Llama."""

import math

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.evaluate.perplexity import PerplexityResult, paired_ratio, perplexity

pytest.importorskip("transformers")
from tests.evaluate.models import VOCABULARY, tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=1)


@pytest.fixture(scope="module")
def token_ids():
    return torch.randint(VOCABULARY, (103,), generator=torch.Generator().manual_seed(0))


def _brute_force(model, token_ids, context, stride):
    """Windows' (sum, count), each target predicted by its own forward pass over its prefix in the window."""
    scored, windows = set(), []
    for begin in range(0, len(token_ids), stride):
        losses = []
        for target in range(begin + 1, min(begin + context, len(token_ids))):
            if target in scored:
                continue
            scored.add(target)
            with torch.no_grad():
                logits = model(token_ids[None, begin:target]).logits[0, -1]
            losses.append(-math.log(torch.softmax(logits.double(), -1)[token_ids[target]].item()))
        if losses:
            windows.append((math.fsum(losses), len(losses)))
        if begin + context >= len(token_ids):
            break
    return windows


@pytest.mark.parametrize(
    ("context", "stride"),
    [(16, 16), (16, 7), (16, 15), (16, 1), (103, 103), (200, 200), (2, 2), (51, 51), (17, 17)],
)
def test_perplexity_equals_the_token_by_token_computation(model, token_ids, context, stride):
    windows = _brute_force(model, token_ids, context, stride)
    result = perplexity(model, token_ids, context, stride)

    total = sum(count for _, count in windows)
    mean = math.fsum(value for value, _ in windows) / total
    assert result.window_tokens == tuple(count for _, count in windows)
    assert result.window_nll == pytest.approx([value for value, _ in windows], rel=1e-5)
    assert result.nll == pytest.approx(mean, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert (result.tokens, result.context, result.stride) == (total, context, stride)


def test_disjoint_windows_skip_their_first_token_and_keep_the_short_last_window(model, token_ids):
    result = perplexity(model, token_ids, context=16, stride=16)
    assert result.window_tokens == (15, 15, 15, 15, 15, 15, 6)


def test_overlapping_windows_score_every_token_but_the_first_once(model, token_ids):
    assert perplexity(model, token_ids, context=16, stride=5).tokens == len(token_ids) - 1


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_batching_changes_no_window(model, token_ids, batch_size):
    one = perplexity(model, token_ids, context=16, stride=16)
    many = perplexity(model, token_ids, context=16, stride=16, batch_size=batch_size)
    assert many.window_tokens == one.window_tokens
    assert many.window_nll == pytest.approx(one.window_nll, rel=1e-5)


def test_lists_of_ints_and_int32_tensors_are_taken_as_well(model, token_ids):
    expected = perplexity(model, token_ids, context=16, stride=16)
    assert perplexity(model, token_ids.tolist(), context=16, stride=16) == expected
    assert perplexity(model, token_ids.int(), context=16, stride=16) == expected


def test_a_bfloat16_model_is_scored_with_a_float32_softmax(token_ids):
    model = tiny_llama(seed=1).bfloat16()
    with torch.no_grad():
        logits = model(token_ids[None]).logits[0, :-1]
    assert logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(logits.double(), token_ids[1:])
    result = perplexity(model, token_ids, context=103, stride=103)
    assert result.nll == pytest.approx(expected.item(), rel=1e-6)


def test_uniform_predictions_have_the_vocabulary_size_as_perplexity(token_ids):
    model = tiny_llama(seed=1)
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, token_ids, context=16, stride=16)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert result.standard_error == pytest.approx(0, abs=1e-6)


def test_the_model_is_left_in_the_mode_it_was_in(model, token_ids):
    model.train()
    perplexity(model, token_ids[:20], context=16, stride=16)
    assert model.training
    model.eval()
    perplexity(model, token_ids[:20], context=16, stride=16)
    assert not model.training


def test_standard_error_of_equal_windows_is_that_of_their_mean():
    means = [2.0, 3.0, 5.0, 4.0, 1.0]
    before, after = _result([0.0] * 5, 10), _result([10 * mean for mean in means], 10)
    expected = torch.tensor(means).std().item() / math.sqrt(5)
    ratio = paired_ratio(before, after)
    assert ratio.ratio == pytest.approx(math.exp(3.0))
    assert ratio.standard_error == pytest.approx(math.exp(3.0) * expected)
    assert ratio.windows == 5


def test_standard_error_matches_the_jackknife(model, token_ids):
    result = perplexity(model, token_ids, context=8, stride=8)
    pairs = list(zip(result.window_nll, result.window_tokens, strict=True))
    n = len(pairs)
    left_out = [
        sum(value for j, (value, _) in enumerate(pairs) if j != i)
        / sum(count for j, (_, count) in enumerate(pairs) if j != i)
        for i in range(n)
    ]
    center = sum(left_out) / n
    jackknife = math.sqrt((n - 1) / n * sum((value - center) ** 2 for value in left_out))
    assert result.standard_error == pytest.approx(jackknife, rel=0.1)


def test_paired_ratio_is_the_ratio_of_perplexities_with_a_smaller_error_than_either(token_ids):
    before, changed = tiny_llama(seed=1), tiny_llama(seed=1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter *= 1.01
    a, b = (perplexity(model, token_ids, context=8, stride=8) for model in (before, changed))
    ratio = paired_ratio(a, b)
    assert ratio.ratio == pytest.approx(b.perplexity / a.perplexity)
    assert 0 < ratio.standard_error < 0.2 * ratio.ratio * a.standard_error


def test_a_model_against_itself_has_ratio_one_without_error(model, token_ids):
    result = perplexity(model, token_ids, context=16, stride=16)
    ratio = paired_ratio(result, result)
    assert (ratio.ratio, ratio.standard_error) == (1.0, 0.0)


def test_one_window_has_no_standard_error(model, token_ids):
    assert math.isnan(perplexity(model, token_ids, context=103, stride=103).standard_error)


def test_results_of_different_windows_are_not_paired(model, token_ids):
    a = perplexity(model, token_ids, context=16, stride=16)
    b = perplexity(model, token_ids, context=16, stride=8)
    with pytest.raises(BlockscaleError, match="different windows"):
        paired_ratio(a, b)


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        ([], {}, "not enough text"),
        ([3], {}, "not enough text"),
        ([[3, 4], [5, 6]], {}, "not enough text"),
        ([3, 4, 5], {"context": 1}, "window too short"),
        ([3, 4, 5], {"context": 8, "stride": 9}, "bad stride"),
        ([3, 4, 5], {"context": 8, "stride": 0}, "bad stride"),
        ([3, 4, 5], {"batch_size": 0}, "bad batch size"),
    ],
)
def test_unusable_arguments_are_refused(model, tokens, arguments, message):
    with pytest.raises(BlockscaleError, match=message):
        perplexity(model, tokens, **arguments)


def _result(window_nll: list[float], tokens: int) -> PerplexityResult:
    count = len(window_nll)
    return PerplexityResult(
        1.0, 0.0, 0.0, tokens * count, tokens + 1, tokens + 1, tuple(window_nll), (tokens,) * count
    )
