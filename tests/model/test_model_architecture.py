"""What follows from a configuration, and what it refuses when it is made by hand."""

import pydantic
import pytest

from blockscale.model.architecture import ModelConfig
from blockscale.model.config import from_huggingface
from tests.model.configs import ORIGINAL, changed, refusal


@pytest.mark.parametrize(
    ("first", "freq", "experts", "layers"),
    [(1, 1, 32, [1, 2, 3, 4]), (0, 2, 32, [0, 2, 4]), (3, 2, 32, [4]), (0, 1, 0, [])],
)
def test_which_layers_have_experts(first, freq, experts, layers):
    changes = {"first_k_dense_replace": first, "moe_layer_freq": freq, "n_routed_experts": experts}
    config = from_huggingface(changed(**changes))
    assert [layer for layer in range(5) if config.is_moe(layer)] == layers


def test_heads_and_experts_share_out_over_the_ranks():
    config = from_huggingface(changed(vocab_size=1001, n_routed_experts=12, n_group=1, topk_group=1))
    for ranks in (1, 2, 4):
        config.check_ranks(ranks)
    for ranks in (0, 3, 8):
        assert refusal(lambda ranks=ranks: config.check_ranks(ranks)) == (
            "model does not share out evenly over the ranks (expected a number that divides 8 heads and "
            f"12 experts, got {ranks} ranks); start 1, 2, 4 ranks"
        )
    dense = from_huggingface(changed(n_routed_experts=0))
    dense.check_ranks(8)
    assert "divides 8 heads, got 3 ranks" in refusal(lambda: dense.check_ranks(3))


def test_a_configuration_is_frozen_hashable_and_checked_when_made_by_hand():
    config = from_huggingface(ORIGINAL)
    assert hash(config) == hash(from_huggingface(dict(ORIGINAL)))
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.hidden_size = 1
    values = dict(config)
    with pytest.raises(
        pydantic.ValidationError, match="bad n_group: expected a divisor of 32 experts, got 5"
    ):
        ModelConfig(**{**values, "n_group": 5})
    with pytest.raises(pydantic.ValidationError, match="Extra inputs"):
        ModelConfig(**values, hidden=1)
