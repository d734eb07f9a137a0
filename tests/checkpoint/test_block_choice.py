"""The criterion of `--block-size auto`: what is chosen for planted weights, and that it is what it says."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockscale import reference
from blockscale.checkpoint.block_choice import (
    CANDIDATES,
    MIN_GAIN_DB,
    BlockChoice,
    Measured,
    choose,
    judge,
    together,
)
from blockscale.checkpoint.block_measure import STRIP_ROWS, measure
from blockscale.checkpoint.families import family_of
from blockscale.checkpoint.strips import Span
from blockscale.errors import NonFiniteError

PLAIN = family_of({"model_type": "llama"})
# One place in 128 x 128 blocks, and in none of the finer ones that of a neighbour.
ROW, COLUMN = 70, 40


def _gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def _planted(kind, factor):
    weight = _gaussian(256, 384)
    place = {"column": (slice(None), COLUMN), "row": ROW, "element": (ROW, COLUMN), "none": ()}[kind]
    weight[place] *= factor
    return weight.bfloat16()


def _measure(weight, scale_fmt="float32", family=PLAIN):
    experts = weight if weight.dim() == 3 else weight[None]
    parts = [
        (Span(expert, row, len(strip), 0), strip)
        for expert, matrix in enumerate(experts)
        for row in range(0, len(matrix), STRIP_ROWS)
        for strip in (matrix[row : row + STRIP_ROWS],)
    ]
    return measure(tuple(weight.shape), parts, family, scale_fmt)


def _chosen(weight, scale_fmt="float32"):
    return CANDIDATES[judge(_measure(weight, scale_fmt))[0]]


@pytest.mark.parametrize(
    ("kind", "factor", "float32", "ue8m0"),
    [
        ("none", 1, (128, 128), (128, 128)),
        ("column", 100, (1, 128), (128, 128)),
        ("column", 10_000, (1, 128), (128, 128)),
        ("row", 100, (128, 128), (128, 128)),
        ("row", 10_000, (32, 32), (32, 32)),
        ("row", 100_000, (1, 128), (1, 128)),
        ("element", 10_000, (128, 128), (128, 128)),
        ("element", 1_000_000, (1, 128), (1, 128)),
    ],
)
def test_what_is_chosen_for_planted_outliers(kind, factor, float32, ue8m0):
    weight = _planted(kind, factor)
    assert (_chosen(weight), _chosen(weight, "ue8m0")) == (float32, ue8m0)


@pytest.mark.parametrize("weight", [torch.zeros(130, 40), torch.full((64, 64), 0.5), _gaussian(1, 1)])
def test_weights_without_noise_keep_the_usual_size(weight):
    measured = _measure(weight)
    assert measured.noise[0] < 1e-12
    assert judge(measured)[0] == 0


def _truth(weight, size, scale_fmt):
    codes, scale = reference.quantize_weight(weight, size, scale_fmt)
    values = reference.dequantize_weight(codes, scale, size, torch.float32)
    exact = weight.double()
    share = (values.double() - exact).square().sum(-1) / exact.square().sum(-1)
    return float(share[exact.square().sum(-1) > 0].mean()), 4 * scale.numel()


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("shape", [(256, 384), (300, 200), (2, 150, 70)])
def test_the_figures_are_those_of_the_reference(shape, scale_fmt):
    weight = (_gaussian(*shape) * torch.logspace(-6, 6, shape[-2])[:, None]).bfloat16()
    measured = _measure(weight, scale_fmt)
    assert measured.values == math.prod(shape)
    for place, size in enumerate(CANDIDATES):
        noise, scale_bytes = _truth(weight, size, scale_fmt)
        assert measured.noise[place] == pytest.approx(noise, rel=1e-6)
        assert measured.scale_bytes[place] == scale_bytes


def test_outputs_of_fused_experts_that_are_stored_across_are_columns():
    weight = _planted("row", 100_000)
    across = family_of({"model_type": "gpt_oss"})
    turned = _measure(weight.T.contiguous()[None], family=across)
    straight = _measure(weight)
    assert turned.noise == pytest.approx(straight.noise, rel=1e-9)
    assert turned.scale_bytes == straight.scale_bytes


def test_nan_is_refused_and_the_largest_numbers_are_not_too_large():
    with pytest.raises(NonFiniteError):
        _measure(torch.full((4, 4), math.nan))
    huge = torch.full((40, 200), 3e38)
    huge[:, ::3] = 1e30
    assert all(math.isfinite(noise) for noise in _measure(huge).noise)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["none", "row", "column", "element"]),
    factor=st.integers(0, 24).map(lambda power: 2.0**power),
    seed=st.integers(0, 1000),
    scale_fmt=st.sampled_from(["float32", "ue8m0"]),
)
def test_the_choice_keeps_to_its_criterion(kind, factor, seed, scale_fmt):
    weight = _gaussian(160, 200, seed=seed)
    place = {"column": (slice(None), COLUMN), "row": ROW, "element": (ROW, COLUMN), "none": ()}[kind]
    weight[place] *= factor
    truths = [_truth(weight.bfloat16(), size, scale_fmt) for size in CANDIDATES]
    chosen, _ = judge(_measure(weight.bfloat16(), scale_fmt))

    def cost(place):
        noise, scale_bytes = truths[place]
        return noise * 4 ** (8 * scale_bytes / weight.numel())

    least = 10 ** (-MIN_GAIN_DB / 10)
    slack = 1 + 1e-6
    assert chosen == 0 or truths[chosen][0] <= truths[0][0] * least * slack
    for other in range(len(CANDIDATES)):
        if other == 0 or truths[other][0] <= truths[0][0] * least / slack:
            assert cost(chosen) <= cost(other) * slack


def test_a_bit_of_scales_has_to_buy_what_a_bit_of_mantissa_does():
    scales = (4, 16, 64, 512)  # of 128 x 128 values: bits 0.002 ... 0.25
    for gain, place in ((1.4, 0), (1.6, 3)):
        noise = (1.0, 1.0, 1.0, 10 ** (-gain / 10))
        assert judge(Measured(128 * 128, noise, scales))[0] == place
    noise = (1.0, 1.0, 10 ** (-0.49 / 10), 1.0)
    assert judge(Measured(128 * 128, noise, scales))[0] == 0


def test_tensors_of_a_group_agree_by_their_sum():
    usual, outlier = _measure(_planted("none", 1)), _measure(_planted("column", 10_000))
    apart = choose([{"a": usual}, {"b": outlier}])
    joined = choose([{"a": usual, "b": outlier}])
    assert [apart[name].block_size for name in "ab"] == [(128, 128), (1, 128)]
    assert (
        joined["a"].block_size == joined["b"].block_size == CANDIDATES[judge(together([usual, outlier]))[0]]
    )
    assert joined["a"].noise["1x128"] == usual.noise[3]
    assert joined["a"].reason.endswith("taken together with 1 more")


def test_a_choice_survives_json():
    choice = BlockChoice("digest", choose([{"a": _measure(_planted("column", 100))}]))
    assert BlockChoice.from_record(json.loads(json.dumps(choice.record()))) == choice
    assert choice.sizes == {"a": (1, 128)}
