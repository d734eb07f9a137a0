import pytest
import torch

from blockscale import reference
from blockscale.calibrate.formats import plain_points, values_of_points
from blockscale.calibrate.hessian import (
    DAMPING,
    Moments,
    add_tokens,
    damped,
    no_moments,
    output_error,
    target_weight,
)
from blockscale.calibrate.rounding import Search, _rescaled, inverse_factor, round_weight
from blockscale.checkpoint.rounded import QuantizedFormat
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.formats import BlockFP8, ScaleFmt
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.group_spelling import spell_group_format

FORMATS = [BlockFP8((128, 128), "float32"), BlockFP8((128, 128), "ue8m0"), BlockFP8((32, 48), "float32")]
LOW = [GroupInt(), GroupInt(4, 64, "ue8m0"), GroupInt(3, 32), MXFP4()]


def spelled(fmt: QuantizedFormat) -> str:
    return f"{fmt.block_size[0]}-{fmt.scale_fmt}" if isinstance(fmt, BlockFP8) else spell_group_format(fmt)


formats = pytest.mark.parametrize("fmt", [*FORMATS, *LOW], ids=spelled)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, strength: float, scale_fmt: ScaleFmt | str = "float32") -> Moments:
    """Moments of inputs whose directions have variances that fall by 10^-strength."""
    scale_fmt = "ue8m0" if scale_fmt == "ue8m0" else "float32"
    directions, _ = torch.linalg.qr(gaussian(width, width, seed=1))
    x = gaussian(2 * width + 50, width, seed=2) * torch.logspace(0, -strength, width) @ directions
    scaled = reference.quantize_activation(x, 128, scale_fmt)
    return add_tokens(no_moments(width), x, reference.dequantize_activation(*scaled, dtype=torch.float32))


def white(width: int) -> Moments:
    return Moments(torch.eye(width), torch.eye(width), width)


Pair = tuple[torch.Tensor, torch.Tensor]


def values(rounded: Pair, fmt: QuantizedFormat, width: int) -> torch.Tensor:
    if isinstance(fmt, BlockFP8):
        return reference.dequantize_weight(*rounded, fmt.block_size, torch.float32)
    return reference.dequantize_group(*rounded, fmt, width, torch.float32)


def error(rounded: Pair, weight: torch.Tensor, moments: Moments, fmt: QuantizedFormat):
    """Of every row, in the norm that the rounding minimizes."""
    wanted = target_weight(weight, moments)
    return output_error(wanted - values(rounded, fmt, weight.shape[1]), damped(moments, DAMPING))


def plain(weight: torch.Tensor, fmt: QuantizedFormat) -> Pair:
    if isinstance(fmt, BlockFP8):
        return reference.quantize_weight(weight, fmt.block_size, fmt.scale_fmt)
    return reference.quantize_group(weight, fmt)


@formats
@pytest.mark.parametrize("shape", [(256, 256), (200, 300), (1, 130), (130, 1)])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_identity_moments_without_search_are_plain_rounding_bitwise(
    fmt: QuantizedFormat, shape: tuple[int, int], sweeps: int
):
    if fmt.scale_fmt == "bf16":
        sweeps = 0  # scales of groups are made better before a sweep
    weight = (gaussian(*shape) * 0.05).bfloat16()
    codes, scale = round_weight(weight, white(shape[1]), fmt, Search(factors=(1.0,), sweeps=sweeps))
    plain_codes, plain_scale = plain(weight, fmt)
    assert torch.equal(codes.view(torch.uint8), plain_codes.view(torch.uint8))
    assert torch.equal(scale, plain_scale)


@formats
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_never_worse_than_plain_and_far_better_on_correlated_inputs(fmt: QuantizedFormat, strength: float):
    weight, moments = gaussian(160, 320), correlated(320, strength, fmt.scale_fmt)
    ours = error(round_weight(weight, moments, fmt), weight, moments, fmt).sum()
    theirs = error(plain(weight, fmt), weight, moments, fmt).sum()
    assert ours <= theirs
    if strength >= 1.0:
        assert ours < 0.5 * theirs


