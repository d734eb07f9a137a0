"""Fake quantization: forward has the bits of the reference, backward is straight through, as in float64."""

import pytest
import torch

from blockscale import BlockscaleError, reference
from blockscale.calibrate.formats import block_of
from blockscale.formats import BlockFP8
from blockscale.group_formats import E2M1_VALUES, MXFP4, GroupInt
from blockscale.qat.fake_quant import (
    fake_quantize,
    fake_quantize_input,
    fake_quantize_scaled,
    round_scaled,
    storable,
)
from blockscale.reference.grids import clipping_limit

FORMATS = {
    "fp8": BlockFP8(),
    "fp8-ue8m0": BlockFP8((128, 128), "ue8m0"),
    "fp8-narrow": BlockFP8((48, 32)),
    "int4": GroupInt(4, 128),
    "int4-ue8m0": GroupInt(4, 32, "ue8m0"),
    "int3": GroupInt(3, 64),
    "mxfp4": MXFP4(),
}
SHAPES = [(130, 200), (3, 70, 96), (1, 1)]
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-8, 3, (*shape[:-1], 1), generator=generator).float())
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def rounded(weight, fmt):
    """Codes and scales of the reference."""
    if isinstance(fmt, BlockFP8):
        return reference.quantize_weight(weight, fmt.block_size, fmt.scale_fmt)
    return reference.quantize_group(weight, fmt)


def read_back(codes, scale, fmt, width, dtype=torch.float32):
    if isinstance(fmt, BlockFP8):
        return reference.dequantize_weight(codes, scale, fmt.block_size, dtype)
    return reference.dequantize_group(codes, scale, fmt, width, dtype)


def scales_of(weight, fmt, seed=1):
    """Scales that are stored as they are, some of them half or double of what the amax asks for."""
    scale = rounded(weight, fmt)[1].float()
    factor = torch.tensor([0.5, 1.0, 2.0])
    picked = torch.randint(3, scale.shape, generator=torch.Generator().manual_seed(seed))
    return scale * factor[picked]


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_own_scales_give_the_bits_of_the_reference(fmt, shape, dtype):
    weight = random(*shape, dtype=dtype)
    weight[..., :1, :] = 0
    for result in (torch.float32, torch.bfloat16):
        expected = read_back(*rounded(weight, fmt), fmt, shape[-1], result)
        assert same_bits(fake_quantize(weight, fmt, result), expected)


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_scales_of_the_reference_given_round_to_its_codes(fmt, shape):
    weight = random(*shape)
    codes, scale = rounded(weight, fmt)
    made = round_scaled(weight, scale.float(), fmt)
    assert same_bits(made.codes, codes)
    assert same_bits(made.scale, scale)
    assert same_bits(fake_quantize_scaled(weight, scale.float(), fmt), fake_quantize(weight, fmt))


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_given_scales_give_the_values_of_the_codes_that_are_exported(fmt, shape):
    weight = random(*shape)
    scale = scales_of(weight, fmt)
    made = round_scaled(weight, scale, fmt)
    for result in (torch.float32, torch.bfloat16):
        expected = read_back(*made, fmt, shape[-1], result)
        assert same_bits(fake_quantize_scaled(weight, scale, fmt, result), expected)
    if shape != (1, 1):
        assert not torch.equal(fake_quantize_scaled(weight, scale, fmt), fake_quantize(weight, fmt))


def numbers_of(fmt):
    """All numbers of a format's grid, float64, sorted."""
    if isinstance(fmt, BlockFP8):
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        return codes[codes.isfinite()].unique()
    if isinstance(fmt, GroupInt):
        return torch.arange(-fmt.largest, fmt.largest + 1).double()
    half = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    return torch.cat([-half, half]).unique()


