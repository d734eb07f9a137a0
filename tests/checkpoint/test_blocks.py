"""Several block sizes in one checkpoint: asked for or chosen, written, read back, and dequantized."""

import json

import pytest
import torch

from blockscale import (
    BlockscaleError,
    Recipe,
    RunOptions,
    dequantize_checkpoint,
    inspect_checkpoint,
    plan_checkpoint,
    quantize_checkpoint,
    reference,
    verify_checkpoint,
)
from blockscale.checkpoint import convert
from blockscale.checkpoint.recipe import read_recipe
from blockscale.checkpoint.shard import shard_checkpoint
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

FP8 = torch.float8_e4m3fn
LAYER = "model.layers.0."
DOWN, OUT = f"{LAYER}mlp.down_proj.weight", f"{LAYER}self_attn.o_proj.weight"
GATE, UP = f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"
QKV = [f"{LAYER}self_attn.{leaf}_proj.weight" for leaf in "qkv"]
ENTRIES = {
    "default": "fp8",
    "*.self_attn.[qkv]_proj": "fp8:32x32",
    "*.o_proj": "fp8:64x64",
    "*.down_proj": "fp8:1x128",
}
SIZES = {**dict.fromkeys(QKV, (32, 32)), OUT: (64, 64), DOWN: (1, 128), GATE: (128, 128), UP: (128, 128)}


def _recipe(layout="compressed-tensors", **fields):
    return Recipe(layout=layout, precision=ENTRIES, **fields)


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.llama(), shards=2)


