"""What is refused: a checkpoint, a config or an environment that does not fit, each in one line."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from blockscale import huggingface
from blockscale.errors import BlockscaleError, MissingScaleError, NonFiniteError
from tests import data
from tests.huggingface import checkpoints
from tests.huggingface.checkpoints import transformers

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoints.make(tmp_path_factory.mktemp("source") / "bf16", "qwen3_moe")


@pytest.fixture
def fp8(source, tmp_path):
    return checkpoints.quantize(source, tmp_path / "fp8")


def refusal(path, *, kind=BlockscaleError, **config):
    """The line that loading is refused with."""
    with pytest.raises(kind) as caught:
        huggingface.load_model(path, huggingface.BlockscaleConfig(**config))
    line = str(caught.value)
    assert "\n" not in line
    return line


def edit_config(folder, **changes):
    config = data.read_config(folder)
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", [Q_PROJ, EXPERT])
def test_a_missing_scale(fp8, name):
    data.rewrite(fp8, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    line = refusal(fp8, kind=MissingScaleError)
    assert line.startswith("1 of 29 FP8 weights have no scale")
    assert f"{name}_scale_inv" in line


@pytest.mark.parametrize("name", [Q_PROJ, EXPERT])
def test_a_scale_that_does_not_fit_its_weight(fp8, name):
    data.rewrite(fp8, lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(3, 2)}))
    line = refusal(fp8)
    assert line.startswith(f"{name}_scale_inv: scale grid does not fit the 128x128 blocks of config.json")
    assert "got [3, 2]" in line


def test_a_block_size_that_contradicts_the_tensors(fp8):
    edit_config(fp8, weight_block_size=[64, 64])
    assert "scale grid does not fit the 64x64 blocks of config.json" in refusal(fp8)


def test_scales_that_are_no_powers_of_two_as_the_config_says(fp8):
    edit_config(fp8, scale_fmt="ue8m0")
    line = refusal(fp8)
    assert "weight_scale_inv: scale is no power of two (expected powers of two, as scale_fmt ue8m0" in line


def test_an_unknown_scale_format(fp8):
    edit_config(fp8, scale_fmt="bf16")
    assert "unknown scale_fmt" in refusal(fp8)


@pytest.mark.parametrize("entry", [{"activation_scheme": "static"}, {"quant_method": "awq"}])
def test_a_method_that_is_another(fp8, entry):
    edit_config(fp8, **entry)
    assert next(iter(entry.values())) in refusal(fp8)


def test_experts_of_one_layer_in_two_precisions(fp8, source):
    def widen(tensors):
        tensors[EXPERT] = data.read(source)[EXPERT]
        del tensors[f"{EXPERT}_scale_inv"]

    data.rewrite(fp8, widen)
    line = refusal(fp8)
    assert line.startswith(
        f"{EXPERT}: has another precision than model.layers.1.mlp.experts.0.gate_proj.weight"
    )
    assert "got BF16" in line


def test_nothing_to_quantize(source):
    assert "checkpoint is not quantized" in refusal(source)
    with pytest.raises(BlockscaleError, match="checkpoint is not quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(
            source, quantization_config=huggingface.BlockscaleConfig()
        )


def test_what_is_quantized_already(fp8):
    assert "source is already quantized" in refusal(fp8, quantize=True)


def test_a_pattern_that_matches_nothing(source):
    assert "pattern matches no tensor" in refusal(source, quantize={"exclude": ["*q_porj*"]})


def test_weights_that_no_scale_can_represent(source, tmp_path):
    tensors = data.read(source)
    tensors[EXPERT][5, 7] = torch.nan
    damaged = data.write(tmp_path / "damaged", data.Model(tensors, data.read_config(source)))
    with pytest.raises(NonFiniteError) as caught:
        huggingface.load_model(damaged, huggingface.BlockscaleConfig(quantize=True))
    assert str(caught.value).startswith("model.layers.1.mlp.experts.gate_up_proj: 1 NaN or Inf value")
    assert caught.value.position == (3, 5, 7)


def test_fp8_weights_of_another_model(fp8):
    tensors = {name: each for name, each in data.read(fp8).items() if each.element_size() > 1}
    tensors["other.weight"] = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    save_file(tensors, fp8 / "model.safetensors", {"format": "pt"})
    line = refusal(fp8)
    assert line.startswith("no linear layer of Qwen3MoeForCausalLM would be FP8")
    assert "1 of" in line


def test_experts_that_are_computed_in_another_way(tmp_path):
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    line = refusal(tmp_path / "source", quantize=True)
    assert line.startswith(
        "model.layers.0.mlp.experts.down_proj: GptOssExperts cannot run on quantized weights"
    )
    model = huggingface.load_model(
        tmp_path / "source", huggingface.BlockscaleConfig(quantize={"exclude": ["*.experts.*"]})
    )
    assert len(huggingface.quantized_layers(model)) == 4


def test_saving_is_for_another_command(fp8, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        huggingface.load_model(fp8).save_pretrained(tmp_path / "saved")


def test_a_model_that_was_cast_is_not_run_silently(fp8):
    model = huggingface.load_model(fp8)
    torch.nn.Module.to(model, torch.float32)
    with pytest.raises(BlockscaleError, match="float8_e4m3fn"):
        checkpoints.logits(model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"computes": "fp8"}, "unknown option computes (expected compute | quantize)"),
        ({"scale_fmt": "ue8m0"}, "unknown option scale_fmt"),
        (
            {"compute": "int8"},
            "BlockscaleConfig compute: unknown value (expected auto | fp8 | high, got 'int8')",
        ),
        ({"quantize": "all"}, "BlockscaleConfig quantize: unknown value"),
        ({"quantize": {"scale": "ue8m0"}}, "bad recipe: scale"),
        ({"quantize": {"scale_fmt": "ue9"}}, "bad recipe: scale_fmt"),
    ],
)
def test_bad_options(options, expected):
    with pytest.raises(BlockscaleError) as caught:
        huggingface.BlockscaleConfig(**options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import blockscale.huggingface as huggingface\n"
        "from blockscale.errors import BlockscaleError\n"
        "try: huggingface.load_model\n"
        "except BlockscaleError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("blockscale.huggingface: cannot run models by transformers")
    assert "pip install 'blockscale[eval]'" in result.stdout


def test_the_package_is_imported_without_transformers():
    code = "import sys, blockscale.huggingface; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("recipe", [{"block_size": "auto"}, {"precision": {"*.q_proj": "fp8:64x64"}}])
def test_several_block_sizes_and_a_choice_among_them(recipe):
    with pytest.raises(BlockscaleError, match="one block size is needed here"):
        huggingface.BlockscaleConfig(quantize=recipe)
