"""Every command on a real, trained checkpoint of the DeepSeek-V3 architecture, where it is there."""

import json

import pytest
import torch

from blockscale import reference
from blockscale.testing.asserts import assert_bitwise_equal
from tests import data

pytestmark = pytest.mark.skipif(not data.TINY_DEEPSEEK.is_dir(), reason=f"no {data.TINY_DEEPSEEK.name} here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def test_through_every_command(folder, blockscale):
    source, fp8, back = data.TINY_DEEPSEEK, folder / "fp8", folder / "back"
    before = data.snapshot(source)

    def run(*arguments):
        code, out, err = blockscale(*arguments, "--json")
        assert (code, err) == (0, ""), (arguments, out, err)
        return json.loads(out)

    assert run("inspect", source)["problems"] == []
    planned = run("plan", source, "--tp", 2, "--ep", 4)
    assert run("plan", source / "config.json", "--tp", 2, "--ep", 4)["after"] == planned["after"]
    report = run("quantize", source, fp8, "--scale-fmt", "ue8m0")
    assert report["output_bytes"] == planned["after"]
    assert report["input_bytes"] == planned["before"]
    verified = run("verify", fp8, "--against", source)
    assert verified["ok"]
    assert 0.02 < verified["relative_error"] < 0.03
    inspected = run("inspect", fp8)
    assert inspected["problems"] == []
    assert inspected["power_of_two_scales"] == inspected["scales"] == report["tensors"]["quantize"]
    run("dequantize", fp8, back)
    assert run("verify", back, "--against", fp8)["ok"]
    assert run("inspect", back)["problems"] == []
    assert data.read_config(back) == data.read_config(source)
    assert data.snapshot(source) == before
    original, quantized, restored = data.read(source), data.read(fp8), data.read(back)
    assert restored.keys() == original.keys()
    for name, tensor in original.items():
        expected = tensor
        if quantized[name].dtype == torch.float8_e4m3fn:
            codes, scale = reference.quantize_weight(tensor, scale_fmt="ue8m0")
            assert_bitwise_equal(quantized[name], codes, name)
            expected = reference.dequantize_weight(codes, scale)
        assert_bitwise_equal(restored[name], expected, name)
