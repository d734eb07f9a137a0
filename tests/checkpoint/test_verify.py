"""Verify passes good results and names every planted fault."""

import json
import math

import pytest
import torch

from blockscale import (
    BlockscaleError,
    Recipe,
    dequantize_checkpoint,
    inspect_checkpoint,
    quantize_checkpoint,
    reference,
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


@pytest.fixture(params=[data.llama, data.deepseek_v3])
def model(request):
    return request.param()


@pytest.mark.parametrize("shards", [None, 3])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe("ue8m0", (32, 48)), Recipe("float32", (1, 128))])
def test_good_results_pass_in_both_directions(tmp_path, model, recipe, shards):
    source = data.write(tmp_path / "source", model, shards)
    report = quantize_checkpoint(source, tmp_path / "fp8", recipe)
    found = verify_checkpoint(tmp_path / "fp8", source)
    assert (found.ok, found.problems) == (True, ())
    tensors = data.read(tmp_path / "fp8")
    assert (found.tensors, found.nbytes) == (len(tensors), sum(tensor.nbytes for tensor in tensors.values()))
    assert found.checksums == len(tensors)
    assert found.compared == len(model.tensors)
    assert len(found.errors) == report.tensors["quantize"]
    assert inspect_checkpoint(tmp_path / "fp8").problems == ()
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back")
    found = verify_checkpoint(tmp_path / "back", tmp_path / "fp8")
    assert (found.ok, found.problems, found.errors) == (True, (), ())
    assert found.compared == len(model.tensors)
    assert inspect_checkpoint(tmp_path / "back").problems == ()


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_good_results_of_other_dtypes_pass(tmp_path, dtype):
    source = data.write(
        tmp_path / "source", data.llama(dtype={"F16": torch.float16, "F32": torch.float32}[dtype])
    )
    quantize_checkpoint(source, tmp_path / "fp8")
    assert verify_checkpoint(tmp_path / "fp8", source).ok
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back", dtype=dtype)
    assert verify_checkpoint(tmp_path / "back", tmp_path / "fp8").ok


@pytest.mark.parametrize(("model_type", "axes"), [("qwen3_moe", "nk"), ("gpt_oss", "kn")])
def test_good_fused_experts_pass(tmp_path, model_type, axes):
    source = data.write(tmp_path / "source", data.fused_experts(model_type, axes))
    quantize_checkpoint(source, tmp_path / "fp8", Recipe(block_size=(32, 16)))
    assert verify_checkpoint(tmp_path / "fp8", source).problems == ()
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back")
    assert verify_checkpoint(tmp_path / "back", tmp_path / "fp8").problems == ()


def test_the_errors_are_those_of_the_dequantized_weights(tmp_path):
    model = data.llama()
    source = data.write(tmp_path / "source", model)
    quantize_checkpoint(source, tmp_path / "fp8")
    found = verify_checkpoint(tmp_path / "fp8", source)
    relative = {}
    for name in (error.name for error in found.errors):
        exact = model.tensors[name].double()
        got = reference.dequantize_weight(
            *reference.quantize_weight(model.tensors[name]), dtype=torch.float32
        )
        relative[name] = float((got.double() - exact).norm() / exact.norm())
    for error in found.errors:
        assert error.relative == pytest.approx(relative[error.name], rel=1e-6)
        assert 0.5 < error.worst_over_bound <= 1 + 1e-5
    assert found.errors[0].relative == max(error.relative for error in found.errors)
    rms = math.sqrt(sum(value**2 for value in relative.values()) / len(relative))
    assert found.relative_error == pytest.approx(rms, rel=1e-6)
    assert 0.02 < rms < 0.03


def _problems(folder, source=None):
    found = verify_checkpoint(folder, source)
    assert found.ok == (not any(problem.severity == "error" for problem in found.problems))
    return [str(problem) for problem in found.problems]


def _inspected(folder):
    return [str(problem) for problem in inspect_checkpoint(folder).problems]


def _flip(tensor, position, bits):
    tensor.view(torch.uint8)[position] ^= bits