def test_no_row_of_blocks_is_worse_than_plain_rounding():
    fmt, weight, moments = BlockFP8((1, 64)), gaussian(400, 64), correlated(64, 0.1)
    rounded = round_weight(weight, moments, fmt, Search(factors=(1.0,), sweeps=0))
    ours, theirs = (error(each, weight, moments, fmt) for each in (rounded, plain(weight, fmt)))
    assert bool((ours <= theirs).all())
    assert bool((ours == theirs).any())  # and where the columns went wrong, plain rounding was taken
    assert ours.sum() < theirs.sum()


def test_columns_make_up_for_those_of_blocks_before_them():
    fmt, weight, moments = BlockFP8((128, 1)), gaussian(128, 64), correlated(64, 1.0)
    rounded = round_weight(weight, moments, fmt, Search(factors=(1.0,), sweeps=0))
    ours, theirs = (error(each, weight, moments, fmt).sum() for each in (rounded, plain(weight, fmt)))
    assert ours < 0.6 * theirs


def test_sweeps_only_lower_the_error():
    fmt, weight, moments = FORMATS[0], gaussian(100, 300), correlated(300, 1.0)
    errors = [
        float(error(round_weight(weight, moments, fmt, Search(sweeps=n)), weight, moments, fmt).sum())
        for n in range(4)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]


@pytest.mark.parametrize("fmt", LOW, ids=spelled)
def test_searching_scales_lowers_the_error_of_few_bits(fmt: QuantizedFormat):
    weight, moments = gaussian(64, 256), correlated(256, 1.0)
    fixed, searched = (
        float(error(round_weight(weight, moments, fmt, search), weight, moments, fmt).sum())
        for search in (Search(factors=(1.0,), sweeps=0), Search(sweeps=0))
    )
    assert searched < fixed


def test_scales_of_groups_become_better_before_each_sweep_and_stay_bf16():
    fmt, weight, moments = GroupInt(4, 64), gaussian(50, 200), correlated(200, 1.0)
    norm, target = damped(moments, DAMPING), target_weight(weight, moments)
    points = plain_points(weight, fmt)
    better = _rescaled(target, norm, points, fmt)
    assert torch.equal(better.codes, points.codes)
    assert torch.equal(better.scale, better.scale.bfloat16().float())
    before, after = (output_error(target - values_of_points(each, fmt), norm) for each in (points, better))
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.97 * float(before.sum())
    # No other scale of a single group, the rest as it is, is better than what was found.
    for factor in (0.99, 1.01):
        other = better.scale.clone()
        other[:, 1] *= factor
        moved = output_error(target - values_of_points(better._replace(scale=other), fmt), norm)
        assert float(moved.sum()) > float(after.sum())


def test_searching_scales_lowers_the_error_of_float32_scales():
    fmt, weight, moments = FORMATS[0], gaussian(256, 256), correlated(256, 1.0)
    fixed, searched = (
        float(error(round_weight(weight, moments, fmt, search), weight, moments, fmt).sum())
        for search in (Search(factors=(1.0,), sweeps=0), Search(sweeps=0))
    )
    assert searched < fixed


@formats
def test_ragged_weights_have_the_layout_of_the_reference(fmt: QuantizedFormat):
    weight, moments = gaussian(576, 200).bfloat16(), correlated(200, 1.0, fmt.scale_fmt)
    codes, scale = round_weight(weight, moments, fmt)
    plain_codes, plain_scale = plain(weight, fmt)
    assert (codes.dtype, codes.shape, codes.stride()) == (
        plain_codes.dtype,
        plain_codes.shape,
        plain_codes.stride(),
    )
    assert (scale.dtype, scale.shape, scale.stride()) == (
        plain_scale.dtype,
        plain_scale.shape,
        plain_scale.stride(),
    )
    assert bool(codes.float().isfinite().all())
    assert bool((scale.float() > 0).all())
    if fmt.scale_fmt == "ue8m0":
        assert bool(reference.is_power_of_two(scale.float()).all())


