"""Checkpoints with weights of fewer than 8 bits as models of transformers, and made as they are read."""

import pytest
import torch

from blockscale import huggingface
from blockscale.checkpoint.recipe import Recipe
from blockscale.errors import BlockscaleError
from blockscale.evaluate.compare import score_windows, summarize
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.subjects import open_subject
from blockscale.evaluate.windows import cut
from blockscale.metrics import calc_diff
from tests import data
from tests.evaluate.models import random_tokens
from tests.huggingface import checkpoints
from tests.huggingface.checkpoints import logits, transformers

CASES = [
    ("llama", {"default": "fp8", "dense_mlp": "int4:g32"}, "float32"),
    ("llama", {"default": "int3:g64", "*.o_proj": "bf16"}, "float32"),
    ("qwen3_moe", {"default": "fp8", "experts": "mxfp4"}, "ue8m0"),
    ("deepseek_v3", {"default": "fp8", "experts": "int4:g128:ue8m0"}, "float32"),
    ("deepseek_v3", {"experts": "int4:g64"}, "ue8m0"),
    ("deepseek_v3", {"default": "fp8", "model.layers.2.mlp.experts*": "int4:g64"}, "ue8m0"),
]
ROUNDING = 1e-4  # of logits with a standard deviation of 2


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join([case[0], *case[1].values()]))
def case(request, tmp_path_factory):
    """(source, recipe, quantized checkpoint)."""
    name, precision, scale_fmt = request.param
    folder = tmp_path_factory.mktemp(name)
    source = checkpoints.make(folder / "bf16", name, num_hidden_layers=3)
    recipe = {"layout": "blockscale", "precision": precision, "scale_fmt": scale_fmt}
    return source, recipe, checkpoints.quantize(source, folder / "low", **recipe)


def load(folder, **options):
    config = huggingface.BlockscaleConfig(**options)
    return huggingface.load_model(folder, config, dtype=torch.float32)


def test_it_is_transformers_on_dequantized_weights_and_fake_quantized_activations(case, tmp_path):
    _, _, low = case
    wide = checkpoints.dequantized(low, tmp_path / "wide")
    expected = logits(checkpoints.fake_quantized(wide, low))
    assert calc_diff(expected, logits(wide)) > 1e-4
    torch.testing.assert_close(logits(load(low)), expected, rtol=0, atol=ROUNDING)
    high = logits(load(low, compute="high"))
    torch.testing.assert_close(high, logits(wide), rtol=0, atol=ROUNDING)


def test_auto_model_reads_the_folder_itself(case):
    _, _, low = case
    model = transformers.AutoModelForCausalLM.from_pretrained(low, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load(low)))
    again = type(model.config).from_dict(model.config.to_dict())
    assert again.quantization_config == model.config.quantization_config.to_dict()


def test_quantized_as_it_is_read_to_the_same_bits(case):
    source, recipe, low = case
    fields = {name: value for name, value in recipe.items() if name != "layout"}
    made = load(source, quantize=fields)
    stored = load(low)
    ours, theirs = made.state_dict(), stored.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert huggingface.format_summary(made) == huggingface.format_summary(stored)


def test_the_summary_names_the_formats(case):
    _, recipe, low = case
    summary = huggingface.format_summary(load(low))
    for wanted in recipe["precision"].values():
        assert wanted in {"fp8", "bf16"} or f" in {wanted}" in summary


def test_evaluate_compares_it_with_its_source(case):
    source, _, low = case
    tokens = random_tokens(64, seed=3) % 64
    loading = Loading("transformers", "cpu", torch.float32)
    subjects = (open_subject(str(folder), loading) for folder in (low, source))
    against = summarize(score_windows(*subjects, tokens, cut(tokens, 32, 32))).against
    assert against.kl.value > 1e-4


def test_scales_that_do_not_fit_are_refused(case, tmp_path):
    _, _, low = case
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in low.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    names = [name for name, each in data.read(low).items() if each.dtype == torch.uint8]
    data.rewrite(broken, lambda tensors: tensors.update({f"{names[0]}_scale": torch.ones(3, 5)}))
    with pytest.raises(BlockscaleError, match="scales do not fit"):
        load(broken)


def test_a_recipe_that_names_them_is_a_recipe():
    config = huggingface.BlockscaleConfig(quantize=Recipe(layout="blockscale", precision={"experts": "int4"}))
    assert config.recipe.precision.spelled() == ["experts=int4:g128"]
