"""The size plan promises exactly the bytes that quantizing writes, from headers or from config.json alone."""

import json
import math

import pytest

from blockscale import (
    BlockscaleError,
    Parallelism,
    Recipe,
    dequantize_checkpoint,
    inspect_checkpoint,
    plan_checkpoint,
    quantize_checkpoint,
)
from tests import data

MAKERS = {
    "llama": data.llama,
    "tied llama": lambda: data.llama(tied=True),
    "deep llama": lambda: data.llama(layers=3),
    "float32": lambda: data.llama(dtype=data.torch.float32),
    "deepseek": data.deepseek_v3,
    "qwen3_moe fused": lambda: data.fused_experts("qwen3_moe", "nk"),
    "gpt_oss": lambda: data.fused_experts("gpt_oss", "kn"),
    "unknown": lambda: data.llama(model_type="brand_new"),
}


def _nbytes(folder):
    return sum(tensor.nbytes for tensor in data.read(folder).values())


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("ue8m0", (64, 32)), Recipe(exclude=("*.o_proj",))])
@pytest.mark.parametrize("make", MAKERS)
def test_the_plan_equals_the_bytes_that_are_written(tmp_path, make, recipe):
    source = data.write(tmp_path / "source", MAKERS[make](), shards=2)
    before = data.snapshot(source)
    plan = plan_checkpoint(source, recipe)
    assert data.snapshot(source) == before
    report = quantize_checkpoint(source, tmp_path / "out", recipe)
    assert plan.after == report.output_bytes == _nbytes(tmp_path / "out")
    assert plan.before == report.input_bytes == _nbytes(source)
    assert sum(role.tensors for role in plan.roles) == len(data.read(source))
    assert sum(role.quantized for role in plan.roles) == report.tensors["quantize"]
    assert sum(plan.kept.values()) == report.tensors["copy"]
    assert (sum(role.before for role in plan.roles), sum(role.after for role in plan.roles)) == (
        plan.before,
        plan.after,
    )
    assert plan.parameters == sum(tensor.numel() for tensor in data.read(source).values())
    assert plan.warnings == report.warnings


@pytest.mark.parametrize("make", ["llama", "tied llama", "deep llama", "deepseek"])
def test_the_config_alone_gives_the_same_plan(tmp_path, make):
    source = data.write(tmp_path / "source", MAKERS[make](), shards=2)
    for recipe in (Recipe(), Recipe(block_size=(32, 64), exclude=("*.down_proj",))):
        whole = plan_checkpoint(source, recipe, parallelism=Parallelism(2, 4), rate=1e9)
        for config in (source / "config.json", data.read_config(source)):
            alone = plan_checkpoint(config, recipe, parallelism=Parallelism(2, 4), rate=1e9)
            for key, value in vars(whole).items():
                if key not in ("source", "roles", "kept", "warnings"):
                    assert getattr(alone, key) == value, key
            assert len(alone.warnings) == len(whole.warnings)
            assert sorted(map(str, alone.roles)) == sorted(map(str, whole.roles))
            assert sorted(alone.kept.values()) == sorted(whole.kept.values())


def test_the_config_of_a_quantized_model_plans_the_unquantized_one(tmp_path):
    source = data.write(tmp_path / "source", data.deepseek_v3())
    for layout in ("deepseek", "compressed-tensors"):
        if layout == "compressed-tensors":
            pytest.importorskip("compressed_tensors")
        quantize_checkpoint(source, tmp_path / layout, Recipe(layout=layout))
        assert plan_checkpoint(tmp_path / layout / "config.json").after == plan_checkpoint(source).after
        with pytest.raises(BlockscaleError, match="source is already quantized"):
            plan_checkpoint(tmp_path / layout)


def test_the_part_of_the_mtp_module_and_the_share_of_a_gpu(tmp_path):
    source = data.write(tmp_path / "source", data.deepseek_v3())
    quantize_checkpoint(source, tmp_path / "out")
    tensors = data.read(tmp_path / "out")
    plan = plan_checkpoint(source, parallelism=Parallelism(1))
    assert plan.mtp_after == sum(
        t.nbytes for name, t in tensors.items() if name.startswith("model.layers.2.")
    )
    assert plan.per_gpu == plan.after
    for gpus in (2, 4):
        share = plan_checkpoint(source, parallelism=Parallelism(gpus)).per_gpu
        assert plan.after / gpus < share < plan.after
    spread = plan_checkpoint(source, parallelism=Parallelism(1, 4))
    experts = next(role.after for role in plan.roles if role.role == "experts")
    assert spread.per_gpu == pytest.approx(plan.after - experts * 3 / 4, abs=200)


def test_the_time_is_the_input_over_the_rate(tmp_path):
    source = data.write(tmp_path / "source", data.llama())
    assert plan_checkpoint(source).seconds is None
    plan = plan_checkpoint(source, rate=1e6)
    assert math.isclose(plan.seconds, plan.before / 1e6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON (got "),
        (b"\xff", "is not JSON (got "),
        (b"[]", "is not a JSON object (got list)"),
        (b'{"quantization_config": 1}', "quantization_config is not a JSON object (got 1)"),
    ],
)
def test_a_broken_config(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert data.refusal(lambda: plan_checkpoint(path), tmp_path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"hidden_size": None}, "config.json: key hidden_size is missing; model_type deepseek_v3 needs it"),
        ({"hidden_size": "160"}, "config.json: bad hidden_size (expected an integer >= 1, got '160')"),
        ({"num_hidden_layers": -1}, "config.json: bad num_hidden_layers (expected an integer >= 1, got -1)"),
        ({"model_type": "brand_new"}, "config.json: tensor shapes cannot be computed from config.json"),
    ],
)
def test_a_config_that_says_too_little(tmp_path, change, line):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data.deepseek_v3().changed({}, **change).config | _nulls(change)))
    assert data.refusal(lambda: plan_checkpoint(path), tmp_path).startswith(line)


def _nulls(change):
    return {key: value for key, value in change.items() if value is not None}


def test_inspect_counts_every_tensor_once(tmp_path):
    source = data.write(tmp_path / "source", data.deepseek_v3(), shards=3)
    quantize_checkpoint(source, tmp_path / "fp8", Recipe("ue8m0"))
    found, tensors = inspect_checkpoint(tmp_path / "fp8"), data.read(tmp_path / "fp8")
    assert sum(count.tensors for count in found.counts) == len(tensors)
    assert sum(count.nbytes for count in found.counts) == found.nbytes == _nbytes(tmp_path / "fp8")
    assert found.parameters == sum(tensor.numel() for tensor in data.read(source).values())
    assert (found.files, found.model_type, found.known_model_type) == (3, "deepseek_v3", True)
    assert found.scales == found.power_of_two_scales == 48
    assert found.quantization.fmt.scale_fmt == "ue8m0"
    roles = {(count.role, count.dtype) for count in found.counts}
    assert {("experts", "F8_E4M3"), ("experts", "scale"), ("router", "BF16"), ("router", "F32")} <= roles
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back")
    assert inspect_checkpoint(tmp_path / "back").quantization is None
