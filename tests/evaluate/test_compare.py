"""Scores of a model against a reference: against a computation token by token, and what is refused."""

import math

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.evaluate.compare import score_windows, summarize
from blockscale.evaluate.windows import Window, cut, mean_of, spread, student_t

pytest.importorskip("transformers")
from blockscale.evaluate.subjects import TransformersSubject
from tests.evaluate.models import VOCABULARY, random_tokens, tiny_llama

TOKENS = random_tokens(75)


@pytest.fixture(scope="module")
def models():
    return tiny_llama(1), tiny_llama(1, initializer_range=0.41)


def scored(model, reference, stride=20, batch_size=1):
    pair = TransformersSubject("model", model), TransformersSubject("reference", reference)
    return list(score_windows(*pair, TOKENS, cut(TOKENS, 20, stride), batch_size))


@pytest.mark.parametrize("stride", [20, 7])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_every_token_alone(models, stride, batch_size):
    seen = set()
    for score, begin in zip(scored(*models, stride, batch_size), range(0, 75, stride), strict=False):
        nll, other, kl, agreed, count = 0.0, 0.0, 0.0, 0, 0
        for target in range(begin + 1, min(begin + 20, 75)):
            if target in seen:
                continue
            seen.add(target)
            with torch.no_grad():
                q, p = (
                    each(TOKENS[None, begin:target]).logits[0, -1].double().softmax(-1) for each in models
                )
            nll -= math.log(q[TOKENS[target]])
            other -= math.log(p[TOKENS[target]])
            kl += (p * (p / q).log()).sum().item()
            agreed += int(p.argmax() == q.argmax())
            count += 1
        assert (score.begin, score.tokens, score.agreed) == (begin, count, agreed)
        assert (score.nll, score.reference_nll, score.kl) == pytest.approx((nll, other, kl), rel=1e-4)
    # The first token of a text has nothing before it, nor has that of a window of its own.
    assert seen == set(range(1, 75)) - ({20, 40, 60} if stride == 20 else set())


def test_figures_are_means_over_tokens_with_paired_errors(models):
    scores = scored(*models)
    result = summarize(scores)
    total = sum(score.tokens for score in scores)
    assert (result.tokens, result.windows) == (total, 4) == (75 - 4, 4)
    assert result.perplexity.value == pytest.approx(math.exp(sum(score.nll for score in scores) / total))
    ratio = result.perplexity.value / result.against.perplexity.value
    assert result.against.ratio.value == pytest.approx(ratio)
    assert result.against.kl.value == pytest.approx(sum(score.kl for score in scores) / total)
    assert result.against.top1.value == sum(score.agreed for score in scores) / total
    # What both models find hard cancels.
    assert result.against.ratio.standard_error / ratio < 0.3 * (
        result.perplexity.standard_error / result.perplexity.value
    )
    assert result.against.kl.low < result.against.kl.value < result.against.kl.high


def test_a_model_against_itself_differs_in_nothing(models):
    against = summarize(scored(models[0], models[0])).against
    assert (against.ratio.value, against.ratio.standard_error) == (1.0, 0.0)
    assert (against.kl.value, against.top1.value) == (0.0, 1.0)


def test_other_vocabularies_are_refused(models):
    with pytest.raises(BlockscaleError, match=f"vocabularies differ.*expected 100.*got {VOCABULARY}"):
        scored(models[0], tiny_llama(1, vocab_size=100))


def test_nan_is_traced_to_the_layer_that_made_it(models):
    broken = tiny_llama(1)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    message = r"model: NaN or Inf in the logits \(got first in model\.layers\.1\.mlp\.up_proj\)"
    with pytest.raises(BlockscaleError, match=message):
        scored(broken, models[1])


def test_intervals_of_few_windows_are_wide():
    exact = {1: 12.7062, 2: 4.3027, 3: 3.1824, 5: 2.5706, 30: 2.0423}  # tables of Student's t
    for freedom, quantile in exact.items():
        assert student_t(freedom) == pytest.approx(quantile, rel=2e-3)
    estimate = mean_of([1.0, 2.0, 6.0], [1, 1, 1])
    # Mean 3, standard deviation sqrt(7).
    assert estimate.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert estimate.high - 3 == pytest.approx(4.3027 * math.sqrt(7 / 3), rel=1e-4)
    assert math.isnan(mean_of([1.0], [3]).low)


def test_a_limit_takes_whole_windows_from_all_over_the_text():
    windows = cut(torch.zeros(95, dtype=torch.int64), 10, 10)
    assert spread(windows, None) == windows == spread(windows, 10)
    assert [window.begin for window in spread(windows, 3)] == [0, 30, 60]
    assert Window(90, 95, 4) in windows
    assert Window(90, 95, 4) not in spread(windows, 9)
    with pytest.raises(BlockscaleError, match="bad limit"):
        spread(windows, 0)


def test_a_bfloat16_model_is_scored_with_a_float32_softmax():
    model = tiny_llama(1).bfloat16()
    with torch.no_grad():
        logits = model(TOKENS[None]).logits[0, :-1]
    assert logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(logits.double(), TOKENS[1:], reduction="sum")
    (score,) = score_windows(TransformersSubject("model", model), None, TOKENS, cut(TOKENS, 75, 75))
    assert score.nll == pytest.approx(expected.item(), rel=1e-6)


def test_uniform_predictions_have_the_vocabulary_size_as_perplexity():
    model = tiny_llama(1)
    torch.nn.init.zeros_(model.lm_head.weight)
    perplexity = summarize(scored(model, model)).perplexity
    assert perplexity.value == pytest.approx(VOCABULARY, rel=1e-5)
    assert perplexity.standard_error == pytest.approx(0, abs=1e-5)


def test_the_standard_error_of_unequal_windows_matches_the_jackknife(models):
    scores = list(score_windows(TransformersSubject("model", models[0]), None, TOKENS, cut(TOKENS, 8, 8)))
    left_out = [
        sum(each.nll for each in scores if each is not one)
        / sum(each.tokens for each in scores if each is not one)
        for one in scores
    ]
    n, center = len(left_out), sum(left_out) / len(left_out)
    jackknife = math.sqrt((n - 1) / n * sum((value - center) ** 2 for value in left_out))
    found = mean_of([each.nll for each in scores], [each.tokens for each in scores])
    assert found.standard_error == pytest.approx(jackknife, rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "message"),
    [
        ([3], 8, 8, "not enough text"),
        ([[3, 4], [5, 6]], 8, 8, "not enough text"),
        ([3, 4, 5], 1, 1, "window too short"),
        ([3, 4, 5], 8, 9, "bad stride"),
        ([3, 4, 5], 8, 0, "bad stride"),
    ],
)
def test_unusable_windows_are_refused(tokens, context, stride, message):
    with pytest.raises(BlockscaleError, match=message):
        cut(torch.tensor(tokens), context, stride)


def test_a_batch_has_windows(models):
    with pytest.raises(BlockscaleError, match="bad batch size"):
        scored(*models, batch_size=0)