@pytest.mark.parametrize("bits", [0x01, 0x08, 0x80])
def test_a_flipped_bit_of_a_code_is_found_against_the_source(pair, bits):
    fp8, source = pair
    position = data.read(fp8)[Q].float().abs().flatten().argmax().item()
    position = (position // 192, position % 192)
    data.rewrite(fp8, lambda tensors: _flip(tensors[Q], position, bits))
    (line,) = _problems(fp8, source)
    assert line.startswith(
        f"error: {Q}: is not the source rounded to its codes: error at {list(position)} is "
    )
    assert line.endswith(" times half a step")


def test_any_flipped_bit_is_found_by_checksum(tmp_path):
    source = data.write(tmp_path / "source", data.llama(), shards=2)
    quantize_checkpoint(source, tmp_path / "fp8")
    file = tmp_path / "fp8" / "model-00001-of-00002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    (line,) = _problems(tmp_path / "fp8")
    assert "SHA-256 differs from the manifest: expected " in line


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.5])
def test_a_changed_scale_is_found_against_the_source(pair, factor):
    fp8, source = pair

    def change(tensors):
        tensors[f"{UP}_scale_inv"][2, 1] *= factor

    data.rewrite(fp8, change)
    lines = _problems(fp8, source)
    if factor == 1.5:
        assert lines[0].startswith(f"error: {UP}_scale_inv: config.json says scale_fmt ue8m0 but ")
        assert _inspected(fp8) == lines
    else:
        (line,) = lines
        assert line.startswith(f"error: {UP}: is not the source rounded to its codes: error at [")
        row, column = json.loads(line.split("error at ")[1].split(" is ")[0])
        assert row >= 256
        assert column >= 128


def test_scales_rounded_after_the_division_are_found(pair):
    """Codes made with the unrounded scale, stored beside the rounded one: values up to twice too large."""
    fp8, source = pair

    def change(tensors):
        codes, scale = reference.quantize_weight(data.read(source)[UP])
        tensors[UP], tensors[f"{UP}_scale_inv"] = codes, reference.round_up_to_power_of_two(scale)

    data.rewrite(fp8, change)
    (line,) = _problems(fp8, source)
    assert line.startswith(f"error: {UP}: is not the source rounded to its codes: error at ")
    assert _inspected(fp8) == [], "the headers and the scales look fine"


def test_scales_that_are_no_powers_of_two_under_ue8m0(pair):
    fp8, source = pair

    def change(tensors):
        tensors[UP], tensors[f"{UP}_scale_inv"] = reference.quantize_weight(data.read(source)[UP])

    data.rewrite(fp8, change)
    (line,) = _problems(fp8, source)
    value = data.read(fp8)[f"{UP}_scale_inv"][0, 0].item()
    assert line == (
        f"error: {UP}_scale_inv: config.json says scale_fmt ue8m0 but {value} at [0, 0] is not a power of two"
    )
    assert _inspected(fp8) == [line]
    assert inspect_checkpoint(fp8).power_of_two_scales == 6


def test_codes_without_saturation_to_the_nearest_are_found(pair):
    """Truncated instead of rounded to nearest: each value at most one step off, and caught all the same."""
    fp8, source = pair

    def change(tensors):
        scale = tensors[f"{UP}_scale_inv"].repeat_interleave(128, 0)[:320].repeat_interleave(128, 1)[:, :192]
        exact = data.read(source)[UP].float() / scale
        codes = exact.to(FP8)
        codes.view(torch.uint8)[codes.float().abs() > exact.abs()] -= 1
        tensors[UP] = codes

    data.rewrite(fp8, change)
    (line,) = _problems(fp8, source)
    assert line.startswith(f"error: {UP}: is not the source rounded to its codes")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes(pair, code):
    fp8, source = pair

    def change(tensors):
        tensors[UP].view(torch.uint8)[5, 6:8] = code

    data.rewrite(fp8, change)
    assert _problems(fp8) == [f"error: {UP}: 2 NaN codes"]
    found = verify_checkpoint(fp8, source)
    assert [str(problem) for problem in found.problems] == [f"error: {UP}: 2 NaN codes"]
    assert all(math.isfinite(error.relative) for error in found.errors)


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf])
def test_scales_that_are_no_positive_numbers(pair, value):
    fp8, source = pair

    def change(tensors):
        tensors[f"{UP}_scale_inv"][1, 1] = value

    data.rewrite(fp8, change)
    line = (
        f"error: {UP}_scale_inv: {UP}_scale_inv in model.safetensors: "
        f"1 scales are not positive finite numbers (got {value} at [1, 1])"
    )
    assert _problems(fp8, source) == [line]
    assert _inspected(fp8) == [line]


