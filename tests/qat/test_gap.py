"""A training of a minute on a real model: part of what plain rounding lost comes back, on unseen text."""

import pytest

from blockscale import quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from blockscale.evaluate.run import Text, evaluate
from blockscale.qat import Training, train
from tests import data

BOOKS = data.TINY_DEEPSEEK.parent.parent / "data" / "gutenberg" / "val.txt"
RECIPE = Recipe(layout="blockscale", precision={"default": "int3:g64"})


@pytest.mark.skipif(
    not (data.TINY_DEEPSEEK.is_dir() and BOOKS.is_file()), reason="no tiny model or books here"
)
def test_twelve_thousand_tokens_win_back_a_tenth_of_what_three_bits_cost(tmp_path):
    text = BOOKS.read_text(encoding="utf-8")
    (tmp_path / "read.txt").write_text(text[:400_000], encoding="utf-8")
    (tmp_path / "unseen.txt").write_text(text[-100_000:], encoding="utf-8")
    tiny = str(data.TINY_DEEPSEEK)
    options = {"distill": tiny, "steps": 24, "batch": 4, "context": 128, "lr": 1e-4}
    train(Training(tiny, tmp_path / "read.txt", RECIPE, **options), tmp_path / "trained")
    quantize_checkpoint(tiny, tmp_path / "plain", RECIPE)
    unseen = Text(str(tmp_path / "unseen.txt"), context=256, limit=6)

    def divergence(name):
        return evaluate(str(tmp_path / name), unseen, reference=tiny).scores.against.kl.value

    assert divergence("trained") < 0.9 * divergence("plain")
