"""What we write for an engine is clean to it, and what it does not read is told, layout by layout."""

import pytest
import torch

from blockscale import Recipe, quantize_checkpoint
from blockscale.checkpoint.lint.run import lint_checkpoint
from tests import data
from tests.checkpoint.lint.checkpoints import ATTENTION, ENGINES, OUT, W, aligned, findings, write


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", [data.llama, data.deepseek_v3])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe("ue8m0")])
def test_what_we_write_by_default_is_clean(tmp_path, engine, model, recipe):
    quantize_checkpoint(data.write(tmp_path / "source", aligned(model())), tmp_path / "out", recipe)
    found = lint_checkpoint(tmp_path / "out", engine)
    assert found.findings == ()
    assert found.ok


@pytest.mark.parametrize(
    ("layout", "engine", "expected"),
    [
        ("w4afp8", "sglang", set()),
        ("w4afp8", "vllm", {("error", "method", "config.json")}),
        ("w4afp8", "transformers", {("error", "method", "config.json")}),
        ("compressed-tensors", "vllm", {("warning", "w4a8", "config.json")}),  # Hopper GPUs alone
        ("compressed-tensors", "transformers", set()),
        ("compressed-tensors", "sglang", {("error", "mixed-precision", "config.json format")}),
        ("blockscale", "vllm", {("error", "method", "config.json")}),
        ("blockscale", "sglang", {("error", "method", "config.json")}),
        ("blockscale", "transformers", {("error", "method", "config.json")}),
    ],
)
def test_layouts_with_int4_experts(tmp_path, layout, engine, expected):
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    recipe = Recipe(layout=layout, precision={"default": "fp8", "experts": "int4:g128"})
    source = data.write(tmp_path / "source", aligned(data.deepseek_v3()))
    quantize_checkpoint(source, tmp_path / "out", recipe)
    assert findings(tmp_path / "out", engine) == expected


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_fp8_in_compressed_tensors_is_clean(tmp_path, engine):
    pytest.importorskip("compressed_tensors")
    source = data.write(tmp_path / "source", aligned(data.llama()))
    quantize_checkpoint(source, tmp_path / "out", Recipe(layout="compressed-tensors"))
    assert findings(tmp_path / "out", engine) == set()


def test_what_no_config_group_names_is_left_alone(tmp_path):
    pytest.importorskip("compressed_tensors")
    source = data.write(tmp_path / "source", aligned(data.llama()))
    quantize_checkpoint(source, tmp_path / "out", Recipe(layout="compressed-tensors", exclude=("*.o_proj",)))
    tensors, config = data.read(tmp_path / "out"), data.read_config(tmp_path / "out")
    entry = config["quantization_config"]
    entry["ignore"] = ["lm_head"]
    assert findings(write(tmp_path / "all", tensors, config), "vllm") == {("silent", "unlisted", OUT + W)}
    entry["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*", "re:.*[qkv]_proj$"]
    assert findings(write(tmp_path / "named", tensors, config), "vllm") == set()
    entry["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    found = {where for _, rule, where in findings(write(tmp_path / "fewer", tensors, config), "vllm")}
    assert found == {f"{ATTENTION}{leaf}_proj.weight" for leaf in "qkv"}


W4AFP8 = {
    "no input scale": (
        lambda tensors, name: tensors.pop(f"{name}.input_scale"),
        {("warning", "w4afp8", "{}.weight")},
    ),
    "an input scale in F32": (
        lambda tensors, name: tensors.update({f"{name}.input_scale": torch.ones(1)}),
        {("warning", "w4afp8", "{}.input_scale")},
    ),
    "unpacked": (
        lambda tensors, name: tensors.update({f"{name}.weight": torch.zeros(256, 256, dtype=torch.int8)}),
        {("error", "scale-shape", "{}.weight_scale_inv")},
    ),
    "another expert in FP8": (
        lambda tensors, name: tensors.update(
            {
                f"{name}.weight": torch.zeros(256, 256).to(torch.float8_e4m3fn),
                f"{name}.weight_scale_inv": torch.ones(2, 2),
            }
        ),
        {("error", "w4afp8", "{}.weight"), ("error", "merged-precision", "{}.weight")},
    ),
    "no scales": (
        lambda tensors, name: tensors.pop(f"{name}.weight_scale_inv"),
        {("silent", "missing-scale", "{}.weight")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", W4AFP8)
def test_defects_of_w4afp8(tmp_path, defect):
    source = data.write(tmp_path / "source", aligned(data.deepseek_v3()))
    recipe = Recipe(layout="w4afp8", precision={"default": "fp8", "experts": "int4:g128"})
    quantize_checkpoint(source, tmp_path / "out", recipe)
    tensors, name = data.read(tmp_path / "out"), "model.layers.1.mlp.experts.2.up_proj"
    change, expected = W4AFP8[defect]
    change(tensors, name)
    folder = write(tmp_path / "bad", tensors, data.read_config(tmp_path / "out"))
    found = findings(folder, "sglang")
    assert found == {(severity, rule, where.format(name)) for severity, rule, where in expected}


def test_sglang_reads_no_skip_list_of_w4afp8(tmp_path):
    source = data.write(tmp_path / "source", aligned(data.deepseek_v3()))
    precision = {"default": "fp8", "experts": "int4:g128", "shared_experts": "bf16"}
    quantize_checkpoint(source, tmp_path / "out", Recipe(layout="w4afp8", precision=precision))
    found = findings(tmp_path / "out", "sglang")
    assert {(severity, rule) for severity, rule, _ in found} == {("silent", "unlisted")}
    assert len(found) == 6  # three shared projections of two layers
