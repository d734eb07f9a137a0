"""What headers, config.json and scales give away: inspect names it, and verify fails on its errors."""

import json

import pytest
import torch

from blockscale import (
    Recipe,
    inspect_checkpoint,
    quantize_checkpoint,
    verify_checkpoint,
)
from tests import data

FP8 = torch.float8_e4m3fn
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
Q, K, OUT, UP = (
    f"{ATTENTION}q_proj.weight",
    f"{ATTENTION}k_proj.weight",
    f"{ATTENTION}o_proj.weight",
    f"{MLP}up_proj.weight",
)


def _set_config(folder, **quantization):
    config = data.read_config(folder)
    config["quantization_config"].update(quantization)
    (folder / "config.json").write_text(json.dumps(config))


def _problems(folder, source=None):
    found = verify_checkpoint(folder, source)
    assert found.ok == (not any(problem.severity == "error" for problem in found.problems))
    return [str(problem) for problem in found.problems]


def _inspected(folder):
    return [str(problem) for problem in inspect_checkpoint(folder).problems]


def _wrong_total(folder, total):
    index = json.loads((folder / data.INDEX).read_text())
    index["metadata"]["total_size"] = total
    (folder / data.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("total", [1, "1", 1.5, [1], "x", True])
def test_a_wrong_total_size(tmp_path, total):
    folder = data.write(tmp_path / "source", data.llama(), shards=2)
    right = sum(tensor.nbytes for tensor in data.read(folder).values())
    _wrong_total(folder, total)
    line = f"error: {data.INDEX}: total_size of the index is wrong: expected {right}, got {total}"
    assert _problems(folder) == [line]
    assert _inspected(folder) == [line]


@pytest.mark.parametrize("total", [None, "right"])
def test_a_total_size_that_is_absent_or_a_string_is_no_fault(tmp_path, total):
    folder = data.write(tmp_path / "source", data.llama(), shards=2)
    right = sum(tensor.nbytes for tensor in data.read(folder).values())
    _wrong_total(folder, None if total is None else str(right))
    assert _problems(folder) == []


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.1.mlp.gate.weight", "router"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.2.eh_proj.weight", "mtp_projection"),
    ],
)
def test_what_must_never_be_fp8(tmp_path, name, role):
    model = data.deepseek_v3()
    linear = [other for other in model.tensors if "_proj" in other and "eh_proj" not in other]
    folder = data.write(tmp_path / "fp8", data.in_fp8(model, [*linear, name]))
    line = f"error: {name}: {role} is FP8; engines keep it in high precision"
    assert line in _problems(folder)
    assert line in _inspected(folder)


def test_a_head_in_fp8_is_a_warning(tmp_path):
    model = data.deepseek_v3()
    linear = [name for name in model.tensors if "_proj" in name and "eh_proj" not in name]
    folder = data.write(tmp_path / "fp8", data.in_fp8(model, [*linear, "lm_head.weight"]))
    line = "warning: lm_head.weight: head is FP8; engines keep it in high precision"
    assert line in _problems(folder)
    assert line in _inspected(folder)


def test_partners_of_two_precisions(tmp_path):
    model = data.llama()
    linear = [name for name in model.tensors if "_proj" in name and name != K]
    fp8 = data.in_fp8(model, linear, modules_to_not_convert=["lm_head", K.removesuffix(".weight")])
    folder = data.write(tmp_path / "fp8", fp8)
    line = f"error: {K}: is BF16 but {Q} is FP8; engines fuse the two"
    assert _problems(folder) == [line]
    assert _inspected(folder) == [line]


def test_a_stale_quantization_config(tmp_path):
    model = data.llama()
    stale = data.in_fp8(model).config
    folder = data.write(tmp_path / "bf16", data.Model(model.tensors, stale))
    line = "error: config.json: stale quantization_config: there is no quantized tensor"
    assert _problems(folder) == [line]
    assert _inspected(folder) == [line]


