"""Rounding with given scales: values, codes and masks have the bits of the reference on every backend."""

import pytest
import torch

from blockscale import ops
from blockscale.errors import BlockscaleError
from blockscale.formats import BlockFP8
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.reference import given_scale as truth
from blockscale.reference.grids import block_of, clipping_limit, grid_of
from blockscale.testing.asserts import assert_bitwise_equal

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
FORMATS = {
    "fp8": BlockFP8(),
    "ue8m0": BlockFP8((128, 128), "ue8m0"),
    "fp8-24x48": BlockFP8((24, 48)),
    "fp8-1x64": BlockFP8((1, 64)),
    "int4": GroupInt(),
    "int4-32-ue8m0": GroupInt(4, 32, "ue8m0"),
    "int3-64": GroupInt(3, 64),
    "mxfp4": MXFP4(),
}
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
shapes = pytest.mark.parametrize("shape", [(2, 37, 200), (130, 140), (1, 1)], ids=str)
DEVICES = [
    ("auto", "cpu"),
    pytest.param(("triton", "cpu"), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on GPU")),
    pytest.param(("auto", "cuda"), marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES, ids="-".join)
def backend(request):
    if request.param[0] == "triton":
        pytest.importorskip("triton")
    return request.param


def scaled(shape, fmt, dtype=torch.float32):
    """A weight with all sorts of values, and scales from 2**-126 to those that saturate some of a block."""
    generator = torch.Generator().manual_seed(sum(shape))
    grid = truth._sum_blocks(torch.zeros(shape), block_of(fmt)).shape
    scale = torch.exp2(torch.randint(-6, 4, grid, generator=generator).float())
    if fmt.scale_fmt != "ue8m0":
        scale *= (1 + torch.rand(grid, generator=generator)).bfloat16().float()
    scale.view(-1)[::7] = 2.0**-126
    size = grid_of(fmt).largest * torch.rand(shape, generator=generator)
    weight = torch.randn(shape, generator=generator) * size / 8
    weight.view(-1)[::11], weight.view(-1)[5::97], weight.view(-1)[6::97] = 0.0, -torch.inf, torch.nan
    weight.view(-1)[3::13] = -1e-40
    limit = clipping_limit(fmt) * scale.view(-1)[-1]  # of the last block
    weight[..., -1:, -1], weight[..., -1:, -3:-2] = limit, -limit
    return weight.to(dtype), scale


def moved(backend, *tensors):
    return [each.to(backend[1]) for each in tensors]


@formats
@shapes
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32], ids=["of-bf16", "of-f32"])
def test_values_have_the_bits_of_the_reference(backend, fmt, shape, source):
    weight, scale = scaled(shape, fmt, source)
    dtype = torch.float32 if source == torch.bfloat16 else torch.bfloat16
    wanted = truth.fake_quantize_scaled(weight, scale, fmt, dtype)
    found = ops.fake_quantize_scaled(*moved(backend, weight, scale), fmt, dtype, backend=backend[0])
    assert_bitwise_equal(found.cpu(), wanted)


@pytest.mark.parametrize("name", ["fp8", "ue8m0", "fp8-24x48", "fp8-1x64"])
@shapes
def test_codes_are_those_of_the_values(backend, name, shape):
    fmt = FORMATS[name]
    weight, scale = scaled(shape, fmt)
    wanted = truth.quantize_scaled(weight, scale, fmt)
    found = ops.quantize_scaled(*moved(backend, weight, scale), fmt, backend=backend[0]).cpu()
    assert_bitwise_equal(found, wanted)
    values = ops.dequantize_weight(found, scale, fmt.block_size, torch.float32)
    assert_bitwise_equal(values, truth.fake_quantize_scaled(weight, scale, fmt, torch.float32))


