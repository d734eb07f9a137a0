"""Latent attention on Triton against the reference: compiled on a GPU, interpreted without."""

from dataclasses import replace

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.ops import mla_decode, mla_prologue
from blockscale.reference import attention, quantize_activation
from blockscale.reference.attention import CacheSlots, RotaryTable
from blockscale.testing.asserts import assert_bitwise_equal
from tests.devices import DEVICES, on

pytest.importorskip("triton")
# NumPy's, in the interpreter, about logarithms of empty shares.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slots(rows, positions, cache, latent, device="cpu", fp8=False):
    """A cache of [latent, key] rows, its latents in FP8 on request."""
    latents, keys = (part.contiguous() for part in cache.split([latent, cache.shape[-1] - latent], -1))
    scales = None
    if fp8:
        latents, scales = quantize_activation(latents, latent)
        scales = scales[..., 0].to(device)
    places = (torch.tensor(each, device=device) for each in (rows, positions))
    return CacheSlots(latents.to(device), keys.to(device), scales, *places)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "nope", "rope", "latent"), [(3, 12, 8, 24), (16, 128, 64, 512), (5, 4, 6, 17)]
)
def test_prologue_turns_queries_and_fills_the_cache(
    device, dtype, interleaved, fp8, heads, nope, rope, latent
):
    angles = 6 * torch.rand(40, rope // 2, generator=torch.Generator().manual_seed(1))
    table = RotaryTable(angles.cos(), angles.sin(), interleaved)
    width = heads * (nope + rope)
    projected = gaussian(5, width + 3).to(dtype)  # queries are a part of wider rows
    compressed, norm = gaussian(5, latent + rope, seed=2).to(dtype), gaussian(latent, seed=3).to(dtype)
    rows, positions = [0, 1, 1, 2, 0], [3, 0, 1, 9, 4]
    results = []
    for where, options in (("cpu", {"backend": "reference"}), (device, {"backend": "triton"})):
        query, cache = projected.clone().to(where), torch.zeros(3, 16, latent + rope, dtype=dtype)
        at = slots(rows, positions, cache, latent, where, fp8)
        moved = RotaryTable(table.cos.to(where), table.sin.to(where), interleaved)
        heads_of = query[:, :width].view(5, heads, -1)
        mla_prologue(heads_of, *on(where, compressed, norm), 1e-6, moved, at, **options)
        results.append(on("cpu", query, at.keys, at.latents, *([] if at.scales is None else [at.scales])))
    assert results[0][1][2, 9].abs().max() > 0.1
    assert results[0][2][2, 9].float().abs().max() > 0.1
    for name, expected, got in zip(("query", "keys", "latents", "scales"), *results, strict=False):
        assert_bitwise_equal(got, expected, name)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("longest", [40, 700])  # one share of a sequence, and several
@pytest.mark.parametrize(("heads", "latent", "rope"), [(5, 24, 8), (16, 512, 64), (70, 64, 16)])
def test_decode_attends_up_to_its_own_position(device, longest, fp8, heads, latent, rope):
    cache = gaussian(4, longest, latent + rope).bfloat16()
    query, turned = gaussian(3, heads, latent, seed=1).bfloat16(), gaussian(3, heads, rope, seed=2).bfloat16()
    rows, positions, scale = [2, 0, 3], [0, longest - 1, longest // 3], (latent + rope) ** -0.5
    at = slots(rows, positions, cache, latent, fp8=fp8)
    wide = replace(at, keys=at.keys.float(), latents=at.latents if fp8 else at.latents.float())
    exact = attention.mla_decode(query.float(), turned.float(), wide, scale, longest)
    at = slots(rows, positions, cache, latent, device, fp8)
    got = mla_decode(query.to(device), turned.to(device), at, scale, longest, backend="triton")
    # The weights and the result are rounded to BF16.
    torch.testing.assert_close(got.cpu().float(), exact, rtol=2**-7, atol=2**-7)


def test_what_is_cached_past_a_position_does_not_matter(device):
    cache = gaussian(1, 256, 80).bfloat16()
    query, turned = gaussian(1, 4, 64).bfloat16().to(device), gaussian(1, 4, 16).bfloat16().to(device)
    spoilt = cache.clone()
    spoilt[:, 100:] = torch.nan
    got = [
        mla_decode(query, turned, slots([0], [99], each, 64, device), 0.1, 256, backend="triton")
        for each in (cache, spoilt)
    ]
    assert_bitwise_equal(got[0].cpu(), got[1].cpu(), "with and without what follows")


def test_float32_is_not_computed_in_tf32():
    query, turned = gaussian(1, 4, 64), gaussian(1, 4, 16)
    at = slots([0], [30], gaussian(1, 32, 80, seed=1), 64)
    expected = attention.mla_decode(query, turned, at, 0.1, 32)
    assert_bitwise_equal(mla_decode(query, turned, at, 0.1, 32), expected, "float32")


def test_widths_that_do_not_fit_are_refused():
    at = slots([0], [0], torch.zeros(1, 4, 80), 64)
    with pytest.raises(BlockscaleError, match="expected 80, as the cache, got 96"):
        mla_decode(torch.zeros(1, 2, 80), torch.zeros(1, 2, 16), at, 0.1, 4)