@pytest.mark.parametrize("kept", [OUT, f"{MLP}down_proj.weight"])
def test_a_linear_weight_missing_from_the_skip_list(tmp_path, kept):
    source = data.write(tmp_path / "source", data.llama())
    quantize_checkpoint(source, tmp_path / "fp8", Recipe(exclude=(kept,)))
    (tmp_path / "fp8" / "blockscale.json").unlink()
    assert _problems(tmp_path / "fp8", source) == []
    _set_config(tmp_path / "fp8", modules_to_not_convert=["lm_head"])
    line = f"error: {kept}: is BF16 but not on the skip list: engines will look for its scale"
    assert _problems(tmp_path / "fp8", source) == [line]
    assert _inspected(tmp_path / "fp8") == [line]


def test_a_head_missing_from_the_skip_list_is_a_warning(pair):
    fp8, source = pair
    _set_config(fp8, modules_to_not_convert=[])
    line = (
        "warning: config.json: 1 unquantized modules are not on the skip list, such as lm_head: "
        "engines that go by the list alone will look for their scales"
    )
    assert _problems(fp8, source) == [line]
    assert _inspected(fp8) == [line]
    assert verify_checkpoint(fp8).ok


def test_a_skip_list_entry_that_names_nothing_and_one_that_is_fp8(pair):
    fp8, source = pair
    _set_config(fp8, modules_to_not_convert=["lm_head", "model.layers.7.mlp", Q.removesuffix(".weight")])
    assert _problems(fp8, source) == [
        f"error: {Q}: is FP8 but on the skip list",
        "warning: config.json: skip list entry 'model.layers.7.mlp' names no module",
    ]


def test_a_missing_scale_a_wrong_grid_and_an_orphan(pair):
    fp8, source = pair

    def change(tensors):
        del tensors[f"{Q}_scale_inv"]
        tensors[f"{UP}_scale_inv"] = torch.ones(2, 3)
        tensors[f"{OUT}_scale_inv"] = tensors[f"{OUT}_scale_inv"].double()
        tensors["ghost.weight_scale_inv"] = torch.ones(1, 1)

    data.rewrite(fp8, change)
    expected = {
        f"error: {Q}: FP8 weight without a scale",
        f"error: {UP}_scale_inv: scale grid does not fit the block size: expected [3, 2], got [2, 3]",
        f"error: {OUT}_scale_inv: scale has dtype F64",
        "error: ghost.weight_scale_inv: scale without its weight",
    }
    assert expected <= set(_problems(fp8, source))
    assert expected <= set(_inspected(fp8))


def test_a_wrong_block_size_in_the_config(pair):
    fp8, source = pair
    _set_config(fp8, weight_block_size=[64, 64])
    lines = _problems(fp8, source)
    assert (
        f"error: {Q}_scale_inv: scale grid does not fit the block size: expected [3, 3], got [2, 2]" in lines
    )
    assert all("scale grid does not fit" in line for line in lines)


def test_fp8_without_a_quantization_config(tmp_path):
    model = data.llama()
    source = data.write(tmp_path / "source", model)
    folder = data.write(tmp_path / "fp8", data.in_fp8(model).changed({}, quantization_config=None))
    first = f"error: config.json: 7 FP8 tensors but no quantization_config, such as {MLP}"
    for lines in (_problems(folder), _problems(folder, source), _inspected(folder)):
        (line,) = lines
        assert line.startswith(first)
    assert f"error: {Q}: {Q}: cannot be compared (expected block FP8 in config.json)" in _problems(
        source, folder
    )


def test_a_quantization_that_is_not_block_fp8(tmp_path):
    model = data.llama().changed({}, quantization_config={"quant_method": "gptq"})
    folder = data.write(tmp_path / "gptq", model)
    (line,) = _problems(folder)
    assert line.startswith(
        "error: config.json: config.json quantization_config: quantization method is not block FP8"
    )
    assert _inspected(folder) == [line]


@pytest.mark.parametrize("pattern", ["re:.*lm_head", "re:lm_head$"])
def test_skip_lists_of_compressed_tensors_may_be_patterns(pair, pattern):
    fp8, _ = pair
    _set_config(fp8, modules_to_not_convert=[pattern])
    assert _problems(fp8) == []
    _set_config(fp8, modules_to_not_convert=["re:(", pattern.replace("head", "tail")])
    (line,) = _problems(fp8)
    assert line.startswith(
        "warning: config.json: 1 unquantized modules are not on the skip list, such as lm_head"
    )