def _tree(tensors):
    """Modules as an engine would build them."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not name.endswith(".weight"):
            continue
        *path, leaf = name.removesuffix(".weight").split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        kind = torch.nn.Embedding if leaf == "embed_tokens" else torch.nn.Linear
        parent.add_module(leaf, kind(*tensor.shape[::-1], device="meta"))
    return root


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
def test_there_and_back_with_several_sizes(tmp_path, source, scale_fmt):
    recipe = _recipe(scale_fmt=scale_fmt)
    plan = plan_checkpoint(source, recipe)
    report = quantize_checkpoint(source, tmp_path / "out", recipe)
    assert plan.after == report.output_bytes
    assert report.block_sizes == plan.block_sizes == {"32x32": 3, "128x128": 2, "64x64": 1, "1x128": 1}
    assert report.warnings == (
        "5 weights (3 of 32x32, 1 of 64x64, 1 of 1x128) have other blocks than 128x128, the only ones that "
        "vLLM and SGLang are known to run",
    )
    before, out = data.read(source), data.read(tmp_path / "out")
    assert {name for name, tensor in out.items() if tensor.dtype == FP8} == SIZES.keys()
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    back = data.read(tmp_path / "back")
    for name, size in SIZES.items():
        codes, scale = reference.quantize_weight(before[name], size, scale_fmt)
        assert_bitwise_equal(out[name], codes, name)
        assert_bitwise_equal(out[f"{name}_scale"], scale, name)
        assert_bitwise_equal(back[name], reference.dequantize_weight(codes, scale, size), name)
    for folder, against in (("out", source), ("back", tmp_path / "out")):
        assert verify_checkpoint(tmp_path / folder, against).ok
        assert verify_checkpoint(tmp_path / folder, against).compared == len(before)
    found = inspect_checkpoint(tmp_path / "out")
    assert found.problems == ()
    assert {name: found.quantization.block_size_of(name) for name in SIZES} == SIZES
    assert data.read_config(tmp_path / "back") == data.read_config(source)


def test_the_package_finds_the_same_groups_and_decompresses_to_our_values(tmp_path, source):
    quantize_checkpoint(source, tmp_path / "out", _recipe())
    out = data.read(tmp_path / "out")
    config = QuantizationConfig.model_validate(data.read_config(tmp_path / "out")["quantization_config"])
    assert len(config.config_groups) == 4
    tree = _tree(data.read(source))
    apply_quantization_config(tree, config, show_progress=False)
    schemes = {
        f"{name}.weight": getattr(module, "quantization_scheme", None)
        for name, module in tree.named_modules()
    }
    assert {name for name, scheme in schemes.items() if scheme is not None} == SIZES.keys()
    for name, size in SIZES.items():
        assert schemes[name].weights.block_structure == list(size)
        compressor = BaseCompressor.get_value_from_registry(schemes[name].format)
        state = {"weight": out[name], "weight_scale": out[f"{name}_scale"]}
        values = compressor.decompress(state, schemes[name])["weight"].float()
        expected = reference.dequantize_weight(out[name], out[f"{name}_scale"], size, torch.float32)
        assert_bitwise_equal(values, expected, name)


def _change_config(folder, change):
    config = data.read_config(folder)
    change(config["quantization_config"]["config_groups"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "blockscale.json").unlink()


def _as_others_spell_it(groups):
    for group in groups.values():
        if group["weights"]["block_structure"] == [1, 128]:
            del group["weights"]["block_structure"]
            group["weights"] |= {"strategy": "group", "group_size": 128}
        elif group["weights"]["block_structure"] == [128, 128]:
            group["targets"] = ["Linear"]
        elif group["weights"]["block_structure"] == [32, 32]:
            group["targets"] = ["re:.*self_attn\\.[qkv]_proj"]


def test_groups_by_pattern_and_class_and_rows_as_groups_are_read(tmp_path, source):
    quantize_checkpoint(source, tmp_path / "out", _recipe())
    _change_config(tmp_path / "out", _as_others_spell_it)
    assert verify_checkpoint(tmp_path / "out", source).ok
    assert inspect_checkpoint(tmp_path / "out").problems == ()


def test_a_weight_that_no_group_names(tmp_path, source):
    quantize_checkpoint(source, tmp_path / "out", _recipe())
    _change_config(tmp_path / "out", lambda groups: groups["group_0"].update(targets=["model.other"]))
    line = f"{UP}: FP8 weight of unknown block size (expected a config group that names it)"
    assert data.told(dequantize_checkpoint, tmp_path / "out", tmp_path / "back") == line
    assert not verify_checkpoint(tmp_path / "out", source).ok
    assert any(line in problem.message for problem in inspect_checkpoint(tmp_path / "out").problems)


def test_fused_weights_of_two_sizes_are_told(tmp_path, source):
    quantize_checkpoint(source, tmp_path / "out", _recipe())

    def swap(groups):
        for group in groups.values():
            group["targets"] = [
                {GATE: DOWN, DOWN: GATE}.get(f"{t}.weight", f"{t}.weight")[:-7] for t in group["targets"]
            ]

    _change_config(tmp_path / "out", swap)
    told = [str(problem) for problem in inspect_checkpoint(tmp_path / "out").problems]
    assert any(line.endswith("engines fuse the two") and "blocks of" in line for line in told)


def test_fused_weights_get_the_finest_size_of_them(tmp_path, source):
    precision = {"default": "fp8", "*.q_proj": "fp8:64x64", "*.k_proj": "fp8:32x32"}
    report = quantize_checkpoint(
        source, tmp_path / "out", Recipe(layout="compressed-tensors", precision=precision)
    )
    scales = data.read(tmp_path / "out")
    assert scales[f"{QKV[0]}_scale"].shape == (6, 6)
    assert scales[f"{QKV[2]}_scale"].shape == (2, 6)
    assert f"{QKV[1]} has blocks of 32x32, so {QKV[0]} and 1 more must too" in report.warnings


def test_the_deepseek_layout_has_one_size_and_which_is_free(tmp_path, source):
    for recipe in (_recipe("deepseek"), Recipe(precision={"attention": "fp8:64x64", "dense_mlp": "fp8"})):
        line = data.refusal(
            lambda recipe=recipe: quantize_checkpoint(source, tmp_path / "out", recipe), source
        )
        assert line.startswith(
            "the deepseek layout has one block size for the whole checkpoint (got 128x128, "
        )
        assert line.endswith("); use --layout compressed-tensors, or one size")
        assert data.told(plan_checkpoint, source, recipe) == line
    quantize_checkpoint(source, tmp_path / "out", Recipe(precision={"default": "fp8:64x64"}))
    assert data.read_config(tmp_path / "out")["quantization_config"]["weight_block_size"] == [64, 64]
    assert verify_checkpoint(tmp_path / "out", source).ok


def test_what_has_one_size_refuses_several(tmp_path, source):
    for recipe in (_recipe(), Recipe(block_size="auto")):
        with pytest.raises(BlockscaleError, match="one block size is needed here"):
            _ = recipe.fmt
    assert Recipe(block_size="64x64", precision={"default": "fp8:64x64"}).fmt.block_size == (64, 64)
    model = data.write(tmp_path / "v3", data.deepseek_v3())
    precision = {"default": "fp8", "*.o_proj": "fp8:64x64"}
    quantize_checkpoint(model, tmp_path / "fp8", Recipe(layout="compressed-tensors", precision=precision))
    line = data.told(shard_checkpoint, tmp_path / "fp8", tmp_path / "ranks", 1)
    assert line is not None
    assert "cannot be divided: DeepSeek's inference code has one block size (got 128x128, 64x64)" in line


# The block size "auto".


def _planted(model=None):
    """A column of one weight a thousand times the rest: only blocks of one row keep the rest."""
    model = model or data.llama(hidden=256, intermediate=384)
    weight = model.tensors[DOWN].clone()
    weight[:, 7] *= 1000
    return model.changed({DOWN: weight})


AUTO = Recipe(layout="compressed-tensors", block_size="auto")


def test_auto_chooses_by_tensor_and_says_why(tmp_path):
    source = data.write(tmp_path / "source", _planted(), shards=2)
    plan = plan_checkpoint(source, AUTO)
    report = quantize_checkpoint(source, tmp_path / "out", AUTO)
    assert plan.block_choice == report.block_choice
    assert plan.block_sizes == report.block_sizes == {"128x128": 6, "1x128": 1}
    assert plan.after == report.output_bytes
    assert report.block_choice[DOWN].block_size == (1, 128)
    assert report.block_choice[DOWN].reason.startswith("1x128 ")
    assert report.block_choice[GATE].reason.startswith("no finer blocks are worth their scales: 64x64 ")
    assert report.block_choice[GATE].reason.endswith(" dB over 128x128, taken together with 1 more")
    manifest = json.loads((tmp_path / "out" / "blockscale.json").read_text())
    assert manifest["block_choice"]["tensors"][DOWN]["block_size"] == [1, 128]
    result = verify_checkpoint(tmp_path / "out", source)
    assert result.ok
    assert inspect_checkpoint(tmp_path / "out").problems == ()
    quantize_checkpoint(source, tmp_path / "usual", Recipe(layout="compressed-tensors"))
    usual = {error.name: error.relative for error in verify_checkpoint(tmp_path / "usual", source).errors}
    assert {error.name: error.relative for error in result.errors}[DOWN] < usual[DOWN] / 2


def test_auto_depends_on_neither_threads_nor_shards(tmp_path):
    one = data.write(tmp_path / "one", _planted())
    quantize_checkpoint(one, tmp_path / "a", AUTO, run=RunOptions(workers=1))
    quantize_checkpoint(one, tmp_path / "b", AUTO, run=RunOptions(workers=5))
    assert data.contents(tmp_path / "a") == data.contents(tmp_path / "b")
    many = data.write(tmp_path / "many", _planted(), shards=5)
    choices = [plan_checkpoint(folder, AUTO).block_choice for folder in (one, many)]
    assert choices[0] == choices[1]


def test_auto_leaves_what_is_asked_for(tmp_path):
    source = data.write(tmp_path / "source", _planted())
    recipe = Recipe(
        layout="compressed-tensors",
        block_size="auto",
        precision={"default": "fp8", "*.down_proj": "fp8:64x64"},
    )
    report = quantize_checkpoint(source, tmp_path / "out", recipe)
    assert report.block_sizes == {"128x128": 6, "64x64": 1}
    assert DOWN not in report.block_choice


@pytest.mark.parametrize(("planted", "size"), [(False, [128, 128]), (True, [1, 128])])
def test_auto_in_the_deepseek_layout_is_one_size(tmp_path, planted, size):
    model = data.llama(hidden=256, intermediate=384)
    if planted:
        outlier = {
            name: t * (1 + 1e4 * (torch.arange(t.shape[1]) == 3)).bfloat16()
            for name, t in model.tensors.items()
            if "_proj" in name
        }
        model = model.changed(outlier)
    source = data.write(tmp_path / "source", model)
    report = quantize_checkpoint(source, tmp_path / "out", Recipe(block_size="auto"))
    assert len(report.block_sizes) == 1
    assert data.read_config(tmp_path / "out")["quantization_config"]["weight_block_size"] == size
    assert report.block_choice[DOWN].reason.endswith("taken together with 6 more")
    assert verify_checkpoint(tmp_path / "out", source).ok


def test_a_run_that_is_resumed_keeps_the_choice_and_does_not_measure_again(tmp_path, monkeypatch):
    source = data.write(tmp_path / "source", _planted(), shards=4)
    quantize_checkpoint(source, tmp_path / "whole", AUTO)
    target = tmp_path / "out"
    finished = convert.finish_shard

    def finish_one_and_stop(workspace, file, record):
        finished(workspace, file, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "finish_shard", finish_one_and_stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, target, AUTO, run=RunOptions(workers=1))
    monkeypatch.setattr(convert, "finish_shard", finished)
    monkeypatch.setattr(convert, "choose_blocks", None)  # would be called to measure
    report = quantize_checkpoint(source, target, AUTO)
    assert report.resumed_shards >= 1
    assert report.block_choice[DOWN].block_size == (1, 128)
    assert data.contents(target) == data.contents(tmp_path / "whole")
    again = quantize_checkpoint(source, target, AUTO)
    assert again.already_complete
    assert again.block_choice == report.block_choice


def test_a_choice_of_another_plan_is_none(tmp_path):
    source = data.write(tmp_path / "source", _planted())
    quantize_checkpoint(source, tmp_path / "out", AUTO)
    recipe = Recipe("ue8m0", "auto", "compressed-tensors")
    report = quantize_checkpoint(source, tmp_path / "out", recipe, run=RunOptions(overwrite=True))
    fresh = quantize_checkpoint(source, tmp_path / "fresh", recipe)
    assert report.block_choice == fresh.block_choice
    assert data.contents(tmp_path / "out") == data.contents(tmp_path / "fresh")


def test_auto_with_nan_in_a_weight(tmp_path):
    model = _planted()
    weight = model.tensors[OUT].clone()
    weight[3, 5] = float("nan")
    source = data.write(tmp_path / "source", model.changed({OUT: weight}))
    line = data.refusal(lambda: quantize_checkpoint(source, tmp_path / "out", AUTO), source, tmp_path / "out")
    assert line.startswith(f"{OUT} in model.safetensors: 1 NaN or Inf value, the first at [3, 5]")
    report = quantize_checkpoint(source, tmp_path / "out", AUTO, on_nonfinite="keep")
    assert OUT not in report.block_choice
    assert report.block_sizes == {"128x128": 5, "1x128": 1}


def test_auto_needs_weights(tmp_path, source):
    line = data.told(plan_checkpoint, data.llama().config, AUTO)
    assert line == (
        "block size auto: block sizes are chosen by the values of the weights "
        "(expected a checkpoint, got config.json alone)"
    )


def test_a_recipe_file_may_say_auto(tmp_path):
    (tmp_path / "recipe.json").write_text('{"block_size": "auto", "precision": {"experts": "fp8:32x32"}}')
    recipe = read_recipe(tmp_path / "recipe.json")
    assert recipe == Recipe(block_size="auto", precision={"experts": "fp8:32x32"})
