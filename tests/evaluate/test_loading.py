"""Quantizing as a model is read: the same model as `quantize` writes, and what cannot be done is refused."""

import pytest
import torch

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import BlockscaleError
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.subjects import open_subject
from tests.evaluate.models import random_tokens
from tests.model import models

IDS = random_tokens(40, vocabulary=320)[None]
RECIPES = {
    "default": Recipe(),
    "ue8m0": Recipe("ue8m0"),
    "blocks": Recipe(block_size="64x64"),
    "experts": Recipe(precision={"experts": "fp8"}),
    "all but": Recipe("ue8m0", precision={"attention": "bf16"}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "plain"
    models.make(folder, initializer_range=0.05)
    return folder


def logits(spec, **options):
    return open_subject(str(spec), Loading(device="cpu", dtype=torch.float32, **options)).logits(IDS)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("runtime", ["blockscale", "transformers"])
def test_a_recipe_gives_the_model_that_quantize_writes(plain, tmp_path, name, runtime):
    recipe = RECIPES[name]
    quantize_checkpoint(plain, tmp_path / "fp8", recipe)
    expected = logits(tmp_path / "fp8", runtime=runtime)
    assert torch.equal(logits(plain, runtime=runtime, recipe=recipe), expected)
    assert not torch.equal(logits(plain, runtime=runtime), expected)


def test_our_runtime_refuses_what_it_cannot_do_as_it_reads(plain, tmp_path):
    for recipe in (Recipe(include=("*.experts.*",)), Recipe(exclude=("*.o_proj",))):
        with pytest.raises(BlockscaleError, match=r"follows no include or exclude as it loads.*--precision"):
            logits(plain, recipe=recipe)
    quantize_checkpoint(plain, tmp_path / "fp8")
    for recipe in (Recipe("ue8m0"), Recipe(block_size="64x64")):
        with pytest.raises(BlockscaleError, match="already quantized, and keeps its blocks and scales"):
            logits(tmp_path / "fp8", recipe=recipe)
    # What is stored in FP8 can be dequantized.
    assert not torch.equal(
        logits(tmp_path / "fp8", recipe=Recipe(precision={"experts": "bf16"})), logits(tmp_path / "fp8")
    )


def test_loading_is_told_as_json_has_it():
    spelled = Loading(dtype=torch.float32, recipe=RECIPES["all but"]).spelled()
    assert spelled["dtype"] == "torch.float32"
    assert spelled["recipe"]["scale_fmt"] == "ue8m0"
    assert spelled["recipe"]["precision"] == ["attention=bf16"]
    assert Loading().spelled()["recipe"] is None
