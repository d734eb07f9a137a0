"""Latent attention on Triton against the reference: compiled on a GPU, interpreted without."""

from dataclasses import replace

import pytest
import torch

from blockscale.errors import BlockscaleError
from blockscale.ops import mla_decode, mla_prefill, mla_prefill_quantize, mla_prologue
from blockscale.reference import attention, quantize_activation
from blockscale.reference.attention import CacheSlots, RotaryTable, Spans
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "nope", "rope", "value"), [(2, 128, 64, 128), (3, 12, 8, 20), (1, 64, 32, 64)]
)
@pytest.mark.parametrize(
    "spans",
    [
        [(0, 0, 1)],
        [(1, 0, 150)],
        [(0, 0, 128), (2, 0, 3), (1, 70, 200)],
        [(2, 63, 1), (0, 64, 64), (1, 200, 129)],
    ],
)
def test_prefill_attends_up_to_every_position(device, spans, heads, nope, rope, value, dtype):
    new, seen = sum(span[2] for span in spans), sum(span[1] + span[2] for span in spans)
    query = gaussian(new, heads, nope + rope).to(dtype)
    expanded = gaussian(seen, heads, nope + value, seed=1).to(dtype)
    cache = gaussian(3, 400, 16 + rope, seed=2).to(dtype)
    # What no query of a sequence may see is as far from the rest as can be.
    for row, before, count in spans:
        cache[row, before + count :] = torch.nan
    results = []
    for where, backend in (("cpu", "reference"), (device, "triton")):
        wide = torch.full((new, heads + 1, nope + rope + 3), torch.nan, dtype=dtype, device=where)
        wide[:, :heads, : nope + rope] = query.to(where)
        at = slots([], [], cache, 16, where)
        results.append(
            mla_prefill(
                wide[:, :heads, : nope + rope],
                expanded.to(where),
                at,
                Spans(spans, torch.device(where)),
                0.11,
                backend=backend,
            )
        )
    exact = attention.mla_prefill(
        query.double(),
        expanded.double(),
        slots([], [], cache.double(), 16),
        Spans(spans, torch.device("cpu")),
        0.11,
    )
    error = [(each.cpu().double() - exact).abs().max().item() for each in results]
    assert error[1] < 1.5 * error[0] + 1e-3


def test_blocks_that_see_the_most_come_first():
    blocks = Spans([(4, 0, 130), (2, 300, 20)], torch.device("cpu")).blocks
    assert blocks.tolist() == [[130, 20, 130, 300, 2], [128, 2, 0, 128, 4], [0, 128, 0, 0, 4]]


def test_prefill_refuses_shapes_that_do_not_fit():
    cache = slots([], [], torch.zeros(1, 8, 24, dtype=torch.bfloat16), 16)
    query, expanded = torch.zeros(4, 2, 20).bfloat16(), torch.zeros(5, 2, 30).bfloat16()
    spans = Spans([(0, 1, 4)], torch.device("cpu"))
    assert mla_prefill(query, expanded, cache, spans, 1.0).shape == (4, 2, 18)
    with pytest.raises(BlockscaleError, match="expanded"):
        mla_prefill(query, expanded[:4], cache, spans, 1.0)
    with pytest.raises(BlockscaleError, match="query"):
        mla_prefill(query[:3], expanded, cache, spans, 1.0)
    with pytest.raises(BlockscaleError, match="query"):
        mla_prefill(query[..., :8], expanded, cache, spans, 1.0)


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize(("heads", "value"), [(3, 128), (4, 64)])  # a head is a group, or half of one
def test_prefill_is_quantized_as_it_is_rounded(device, heads, value, scale_fmt):
    spans = Spans([(1, 0, 150), (0, 5, 3)], torch.device(device))
    query = gaussian(153, heads, 96).bfloat16().to(device)
    expanded = gaussian(158, heads, 64 + value, seed=1).bfloat16().to(device)
    cache = slots([], [], gaussian(2, 160, 48, seed=2).bfloat16(), 16, device)
    for backend in ("reference", "triton"):
        arguments = query, expanded, cache, spans, 0.1
        plain = mla_prefill(*arguments, backend=backend)
        expected = quantize_activation(plain.flatten(1), 128, scale_fmt)
        codes, scale = mla_prefill_quantize(*arguments, scale_fmt, backend=backend)
        assert_bitwise_equal(codes, expected[0])
        assert_bitwise_equal(scale, expected[1])
        assert scale.stride(0) == 1, "not what GEMMs read fastest"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("latent", [24, 192, 512])
def test_prologue_quantizes_what_it_caches(device, latent, fp8, scale_fmt, dtype):
    angles = 6 * torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for where, backend in (("cpu", "reference"), (device, "triton")):
        table = RotaryTable(angles.cos().to(where), angles.sin().to(where), False)
        cache = slots([0, 1, 1], [3, 0, 9], torch.zeros(2, 16, latent + 8, dtype=dtype), latent, where, fp8)
        query, compressed = (
            gaussian(3, 2, 20).to(where, dtype),
            gaussian(3, latent + 8, seed=2).to(where, dtype),
        )
        norm = gaussian(latent, seed=3).to(where, dtype)
        quantized = mla_prologue(query, compressed, norm, 1e-6, table, cache, scale_fmt, backend=backend)
        results.append((*quantized, cache.latents.view(torch.uint8), cache.keys))
        if not fp8:
            cached = cache.latents[cache.rows, cache.positions]
            for got, expected in zip(quantized, quantize_activation(cached, 128, scale_fmt), strict=True):
                assert_bitwise_equal(got, expected)
    for expected, got in zip(*results, strict=True):
        assert_bitwise_equal(got.cpu(), expected)
