"""From checkpoints to recipes: sizes to the byte, costs that add up, what was measured."""

import functools
import json
import math

import pytest
import torch

from blockscale import Recipe, quantize_checkpoint
from blockscale.checkpoint.index import read_index
from blockscale.checkpoint.precision import parse_precision
from blockscale.checkpoint.recipe import read_recipe
from blockscale.checkpoint.sizing import plan_checkpoint
from blockscale.checkpoint.source import open_source
from blockscale.errors import BlockscaleError
from blockscale.evaluate.compare import score_windows, summarize
from blockscale.evaluate.loading import Loading
from blockscale.evaluate.session import to_json
from blockscale.evaluate.subjects import open_subject
from blockscale.evaluate.windows import cut
from blockscale.formats import tensor_nbytes
from blockscale.search.candidates import BF16, candidates
from blockscale.search.goals import Goal
from blockscale.search.recipes import compact
from blockscale.search.run import search
from blockscale.search.space import open_space
from tests.evaluate.models import random_tokens

IDS = random_tokens(96, seed=4).view(3, 32)
CPU = Loading("transformers", "cpu", torch.float32)
MIXED = Recipe(layout="compressed-tensors")


@functools.cache  # what several tests look at is searched for once
def found(folder, goal, base=None, ids=IDS, formats=(), **options):
    return search(open_space(str(folder), base, formats), goal, ids, loading=CPU, **options)


def written(result, path):
    """The recipe as a file has it."""
    path.write_text(json.dumps(result.recipe))
    return read_recipe(path)


def tensor_bytes(folder):
    tensors = read_index(open_source(str(folder))).tensors.values()
    return sum(tensor_nbytes(entry.dtype, entry.shape) for entry in tensors)


@pytest.mark.parametrize("share", [0.8, 0.9])
@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_quantize_by_the_recipe_gives_the_size_to_the_byte(kind, share, request, tmp_path):
    folder = request.getfixturevalue(kind)
    result = found(folder, Goal(f"{share}x"))
    assert result.source_bytes == tensor_bytes(folder)
    assert result.chosen.nbytes <= result.target_bytes == int(share * result.source_bytes)
    quantize_checkpoint(folder, tmp_path / "made", written(result, tmp_path / "recipe.json"))
    assert tensor_bytes(tmp_path / "made") == result.chosen.nbytes


def test_what_is_measured_is_what_evaluate_finds_of_the_quantized_checkpoint(llama, tmp_path):
    result = found(llama, Goal("0.8x"), measured=True)
    quantize_checkpoint(llama, tmp_path / "made", written(result, tmp_path / "recipe.json"))
    made, source = (open_subject(str(folder), CPU) for folder in (tmp_path / "made", llama))
    against = summarize(score_windows(made, source, IDS.flatten(), cut(IDS.flatten(), 32, 32))).against
    assert result.measured.kl.value == pytest.approx(against.kl.value, rel=1e-4)
    assert result.measured.kl.high == pytest.approx(against.kl.high, rel=1e-4)
    assert result.measured.top1.value == against.top1.value
    assert result.measured.calibration == pytest.approx(
        against.kl.value / result.chosen.predicted_kl, rel=1e-4
    )


@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_prediction_is_the_sum_over_units_and_near_what_is_measured(kind, request):
    result = found(request.getfixturevalue(kind), Goal("0.8x"), measured=True)
    chosen = [next((c.kl for c in unit.costs if c.format == unit.format), 0.0) for unit in result.units]
    assert result.chosen.predicted_kl == pytest.approx(math.fsum(chosen))
    assert result.bound_kl <= result.chosen.predicted_kl
    assert result.chosen.predicted_kl > 0
    # Noise of random models does not add up well, but a unit left out or counted twice would be seen.
    assert 0.3 < result.measured.calibration < 3


def test_points_go_from_the_smallest_to_the_source(llama):
    result = found(llama, Goal("0.8x"), measured=True)
    sizes = [point.nbytes for point in result.points]
    assert sizes == sorted(sizes)
    assert sizes[0] == plan_checkpoint(str(llama)).after
    assert sizes[-1] == result.source_bytes
    predicted = [point.predicted_kl for point in result.points]
    assert predicted == sorted(predicted, reverse=True)
    assert predicted[-1] == 0
    assert len([point for point in result.points if point.measured_kl is not None]) >= 4
    assert result.points[0].label == f"{sizes[0] / result.source_bytes:.3f}x"
    assert json.loads(to_json(result))["points"][0]["nbytes"] == sizes[0]


def test_smaller_sizes_cost_more(llama):
    costs = [found(llama, Goal(share)).chosen.predicted_kl for share in ("0.75x", "0.85x", "0.95x")]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_units_have_one_format_in_what_quantize_decides(deepseek, tmp_path):
    result = found(deepseek, Goal("0.85x"))
    precision = parse_precision(result.recipe["precision"])
    space = open_space(str(deepseek))
    assert {unit.format for unit in result.units} == {"bf16", "fp8"}
    for unit, choice in zip(space.units, result.units, strict=True):
        assert {str(precision.format_of(name)) for name in unit.tensors} == {choice.format}
    experts = [unit for unit in space.units if unit.role == "experts"]
    assert [len(unit.tensors) for unit in experts] == [48, 48]


