"""Trainings for tests: a small model with a tokenizer, a text, and options that take a second."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from blockscale.checkpoint.recipe import Recipe
from blockscale.qat import QatOptions, Training
from tests.evaluate.models import WORD_COUNT, random_tokens, save_tokenizer
from tests.model.models import make_mtp
from tests.qat.models import checkpoints

INT3 = Recipe(layout="blockscale", precision={"default": "int3:g64"})


def make_source(folder, name="llama", **changes):
    """A checkpoint that predicts words w0, w1, ...; the folder. "mtp" is DeepSeek-V3 with that layer."""
    of_groups = {"moe_intermediate_size": 64}  # of INT3, for all weights of the experts alike
    make = partial(make_mtp, **of_groups) if name == "mtp" else partial(checkpoints.make, name=name)
    make(folder, vocab_size=WORD_COUNT, initializer_range=0.05, **changes)
    save_tokenizer(folder)
    return folder


def make_text(file, words=3000, seed=5):
    """Lines of twelve words, of which the first tells the others; the file."""
    starts = random_tokens(words // 12, seed, WORD_COUNT).tolist()
    lines = [" ".join(f"w{(start + 7 * place) % WORD_COUNT}" for place in range(12)) for start in starts]
    file.write_text("\n".join(lines) + "\n")
    return file


def training(source, text, **changes):
    """A few steps that distill the model into its INT3 self."""
    job = Training(
        model=str(source),
        data=Path(text),
        recipe=INT3,
        qat=QatOptions(),
        distill=str(source),
        steps=6,
        batch=4,
        context=16,
        lr=1e-3,
        check_data=str(text),
        check_windows=3,
    )
    return replace(job, **changes)
