"""Histograms count what quantization did, whatever the pieces they are read in."""

import math

import pytest
import torch

from blockscale import ops
from blockscale.checkpoint.convert import quantize_checkpoint
from blockscale.evaluate.diagnose import diagnose_weights
from blockscale.report import histogram
from blockscale.report.histogram import BINS, KINDS, LOW, STEPS, count, grid, read_histograms
from tests import data

BLOCK = (128, 128)


def test_the_grid_is_that_of_e4m3():
    values = grid()
    assert len(values) == 126
    assert (values[0], values[-1]) == (2.0**-9, 448.0)
    assert list(values) == sorted(values)


def test_values_are_counted_where_they_lie_with_what_became_of_them():
    ratios = torch.tensor([[448.0, -448.0, 1.0, 1.5, 2.0**-6, 2.0**-7, 2.0**-11, 0.0]])
    scale = torch.tensor([[0.25]])
    codes = ratios.to(torch.float8_e4m3fn)
    counts, zeros = count(codes, scale, ratios * scale, BLOCK)
    found = {kind: row.nonzero().flatten().tolist() for kind, row in zip(KINDS, counts, strict=True)}

    def place(ratio):
        return math.floor((math.log2(ratio) - LOW) * STEPS)

    assert zeros == 1
    assert found["flushed"] == [place(2.0**-11)]
    assert found["subnormal"] == [place(2.0**-7)]
    assert found["normal"] == [place(2.0**-6), place(1.0), place(1.5)]
    assert found["saturated"] == [place(448)]
    assert counts[KINDS.index("saturated")].sum() == 2


def test_what_is_beyond_the_bins_is_in_the_outermost():
    source = torch.tensor([[2.0**-40, 2.0**40]])
    counts, _ = count(source.clamp(max=448).to(torch.float8_e4m3fn), torch.ones(1, 1), source, BLOCK)
    assert counts[KINDS.index("flushed")][0] == 1
    assert counts[KINDS.index("saturated")][BINS - 1] == 1


def test_every_value_is_divided_by_the_scale_of_its_block():
    source = data.weight("w", 200, 300)
    codes, scale = ops.quantize_weight(source)
    counts, zeros = count(codes, scale, source, BLOCK)
    assert int(counts.sum()) + zeros == source.numel()
    # The largest value of each block is at 448 and nothing is beyond.
    last = math.floor((math.log2(448) - LOW) * STEPS)
    assert counts[:, last].sum() >= scale.numel()
    assert counts[:, last + 1 :].sum() == 0


@pytest.mark.parametrize("model", [data.llama(), data.fused_experts("llama4", "kn")])
def test_shares_agree_with_the_diagnosis_in_pieces_of_any_size(tmp_path, monkeypatch, model):
    monkeypatch.setattr(histogram, "_PIECE", 1)  # a row of blocks at a time
    data.write(tmp_path / "source", model)
    quantize_checkpoint(tmp_path / "source", tmp_path / "fp8")
    places = str(tmp_path / "fp8"), str(tmp_path / "source")
    _, tensors = diagnose_weights(*places)
    for tensor, found in zip(tensors, read_histograms(*places, [t.name for t in tensors]), strict=True):
        assert found.name == tensor.name
        assert found.values == tensor.nbytes
        assert found.share("flushed") == pytest.approx(tensor.weight.flushed)
        assert found.share("saturated") == pytest.approx(tensor.weight.saturated)