def test_several_block_sizes_have_their_bytes(llama, tmp_path):
    pytest.importorskip("compressed_tensors")
    result = found(llama, Goal("0.85x"), MIXED)
    assert result.recipe["layout"] == "compressed-tensors"
    names = ["fp8", "fp8:64x64", "fp8:32x32", "fp8:1x128"]
    assert all([cost.format for cost in unit.costs] == names for unit in result.units)
    formats = ["fp8:1x128" if number % 2 else "fp8:32x32" for number, _ in enumerate(result.units)]
    space = open_space(str(llama), MIXED)
    expected = sum(
        next(cost.nbytes for cost in unit.costs if cost.format == name)
        for unit, name in zip(result.units, formats, strict=True)
    ) + (result.source_bytes - sum(unit.source_bytes for unit in result.units))
    (tmp_path / "recipe.json").write_text(json.dumps(space.recipe(compact(space.units, formats))))
    assert plan_checkpoint(str(llama), read_recipe(tmp_path / "recipe.json")).after == expected
    quantize_checkpoint(llama, tmp_path / "made", read_recipe(tmp_path / "recipe.json"))
    assert tensor_bytes(tmp_path / "made") == expected


def test_another_block_size_of_the_layout_with_one(llama, tmp_path):
    base = Recipe(block_size=(32, 32), scale_fmt="ue8m0")
    result = found(llama, Goal("0.8x"), base)
    assert {key: result.recipe[key] for key in ("layout", "scale_fmt", "block_size")} == {
        "layout": "deepseek",
        "scale_fmt": "ue8m0",
        "block_size": "32x32",
    }
    assert plan_checkpoint(str(llama), written(result, tmp_path / "r.json")).after == result.chosen.nbytes


def test_formats_of_fewer_than_8_bits(llama, tmp_path):
    """Half the size of FP8 and more: what is chosen is what `quantize` writes, to the byte."""
    result = found(llama, Goal("0.6x"), Recipe(layout="blockscale"), formats=("fp8", "int4:g32", "int3:g128"))
    fp8, int4, int3 = zip(*(unit.costs for unit in result.units), strict=True)
    assert sum(each.kl for each in fp8) < sum(each.kl for each in int4) < sum(each.kl for each in int3)
    assert {"int4:g32", "int3:g128"} & {unit.format for unit in result.units}
    assert result.recipe["layout"] == "blockscale"
    recipe = written(result, tmp_path / "recipe.json")
    report = quantize_checkpoint(llama, tmp_path / "made", recipe)
    assert report.group_formats
    assert tensor_bytes(tmp_path / "made") == result.chosen.nbytes


def test_the_smallest_size_below_a_kl_or_above_an_accuracy(llama):
    at_a_size = found(llama, Goal("0.85x"), measured=True)
    result = found(llama, Goal(max_kl=at_a_size.chosen.predicted_kl))
    assert result.chosen.nbytes <= at_a_size.chosen.nbytes
    assert result.bound_kl is None
    accurate = found(llama, Goal(min_accuracy=0.9))
    assert accurate.chosen.top1 >= 0.9
    assert accurate.measured.top1.value == accurate.chosen.top1
    with pytest.raises(BlockscaleError, match="only the source"):
        found(llama, Goal(max_kl=1e-12))


def test_what_cannot_be_is_refused(llama, tmp_path):
    with pytest.raises(BlockscaleError, match="no assignment of these formats is that small"):
        found(llama, Goal("0.3x"))
    quantize_checkpoint(llama, tmp_path / "made")
    with pytest.raises(BlockscaleError, match="already quantized"):
        open_space(str(tmp_path / "made"))
    with pytest.raises(BlockscaleError, match="not enough text"):
        found(llama, Goal("0.9x"), ids=IDS[:, :1])


def test_formats_by_name():
    named = candidates(
        ("bf16", "fp8:64x64", "fp8:128x128", "fp8"), "compressed-tensors", (128, 128), "float32"
    )
    assert [each.name for each in named] == ["fp8:64x64", "fp8"]
    own = candidates(("fp8:64x64",), "deepseek", (64, 64), "float32")
    assert [each.name for each in own] == ["fp8"]
    with pytest.raises(BlockscaleError, match="one block size"):
        candidates(("fp8", "fp8:64x64"), "deepseek", (128, 128), "float32")
    with pytest.raises(BlockscaleError, match="unknown precision"):
        candidates(("int2",), "deepseek", (128, 128), "float32")
    with pytest.raises(BlockscaleError, match="weights of fewer than 8 bits are not searched for"):
        candidates(("fp8", "int4"), "deepseek", (128, 128), "float32")
    low = candidates(("int4", "int4:g128", "mxfp4"), "blockscale", (128, 128), "float32")
    assert [each.name for each in low] == ["int4:g128", "mxfp4"]
    with pytest.raises(BlockscaleError, match="nothing to choose"):
        candidates((BF16,), "deepseek", (128, 128), "float32")
