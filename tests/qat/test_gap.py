"""A training of two minutes on a real model: what plain rounding lost comes back, on text it has not seen."""

import pytest

from blockscale import quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from blockscale.evaluate.run import Text, evaluate
from blockscale.qat import RunLimits, Training, train
from tests import data

BOOKS = data.TINY_DEEPSEEK.parent.parent / "data" / "gutenberg" / "val.txt"
RECIPE = Recipe(layout="blockscale", precision={"default": "fp8", "experts": "int3:g64"})


@pytest.mark.skipif(
    not (data.TINY_DEEPSEEK.is_dir() and BOOKS.is_file()), reason="no tiny model or books here"
)
def test_distillation_wins_back_part_of_what_three_bits_cost(tmp_path):
    text = BOOKS.read_text(encoding="utf-8")
    (tmp_path / "read.txt").write_text(text[:400_000], encoding="utf-8")
    (tmp_path / "unseen.txt").write_text(text[-100_000:], encoding="utf-8")
    tiny = str(data.TINY_DEEPSEEK)
    job = Training(tiny, tmp_path / "read.txt", RECIPE, distill=tiny, steps=24, batch=8, context=128, lr=3e-4)
    train(job, tmp_path / "trained", RunLimits(micro_batch=8))
    quantize_checkpoint(tiny, tmp_path / "plain", RECIPE)
    unseen = Text(str(tmp_path / "unseen.txt"), context=256, limit=12)

    def divergence(name):
        return evaluate(str(tmp_path / name), unseen, reference=tiny).scores.against.kl.value

    plain, trained = divergence("plain"), divergence("trained")
    assert trained < 0.85 * plain