@formats
@shapes
@pytest.mark.parametrize("of_scale", [True, False], ids=["both", "weight"])
def test_gradients_are_those_of_the_reference(backend, fmt, shape, of_scale):
    weight, scale = scaled(shape, fmt)
    dtype = torch.float32 if of_scale else torch.bfloat16
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted, wanted_of_scale = truth.scaled_gradients(grad, weight, scale, fmt)
    found, of_scales = ops.scaled_gradients(
        *moved(backend, grad, weight, scale), fmt, of_scale=of_scale, backend=backend[0]
    )
    assert_bitwise_equal(found.cpu(), wanted)
    if not of_scale:
        assert of_scales is None
        return
    # Order of a float32 sum: relative to the sum of magnitudes, an ulp for each time it is halved.
    quotient = (weight.double() / truth.spread_scale(scale, block_of(fmt), weight.shape)).abs()
    each = grad.double().abs() * quotient.clamp_max(2 * grid_of(fmt).largest)
    bound = 1e-6 * truth._sum_blocks(each, block_of(fmt))
    assert of_scales.dtype == torch.float32
    error = (of_scales.cpu().double() - wanted_of_scale.double()).abs()
    assert torch.equal(of_scales.cpu().isnan(), wanted_of_scale.isnan())
    assert bool((error <= bound).where(~wanted_of_scale.isnan(), True).all())


def test_some_gradients_are_cut_off_and_the_limit_itself_is_not(backend):
    fmt = GroupInt(4, 32)
    weight = torch.tensor([[7.5, -7.5, 7.53125, -8.0, 3.0]])
    found = ops.scaled_gradients(
        *moved(backend, torch.ones(1, 5), weight, torch.ones(1, 1)), fmt, backend=backend[0]
    )
    assert found[0].tolist() == [[1, 1, 0, 0, 1]]
    assert found[1].tolist() == [[7 - 7.5 + -7 + 7.5 + 7 - 7]]


def test_gradients_and_weights_need_not_be_contiguous(backend):
    fmt = BlockFP8((24, 48))
    weight, scale = scaled((150, 200), fmt)
    grad = torch.randn(200, 150, generator=torch.Generator().manual_seed(1)).t()
    odd = torch.empty(150, 400)[:, ::2].copy_(weight)
    for each in (grad, torch.ones(1, 1).expand(150, 200)):
        wanted = ops.scaled_gradients(each.contiguous(), weight, scale, fmt)[0]
        found = ops.scaled_gradients(*moved(backend, each, odd, scale), fmt, backend=backend[0])[0]
        assert_bitwise_equal(found.cpu(), wanted)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (2, 0, 3)], ids=str)
def test_nothing_becomes_nothing(backend, shape):
    for fmt in (BlockFP8(), GroupInt()):
        weight = torch.zeros(shape)
        scale = torch.ones(truth._sum_blocks(weight, block_of(fmt)).shape) if weight.shape[-1] else None
        scale = torch.ones(*shape[:-2], -(-shape[-2] // block_of(fmt)[0]), 0) if scale is None else scale
        tensors = moved(backend, weight, scale)
        assert ops.fake_quantize_scaled(*tensors, fmt, backend=backend[0]).shape == shape
        assert ops.scaled_gradients(tensors[0], *tensors, fmt, backend=backend[0])[0].shape == shape


def test_a_group_that_fits_no_tile_is_left_to_the_reference(backend):
    fmt = BlockFP8((2, 5000))
    weight, scale = scaled((3, 9000), fmt)
    found = ops.fake_quantize_scaled(*moved(backend, weight, scale), fmt, backend=backend[0])
    assert_bitwise_equal(found.cpu(), truth.fake_quantize_scaled(weight, scale, fmt))


def test_what_does_not_fit_is_refused():
    weight, scale, fmt = torch.ones(4, 130), torch.ones(4, 2), GroupInt()
    with pytest.raises(BlockscaleError, match=r"scale: wrong shape \(expected \[4, 2\], got \[4, 1\]\)"):
        ops.fake_quantize_scaled(weight, scale[:, :1], fmt)
    with pytest.raises(BlockscaleError, match="scale: bad dtype"):
        ops.quantize_scaled(weight, torch.ones(1, 2).bfloat16(), BlockFP8())
    with pytest.raises(BlockscaleError, match="grad: wrong shape"):
        ops.scaled_gradients(weight[:2], weight, scale, fmt)
    with pytest.raises(BlockscaleError, match="scale: on another device"):
        ops.fake_quantize_scaled(weight, scale.to("meta"), fmt)
    with pytest.raises(BlockscaleError, match="unknown backend"):
        ops.fake_quantize_scaled(weight, scale, fmt, backend="fast")
