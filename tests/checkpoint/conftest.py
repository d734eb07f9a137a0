"""Checkpoints that several tests start from."""

import pytest

from blockscale import Recipe, quantize_checkpoint, verify_checkpoint
from tests import data


@pytest.fixture
def pair(tmp_path):
    """A BF16 checkpoint and its ue8m0 result without the manifest, so that each check stands on its own."""
    source = data.write(tmp_path / "source", data.llama())
    quantize_checkpoint(source, tmp_path / "fp8", Recipe("ue8m0"))
    (tmp_path / "fp8" / "blockscale.json").unlink()
    assert verify_checkpoint(tmp_path / "fp8", source).problems == ()
    return tmp_path / "fp8", source
