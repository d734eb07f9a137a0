"""Fake quantization is the quantizer and the dequantizer, to the bit, on every backend."""

import pytest
import torch

from blockscale import ops, reference
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.reference import fake_quantize as truth
from blockscale.testing.asserts import assert_bitwise_equal

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
FORMATS = {
    "fp8": BlockFP8(),
    "ue8m0": BlockFP8((128, 128), "ue8m0"),
    "fp8-32x48": BlockFP8((32, 48)),
    "int4": GroupInt(),
    "int4-32-ue8m0": GroupInt(4, 32, "ue8m0"),
    "int3-64": GroupInt(3, 64),
    "mxfp4": MXFP4(),
}
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])


@pytest.fixture(
    params=[
        ("auto", "cpu"),
        pytest.param(("triton", "cpu"), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on GPU")),
        pytest.param(("auto", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def backend(request):
    if request.param[0] == "triton":
        pytest.importorskip("triton")
    return request.param


def gaussian(*shape, dtype=torch.float32, size=0.05):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (x * size).to(dtype)


def weight_of(x, fmt, dtype, backend):
    return ops.fake_quantize_weight(x.to(backend[1]), fmt, dtype, backend=backend[0]).cpu()


@formats
@dtypes
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32], ids=["of-bf16", "of-f32"])
def test_weights_are_quantized_and_dequantized(backend, fmt, dtype, source):
    x = gaussian(2, 150, 200, dtype=source)
    x[0, :, :70] = 0
    x[1, 3] *= 1e-38
    if isinstance(fmt, BlockFP8):
        made = reference.quantize_weight(x, fmt.block_size, fmt.scale_fmt)
        wanted = reference.dequantize_weight(*made, fmt.block_size, dtype)
    else:
        wanted = reference.dequantize_group(*reference.quantize_group(x, fmt), fmt, 200, dtype)
    assert_bitwise_equal(truth.fake_quantize_weight(x, fmt, dtype), wanted)
    assert_bitwise_equal(weight_of(x, fmt, dtype, backend), wanted)


@formats
def test_a_block_with_nan_or_inf_is_nan_and_no_other(backend, fmt):
    x = gaussian(150, 200)
    wanted = weight_of(x, fmt, torch.float32, backend)
    rows, columns = fmt.block_size if isinstance(fmt, BlockFP8) else (1, fmt.group_size)
    x[140, 199], x[5, 3] = torch.nan, -torch.inf
    for row, column in ((140, 199), (5, 3)):
        top, left = row // rows * rows, column // columns * columns
        wanted[top : top + rows, left : left + columns] = torch.nan
    assert_bitwise_equal(weight_of(x, fmt, torch.float32, backend), wanted)


@dtypes
@pytest.mark.parametrize("fmt", [BlockFP8(), BlockFP8((1, 48), "ue8m0")], ids=["128", "48-ue8m0"])
@pytest.mark.parametrize("shape", [(3, 5, 200), (1, 128), (70, 96)], ids=str)
def test_activations_are_quantized_and_dequantized(backend, fmt, dtype, shape):
    x = gaussian(*shape, dtype=torch.bfloat16, size=3.0)
    x[..., :2], x[..., 0, 100:] = 1e-12, 0.0
    made = reference.quantize_activation(x, fmt.block_size[1], fmt.scale_fmt)
    wanted = reference.dequantize_activation(*made, fmt.block_size[1], dtype)
    assert_bitwise_equal(truth.fake_quantize_activation(x, fmt, dtype), wanted)
    found = ops.fake_quantize_activation(x.to(backend[1]), fmt, dtype, backend=backend[0])
    assert_bitwise_equal(found.cpu(), wanted)


def test_groups_of_activations_with_nan_or_inf_are_nan(backend):
    x = gaussian(4, 256)
    x[1, 3], x[2, 200] = torch.nan, torch.inf
    found = ops.fake_quantize_activation(x.to(backend[1]), BlockFP8(), backend=backend[0]).cpu()
    bad = torch.zeros(4, 256, dtype=torch.bool)
    bad[1, :128] = bad[2, 128:] = True
    assert torch.equal(found.isnan(), bad)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (2, 0, 3)], ids=str)
def test_nothing_becomes_nothing(backend, shape):
    for fmt in (BlockFP8(), GroupInt()):
        assert weight_of(torch.zeros(shape), fmt, torch.bfloat16, backend).shape == shape


def test_strided_weights_and_what_is_refused():
    x = gaussian(130, 400)[:, ::2]
    for fmt in (BlockFP8(), GroupInt(4, 32)):
        assert_bitwise_equal(ops.fake_quantize_weight(x, fmt), ops.fake_quantize_weight(x.contiguous(), fmt))
    with pytest.raises(BlockscaleError, match="fake_quantize_weight"):
        ops.fake_quantize_weight(x.double(), BlockFP8())
    with pytest.raises(BlockscaleError, match="dtype"):
        ops.fake_quantize_activation(x, BlockFP8(), torch.int8)
