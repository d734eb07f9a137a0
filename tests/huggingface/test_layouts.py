"""One recipe in every layout: transformers runs the same model on our layers from each."""

import logging

import pytest
import torch

from blockscale import huggingface
from blockscale.errors import BlockscaleError, MissingScaleError
from tests import data
from tests.huggingface import checkpoints
from tests.huggingface.checkpoints import logits, transformers
from tests.model.test_layouts import only_weights

pytest.importorskip("compressed_tensors")

LLAMA = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
DEEPSEEK = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "v_head_dim": 32}
CASES = {
    "llama-int4": ("llama", "compressed-tensors", {"default": "int4:g128"}),
    "llama-int4-narrow": ("llama", "compressed-tensors", {"default": "fp8", "dense_mlp": "int4:g32"}),
    "llama-mxfp4": ("llama", "compressed-tensors", {"default": "fp8", "dense_mlp": "mxfp4"}),
    "deepseek-w4afp8": ("deepseek_v3", "w4afp8", {"default": "fp8", "experts": "int4:g128"}),
    "deepseek-int4": ("deepseek_v3", "compressed-tensors", {"default": "fp8", "experts": "int4:g128"}),
    "deepseek-int3": ("deepseek_v3", "compressed-tensors", {"experts": "int3:g32"}),
    "deepseek-mxfp4": ("deepseek_v3", "compressed-tensors", {"default": "fp8", "experts": "mxfp4"}),
    "deepseek-several": (
        "deepseek_v3",
        "compressed-tensors",
        {"default": "fp8", "experts": "int4:g32", "dense_mlp": "mxfp4"},
    ),
    "deepseek-fp8": ("deepseek_v3", "compressed-tensors", {"default": "fp8"}),
}


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """(layout, checkpoint in it, the same in our own, or for FP8 alone in DeepSeek's)."""
    name, layout, precision = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    shape = LLAMA if name == "llama" else DEEPSEEK
    source = checkpoints.make(folder / "bf16", name, **shape)
    ours = "deepseek" if precision == {"default": "fp8"} else "blockscale"
    made = (
        checkpoints.quantize(source, folder / each, layout=each, precision=precision)
        for each in (layout, ours)
    )
    return (layout, *made)


def load(folder, **options):
    config = huggingface.BlockscaleConfig(**options)
    return huggingface.load_model(folder, config, dtype=torch.float32)


@pytest.mark.parametrize("compute", ["auto", "high"])
def test_logits_are_those_of_our_own_layout(both, compute):
    _, theirs, ours = both
    expected = logits(load(ours, compute=compute))
    assert torch.equal(logits(load(theirs, compute=compute)), expected)
    assert not torch.equal(expected, logits(load(ours, compute="high" if compute == "auto" else "auto")))


def test_codes_and_scales_are_those_of_our_own_layout(both):
    _, theirs, ours = both
    one, other = load(theirs), load(ours)
    assert huggingface.quantized_layers(one) == huggingface.quantized_layers(other)
    for name in huggingface.quantized_layers(one):
        path, _, leaf = name.rpartition(".")
        layers = [model.get_submodule(path) for model in (one, other)]
        for pair in ([leaf, leaf], [layer.scale_name(leaf) for layer in layers]):
            mine, expected = (getattr(layer, each) for layer, each in zip(layers, pair, strict=True))
            assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape)
            assert torch.equal(mine.view(torch.uint8), expected.view(torch.uint8))
    assert huggingface.format_summary(one) == huggingface.format_summary(other)


def test_nothing_is_missing_or_left_over(both, caplog):
    layout, theirs, _ = both
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO):
            load(theirs)
    finally:
        transformers.utils.logging.disable_propagation()
    assert "UNEXPECTED" not in caplog.text
    assert "MISSING" not in caplog.text
    line = next(each.message for each in caplog.records if "linear layers" in each.message)
    low = "int" in line or "mxfp4" in line
    assert (f"not as engines do by the {layout} layout" in line) == low


def test_auto_model_reads_w4afp8_itself(tmp_path):
    source = checkpoints.make(tmp_path / "bf16", "deepseek_v3", **DEEPSEEK)
    precision = {"default": "fp8", "experts": "int4:g128"}
    folder = checkpoints.quantize(source, tmp_path / "w4afp8", layout="w4afp8", precision=precision)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load(folder)))
    again = type(model.config).from_dict(model.config.to_dict())
    assert again.quantization_config == model.config.quantization_config.to_dict()
    assert again.quantization_config["layout"] == "w4afp8"


def test_weights_alone_are_quantized_where_config_says_so(tmp_path, caplog):
    source = checkpoints.make(tmp_path / "bf16", "llama", **LLAMA)
    precision = {"default": "int4:g128"}
    packed, own = (
        checkpoints.quantize(source, tmp_path / layout, layout=layout, precision=precision)
        for layout in ("compressed-tensors", "blockscale")
    )
    only_weights(packed)
    with caplog.at_level(logging.INFO):
        model = load(packed, compute="fp8")
    assert "; weights alone are quantized, activations stay as they are" in caplog.text
    assert torch.equal(logits(model), logits(load(own, compute="high")))
    assert "compute high" in huggingface.format_summary(model)
    # The package of that name computes the same: weights dequantized to the dtype of activations.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused(both, tmp_path):
    _, theirs, _ = both
    for file in theirs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = next(name for name in data.read(theirs) if "down_proj.weight_scale" in name)
    data.rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(3, 5)}))
    with pytest.raises(BlockscaleError, match=r"scales? (grid )?do(es)? not fit"):
        load(tmp_path)
    data.rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(MissingScaleError):
        load(tmp_path)


def test_several_block_sizes_are_refused(tmp_path):
    source = checkpoints.make(tmp_path / "bf16", "llama", **LLAMA)
    precision = {"default": "fp8", "*.o_proj": "fp8:64x64"}
    folder = checkpoints.quantize(
        source, tmp_path / "several", layout="compressed-tensors", precision=precision
    )
    with pytest.raises(BlockscaleError, match=r"several block sizes cannot be run.*128x128, 64x64"):
        load(folder)