def straight_through(weight, scale, fmt):
    """w' in float64 by a table of all numbers; autograd differentiates what is not rounding."""
    rows, columns = block_of(fmt)
    n, k = weight.shape[-2:]
    spread = scale.repeat_interleave(rows, -2)[..., :n, :].repeat_interleave(columns, -1)[..., :k]
    numbers = numbers_of(fmt)
    quotient = weight / spread
    nearest = numbers[(quotient.detach()[..., None] - numbers).abs().argmin(-1)]
    through = quotient + (nearest - quotient).detach()
    beyond = 2 * numbers[-1] - numbers[-2]  # the number that would be next: half way to it, saturation begins
    inside = quotient.detach().abs() <= (numbers[-1] + beyond) / 2
    return torch.where(inside, through, nearest) * spread


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_weights_and_scales_are_those_of_a_float64_reference(fmt, shape):
    weight = random(*shape).requires_grad_()
    scale = scales_of(weight.detach(), fmt).requires_grad_()
    upstream = random(*shape, seed=2)
    value = fake_quantize_scaled(weight, scale, fmt)
    value.backward(upstream)
    exact = [each.detach().double().requires_grad_() for each in (weight, scale)]
    expected = straight_through(*exact, fmt)
    expected.backward(upstream.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(weight.grad.double(), exact[0].grad)
    size = upstream.double().square().sum().sqrt() * numbers_of(fmt)[-1]
    assert float((scale.grad.double() - exact[1].grad).abs().max() / size) < 1e-6
    if weight.numel() > 1:
        clipped = weight.grad == 0
        assert 0 < int(clipped.sum()) < weight.numel() / 2


@every_format
def test_gradients_with_own_scales_pass_unchanged_and_nothing_is_clipped(fmt):
    weight = random(256, 256).requires_grad_()
    upstream = random(256, 256, seed=2)
    fake_quantize(weight, fmt).backward(upstream)
    assert torch.equal(weight.grad, upstream)
    rows, columns = block_of(fmt)
    spread = rounded(weight, fmt)[1].float().repeat_interleave(rows, 0)[:256]
    quotient = (weight.detach() / spread.repeat_interleave(columns, 1)[:, :256]).abs()
    assert float(quotient.max()) <= clipping_limit(fmt)


@every_format
def test_over_a_long_way_the_value_moves_with_the_weight_until_it_clips(fmt):
    """Finite differences, over steps of many codes, of one value in a block whose scale stays."""
    scale, limit = torch.ones(1, 1), clipping_limit(fmt)
    largest = float(numbers_of(fmt)[-1])
    ends = torch.linspace(-2 * largest, 2 * largest, 4001)
    value = torch.cat([fake_quantize_scaled(end.view(1, 1), scale, fmt)[0] for end in ends])
    slope = (value[1:] - value[:-1]).sum() / (ends[-1] - ends[0])
    assert float(slope) == pytest.approx(0.5)  # of the way, half is within -L to L
    last = ends[value < largest].max()
    assert float(last) < limit
    gradients = []
    for end in (0.9 * largest, limit, limit * 1.01, -limit * 1.01):
        weight = torch.tensor([[end]], requires_grad=True)
        fake_quantize_scaled(weight, scale, fmt).backward(torch.ones(1, 1))
        gradients.append(float(weight.grad))
    assert gradients == [1, 1, 0, 0]


@every_format
def test_a_scale_that_saturates_everything_has_the_gradient_of_its_finite_difference(fmt):
    weight = torch.full((1, 8), 1000.0)
    scale = torch.ones(1, 1, requires_grad=True)
    value = fake_quantize_scaled(weight, scale, fmt)
    value.backward(torch.ones_like(value))
    moved = fake_quantize_scaled(weight, torch.full((1, 1), 1.25), fmt)
    assert float(scale.grad) == float((moved - value).sum()) / 0.25 == 8 * float(numbers_of(fmt)[-1])


@pytest.mark.parametrize("exponent", [-126, -20, 0, 3, 127])
def test_powers_of_two_stay_until_they_have_moved_by_half_an_octave(exponent):
    power = torch.tensor(2.0**exponent)
    for factor, expected in ((1.0, 1), (1.41, 1), (0.708, 1)):
        if exponent not in (-126, 127):
            assert float(storable(power * factor, BlockFP8(scale_fmt="ue8m0"))) == float(power) * expected
    if exponent < 127:
        assert float(storable(power * 1.42, MXFP4())) == 2.0 ** (exponent + 1)
    if exponent > -126:
        assert float(storable(power * 0.7, MXFP4())) == 2.0 ** (exponent - 1)
    assert float(storable(power, MXFP4())) == float(power)


def test_stored_scales_are_positive_and_pass_their_gradient():
    for fmt in (*FORMATS.values(),):
        scale = torch.tensor([0.3, 1e-45, -1.0, 7.7], requires_grad=True)
        made = storable(scale, fmt)
        made.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert bool((made >= 2.0**-126).all())
        assert scale.grad.tolist() == [1, 2, 3, 4]
        if not isinstance(fmt, BlockFP8):
            assert torch.equal(made, made.to(fmt.scale_dtype).float())


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_those_of_the_reference_and_pass_their_gradient(scale_fmt, dtype):
    x = random(2, 5, 200, dtype=dtype)
    x[0, 0] = 0
    x[0, 1] *= 1e-7  # below the floor of the amax
    x.requires_grad_()
    codes, scale = reference.quantize_activation(x, 128, scale_fmt)
    for result in (torch.float32, torch.bfloat16):
        made = fake_quantize_input(x, BlockFP8((64, 128), scale_fmt), result)
        assert same_bits(made.detach(), reference.dequantize_activation(codes, scale, 128, result))
    upstream = random(2, 5, 200, seed=3)
    fake_quantize_input(x, BlockFP8((1, 128), scale_fmt)).backward(upstream)
    assert torch.equal(x.grad, upstream.to(dtype))


def test_what_cannot_be_rounded_is_told():
    weight = torch.tensor([[1.0, float("nan")]])
    assert fake_quantize(weight, BlockFP8()).isnan().all()
    assert fake_quantize_scaled(weight, torch.ones(1, 1), GroupInt()).isnan().tolist() == [[False, True]]
    with pytest.raises(BlockscaleError, match=r"scale: wrong shape \(expected \[1, 2\], got \[1, 1\]\)"):
        fake_quantize_scaled(torch.ones(1, 130), torch.ones(1, 1), GroupInt())
