"""What the tests of `lint` change."""

import pytest

from blockscale import quantize_checkpoint
from tests import data
from tests.checkpoint.lint.checkpoints import aligned


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clean FP8 checkpoint of one file, to copy from."""
    folder = tmp_path_factory.mktemp("made")
    quantize_checkpoint(data.write(folder / "source", aligned(data.llama(2))), folder / "fp8")
    return data.read(folder / "fp8"), data.read_config(folder / "fp8")
