"""Rounded weights that are not what the plan asks for are refused; `verify` knows those that are."""

import pytest
import torch

from blockscale import BlockscaleError, Recipe, quantize_checkpoint, verify_checkpoint
from tests import data
from tests.checkpoint.rounders import StepUp

ATTENTION = "model.layers.0.self_attn."
Q, OUT = f"{ATTENTION}q_proj.weight", f"{ATTENTION}o_proj.weight"


@pytest.fixture
def source(tmp_path):
    return data.write(tmp_path / "source", data.llama(), shards=3)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def _nan(tensors):
    tensors[OUT].view(torch.uint8)[5, 7] = 0x7F


def _cut(name, change):
    def spoil(tensors):
        tensors[name] = change(tensors[name]).contiguous()

    return spoil


SPOILED = {
    "shape": (
        _cut(OUT, lambda codes: codes[:-1]),
        "is not the one of the plan (expected F8_E4M3 [192, 192], ",
    ),
    "dtype": (
        _cut(OUT, lambda codes: codes.bfloat16()),
        "(expected F8_E4M3 [192, 192], got BF16 [192, 192])",
    ),
    "no scale": (
        lambda tensors: tensors.pop(f"{OUT}_scale_inv"),
        "rounded weight without a scale (expected ",
    ),
    "no codes": (lambda tensors: tensors.pop(OUT), f"{OUT}_scale_inv in "),
    "grid": (
        _cut(f"{OUT}_scale_inv", lambda scale: scale[:, :1]),
        "does not fit its blocks (expected F32 [2, 2], got F32 [2, 1])",
    ),
    "scale dtype": (_cut(f"{OUT}_scale_inv", lambda scale: scale.bfloat16()), "got BF16 [2, 2])"),
    "zero": (_cut(f"{OUT}_scale_inv", lambda scale: scale * 0), "4 scales are not positive finite numbers"),
    "nan": (_nan, "rounded weight has NaN codes"),
    "ue8m0": (
        _cut(f"{OUT}_scale_inv", lambda scale: scale * 1.5),
        "is no power of two (expected scale_fmt ue8m0",
    ),
    "stranger": (lambda tensors: tensors.update(other=torch.zeros(3)), "other in "),
    "not quantized": (
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3)}),
        "is not of a rounded weight",
    ),
    "twice": (lambda tensors: tensors.update({Q: torch.zeros(3)}), "is in two files (got also in "),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_the_plan_does_not_ask_for_is_refused(source, out, what):
    spoil, told = SPOILED[what]

    def rounder():
        return StepUp(source, spoil=lambda tensors: spoil(tensors) if OUT in tensors else None)

    recipe = Recipe("ue8m0")
    with pytest.raises(BlockscaleError) as caught:
        quantize_checkpoint(source, out, recipe, rounder=rounder())
    line = str(caught.value)
    assert told in line, line
    assert "\n" not in line
    assert not (out / "config.json").exists()
    folder = out / ".blockscale" / "rounded"
    if what != "zero":
        assert line.endswith("remove the file and run the same command again")
    for name in (OUT, Q):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    good = StepUp(source)
    quantize_checkpoint(source, out, recipe, rounder=good)
    assert OUT in good.rounded
    assert len(good.rounded) <= 2
    assert verify_checkpoint(out, source).problems == ()


@pytest.mark.parametrize("layout", ["deepseek", "compressed-tensors"])
def test_verify_passes_and_says_how_many_are_calibrated(source, out, layout):
    rounder = StepUp(source, wants=lambda name: "self_attn" in name)
    quantize_checkpoint(source, out, Recipe(layout=layout), rounder=rounder)
    found = verify_checkpoint(out, source)
    assert found.problems == ()
    assert (found.calibrated, len(found.errors)) == (4, 7)
    assert {error.name for error in found.errors if error.worst_over_bound > 1.01} == set(rounder.rounded)
    (out / "blockscale.json").unlink()
    found = verify_checkpoint(out, source)
    assert found.calibrated == 0
    assert {problem.where for problem in found.problems} == set(rounder.rounded)


def test_verify_finds_a_corrupted_code(tmp_path, out):
    source = data.write(tmp_path / "source", data.llama())
    quantize_checkpoint(source, out, rounder=StepUp(source))
    data.rewrite(out, lambda tensors: tensors[Q].view(torch.uint8)[3, 3].bitwise_xor_(1))
    (problem,) = verify_checkpoint(out, source).problems
    assert problem.where == Q
    assert "SHA-256 differs from the manifest" in str(problem)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors.update({Q: tensors[Q].T.contiguous()}),
        lambda tensors: tensors[f"{Q}_scale_inv"].mul_(2),
        lambda tensors: tensors[f"{Q}_scale_inv"].div_(2),
    ],
    ids=["transposed", "doubled", "halved"],
)
def test_verify_finds_calibrated_weights_that_are_not_the_source(source, out, spoil):
    rounder = StepUp(source, spoil=lambda tensors: spoil(tensors) if Q in tensors else None)
    quantize_checkpoint(source, out, rounder=rounder)
    (problem,) = verify_checkpoint(out, source).problems
    assert problem.where == Q
    assert "is not the source: relative error " in str(problem)
    assert str(problem).endswith(", a calibrated weight of 8 bits has at most 40%")