@formats
def test_zero_weight_has_zero_codes_and_scales_of_one(fmt: QuantizedFormat):
    codes, scale = round_weight(torch.zeros(140, 150), correlated(150, 1.0, fmt.scale_fmt), fmt)
    assert not codes.float().any()
    assert bool((scale.float() == 1).all())


@formats
def test_zero_blocks_beside_others_are_served_too(fmt: QuantizedFormat):
    weight = gaussian(256, 256)
    weight[:128, 128:] = 0
    moments = correlated(256, 1.0, fmt.scale_fmt)
    rounded = round_weight(weight, moments, fmt)
    ours, theirs = (error(each, weight, moments, fmt)[:128].sum() for each in (rounded, plain(weight, fmt)))
    assert ours < theirs


def test_dead_inputs_are_rounded_plainly_and_do_not_disturb_others():
    fmt, weight, moments = FORMATS[0], gaussian(64, 128), correlated(128, 1.0)
    moments.second[:, 5] = moments.second[5] = moments.cross[:, 5] = moments.cross[5] = 0
    codes, scale = round_weight(weight, moments, fmt)
    expected = (weight[:, 5] / scale[0, 0]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes[:, 5].float(), expected.float())


def test_singular_moments_work():
    x = gaussian(500, 3) @ gaussian(3, 192, seed=3)  # three directions of 192
    weight, fmt = gaussian(64, 192), FORMATS[0]
    moments = add_tokens(no_moments(192), x, x)
    rounded = round_weight(weight, moments, fmt, Search(damping=0.01))
    ours, theirs = (
        ((weight - values(each, fmt, 192)) @ x.T).square().sum() for each in (rounded, plain(weight, fmt))
    )
    assert ours < 0.1 * theirs


def test_tiny_and_huge_weights_keep_finite_positive_scales():
    moments = correlated(128, 1.0)
    for size in (1e-38, 1e-30, 1e30):
        codes, scale = round_weight(gaussian(128, 128) * size, moments, FORMATS[0])
        assert bool(codes.float().isfinite().all())
        assert bool((scale >= 2.0**-126).all())
        assert bool(scale.isfinite().all())


def test_inverse_factor_is_the_upper_factor_of_the_inverse():
    norm = correlated(96, 1.0).second + torch.eye(96)
    upper = inverse_factor(norm)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ norm, torch.eye(96), rtol=0, atol=1e-3)


def test_inverse_factor_falls_back_to_float64_and_refuses_what_is_indefinite():
    rows = torch.stack([torch.arange(64.0) * 7 % 17 - 8, torch.arange(64.0) * 5 % 17 - 8])
    norm = 2.0**16 * rows.T @ rows + torch.eye(64)  # exact in float32, which its factors are not
    assert bool(torch.linalg.cholesky_ex(norm.flip(0, 1))[1])  # float32 alone does not do
    assert bool(inverse_factor(norm).isfinite().all())
    with pytest.raises(BlockscaleError, match="positive definite"):
        inverse_factor(-torch.eye(8))


def test_too_few_tokens_are_refused():
    moments = Moments(torch.eye(64), torch.eye(64), 63)
    with pytest.raises(BlockscaleError, match=r"too few calibration tokens.*64.*63"):
        round_weight(gaussian(8, 64), moments, FORMATS[0])


def test_bad_weights_moments_and_factors_are_refused():
    with pytest.raises(BlockscaleError, match="wrong shape"):
        round_weight(gaussian(2, 8, 8), white(8), FORMATS[0])
    with pytest.raises(BlockscaleError, match="wrong width"):
        round_weight(gaussian(8, 9), white(8), FORMATS[0])
    with pytest.raises(NonFiniteError):
        round_weight(gaussian(8, 8) / 0, white(8), FORMATS[0])
    with pytest.raises(BlockscaleError, match="powers of two"):
        round_weight(gaussian(8, 8), white(8), FORMATS[1], Search(factors=(1.0, 1.5)))
    with pytest.raises(BlockscaleError, match="first of them 1"):
        round_weight(gaussian(8, 8), white(8), FORMATS[0], Search(factors=(1.5,)))
