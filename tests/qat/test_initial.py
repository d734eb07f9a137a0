"""Master weights that round to given codes, near to other weights."""

import pytest

from blockscale.calibrate.formats import Rounding, block_of, grid_of, values_of
from blockscale.qat.fake_quant import round_scaled
from blockscale.qat.initial import Beginning, nearest_master
from blockscale.reference.fp8 import spread_scale
from blockscale.reference.rounding import to_grid
from tests.qat.test_fake_quant import every_format, random, rounded, same_bits


@every_format
@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0], ids=lambda noise: f"{noise} steps")
def test_masters_have_the_codes_and_are_as_near_as_these_allow(fmt, noise):
    own = random(160, 192)
    own[:, ::9] *= 1e-4  # zeros of both signs
    other = own + noise * random(160, 192, seed=1) * own.abs().mean() * 0.1
    codes, scale = rounded(other, fmt)
    values = values_of(Rounding(codes, scale), fmt, 192)
    master = nearest_master(own, Beginning(values, scale.float()), fmt)
    assert same_bits(round_scaled(master, scale.float(), fmt).codes, codes)
    assert bool(((master - own).abs() <= (values - own).abs()).all())
    assert float((master - own).norm()) < (0.98 if noise else 0.5) * float((values - own).norm())
    # A tenth of a step further no code has changed but where numbers below are closer, or at zero.
    spread = spread_scale(scale.float(), block_of(fmt), own.shape)
    further = to_grid((master + 0.05 * (master - values)) / spread, grid_of(fmt)) * spread
    assert float((further != values).float().mean()) < 0.02
