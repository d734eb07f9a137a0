"""`verify` says how many weights were calibrated."""

from blockscale import quantize_checkpoint
from tests import data
from tests.checkpoint.rounders import StepUp


def test_verify_says_how_many_weights_are_calibrated(tmp_path, blockscale):
    source = data.write(tmp_path / "source", data.llama())
    rounder = StepUp(source, wants=lambda name: "self_attn" in name)
    quantize_checkpoint(source, tmp_path / "fp8", rounder=rounder)
    code, out, _ = blockscale("verify", tmp_path / "fp8", "--against", source)
    assert code == 0
    assert "4 weights calibrated, not rounded to the nearest code\n" in out
    quantize_checkpoint(source, tmp_path / "plain")
    assert "calibrated" not in blockscale("verify", tmp_path / "plain", "--against", source)[1]
