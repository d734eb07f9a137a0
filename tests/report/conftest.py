"""A checkpoint, its FP8 result and a diagnosis of the two, made once."""

import pytest

pytest.importorskip("plotly")

from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.evaluate.diagnose import diagnose_weights
from tests import data
from tests.report import examples


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """What `quantize` said, of `source` and `fp8` in one folder."""
    folder = tmp_path_factory.mktemp("report")
    data.write(folder / "source", data.deepseek_v3())
    return quantize_checkpoint(folder / "source", folder / "fp8")


@pytest.fixture(scope="session")
def diagnosis(converted):
    return examples.costed(*diagnose_weights(converted.destination, converted.source))