def test_a_missing_tensor_and_an_extra_one(pair):
    fp8, source = pair

    def change(tensors):
        tensors["stray.weight"] = tensors.pop("model.norm.weight")

    data.rewrite(fp8, change)
    assert _problems(fp8, source) == [
        f"error: model.norm.weight: is in {source} but missing here",
        f"error: stray.weight: is not in {source}",
    ]


def test_a_missing_tensor_and_an_extra_one_by_the_manifest(tmp_path):
    quantize_checkpoint(data.write(tmp_path / "source", data.llama()), tmp_path / "fp8")

    def change(tensors):
        tensors["stray.weight"] = tensors.pop("model.norm.weight")

    data.rewrite(tmp_path / "fp8", change)
    assert _problems(tmp_path / "fp8") == [
        "error: model.norm.weight: is in the manifest but gone",
        "error: stray.weight: is not in the manifest",
    ]


def test_a_copied_tensor_that_differs(pair):
    fp8, source = pair

    def change(tensors):
        _flip(tensors["model.norm.weight"].view(torch.uint8), 9, 1)

    data.rewrite(fp8, change)
    line = "error: model.norm.weight: differs from the source (BF16 in both)"
    assert _problems(fp8, source) == [line]


def test_a_tensor_of_another_shape_or_dtype(pair):
    fp8, source = pair

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float16)

    data.rewrite(fp8, change)
    assert sorted(_problems(fp8, source)) == [
        "error: lm_head.weight: dtype is F16, which no conversion makes of BF16",
        "error: model.norm.weight: shape differs from the source: expected [192], got [191]",
    ]


def test_a_changed_carried_file_and_one_that_is_gone(tmp_path):
    quantize_checkpoint(data.write(tmp_path / "source", data.llama()), tmp_path / "fp8")
    (tmp_path / "fp8" / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "fp8" / "chat_template.jinja").unlink()
    assert _problems(tmp_path / "fp8") == [
        "error: chat_template.jinja: file is in the manifest but gone",
        "error: tokenizer.json: file differs from the manifest",
    ]


def test_a_dequantized_result_with_a_wrong_value(tmp_path):
    source = data.write(tmp_path / "fp8", data.in_fp8(data.llama()))
    dequantize_checkpoint(source, tmp_path / "back")
    (tmp_path / "back" / "blockscale.json").unlink()
    data.rewrite(tmp_path / "back", lambda tensors: _flip(tensors[Q].view(torch.uint8), (190, 2 * 150), 1))
    line = f"error: {Q}: is not the dequantized source: first difference at [190, 150]"
    assert _problems(tmp_path / "back", source) == [line]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON (got "),
        (b"[]", "is not a JSON object (got list)"),
        (b"{}", "manifest lacks its checksums"),
        (b'{"files": [], "tensors": {}}', "manifest lacks its checksums"),
    ],
)
def test_a_broken_manifest(pair, content, message):
    fp8, _ = pair
    (fp8 / "blockscale.json").write_bytes(content)
    with pytest.raises(BlockscaleError) as caught:
        verify_checkpoint(fp8)
    assert str(caught.value).startswith(f"{fp8}/blockscale.json: {message}")


def test_a_manifest_that_leads_out_of_the_folder_reads_nothing_there(pair):
    fp8, _ = pair
    tensors = dict.fromkeys(data.read(fp8), "0")
    (fp8 / "blockscale.json").write_text(
        json.dumps({"files": {"../../etc/hostname": "0"}, "tensors": tensors})
    )
    assert "error: ../../etc/hostname: file is in the manifest but gone" in _problems(fp8)


def test_nothing_is_written_by_looking(pair):
    fp8, source = pair
    before = data.snapshot(fp8), data.snapshot(source)
    verify_checkpoint(fp8, source)
    inspect_checkpoint(fp8)
    assert (data.snapshot(fp8), data.snapshot(source)) == before


def test_empty_fp8_tensors_can_be_verified(tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight"
    model = data.llama().changed({name: torch.empty(0, 192, dtype=torch.bfloat16)})
    fp8 = data.in_fp8(model, [other for other in model.tensors if "_proj" in other and other != name])
    fp8 = fp8.changed({name: torch.empty(0, 192).to(FP8), f"{name}_scale_inv": torch.empty(0, 2)})
    source, folder = data.write(tmp_path / "source", model), data.write(tmp_path / "fp8", fp8)
    assert verify_checkpoint(folder, source).ok
    dequantize_checkpoint(folder, tmp_path / "back")
    assert verify_checkpoint(tmp_path / "back", folder).ok
