"""Formats below 8 bits: every backend against the reference, bit for bit."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockscale import ops, reference
from blockscale.errors import BlockscaleError, NonFiniteError
from blockscale.group_formats import MXFP4, NVFP4, GroupInt, group_scale_shape, packed_shape
from blockscale.ops import dispatch
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal, assert_quantized_equal
from tests.devices import DEVICES

# NumPy's, in Triton's interpreter, about Inf and NaN that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = (
    GroupInt(4, 128),
    GroupInt(4, 32, "ue8m0"),
    GroupInt(3, 64),
    GroupInt(3, 32, "ue8m0"),
    MXFP4(),
)
# Ragged groups, odd widths, less than a byte's worth, experts.
SHAPES = [(40, 576), (3, 37, 200), (9, 31), (5, 129), (2, 3, 1), (1, 8), (17, 95), (16, 160), (7, 97)]
SHAPES_AND_DTYPES = [(shape, DTYPES[number % 3]) for number, shape in enumerate(SHAPES)]
LARGE = (1100, 700)


def name_of(fmt):
    return f"{type(fmt).__name__}-{fmt.bits}x{fmt.group_size}-{getattr(fmt, 'scale_fmt', '')}"


@dataclass(frozen=True)
class Backend:
    name: str
    device: str

    def __call__(self, op, *tensors_and_more, **options):
        """Run `op` on this backend's device and bring the result back."""
        moved = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in tensors_and_more]
        result = op(*moved, backend=self.name, **options)
        return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()


_TRITON = [pytest.param(Backend("triton", each.values[0]), marks=each.marks) for each in DEVICES]


@pytest.fixture(
    params=[Backend("reference", "cpu"), Backend("numba", "cpu"), *_TRITON],
    ids=lambda backend: f"{backend.name}-{backend.device}",
)
def backend(request):
    if request.param.name == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(params=FORMATS, ids=name_of)
def fmt(request):
    return request.param


def both_ways(backend, x, fmt, dtypes=DTYPES):
    quantized = backend(ops.quantize_group, x, fmt)
    assert_quantized_equal(quantized, reference.quantize_group(x, fmt))
    for target in dtypes:
        got = backend(ops.dequantize_group, *quantized, fmt, x.shape[-1], target)
        assert_bitwise_equal(got, reference.dequantize_group(*quantized, fmt, x.shape[-1], target))


@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES, ids=str)
def test_weights_equal_the_reference_both_ways(backend, shape, dtype, fmt):
    both_ways(backend, data.wide_range(shape, dtype), fmt, (dtype,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maker", [data.denormals, data.huge, data.gaussian])
def test_weights_at_the_ends_of_the_range(backend, maker, dtype, fmt):
    both_ways(backend, maker((16, 160), dtype), fmt)


def test_zeros_of_both_signs_beside_other_groups(backend, fmt):
    x = data.zero_block((4, 300), (4, 128))
    both_ways(backend, x, fmt)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 300)),
    fmt=st.sampled_from([*FORMATS, GroupInt(4, 64), GroupInt(3, 128), GroupInt(3, 128, "ue8m0")]),
    dtype=st.sampled_from(DTYPES),
    maker=st.sampled_from([data.gaussian, data.wide_range, data.denormals, data.huge]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120)
def test_numba_equals_the_reference_on_any_weight(shape, fmt, dtype, maker, seed):
    both_ways(Backend("numba", "cpu"), maker(shape, dtype, seed=seed), fmt, (dtype,))


@pytest.mark.parametrize("exponent", [0x01, 0x03, 0x09, 0x7F, 0xFD, 0xFE])
def test_every_bf16_value_with_every_amax_mantissa(fmt, exponent):
    """Ties included: whether a value is one depends on the mantissas of the value and of the scale."""
    every = data.all_bf16()[: 127 << 7]  # positive, and then with both signs
    for mantissa in range(0, 128, 1 if exponent == 0x7F else 9):
        amax = torch.tensor([exponent << 7 | mantissa], dtype=torch.int32).to(torch.uint16)
        amax = amax.view(torch.bfloat16)
        # Of what is far below the scale, little: the rest is within ten binades.
        near = every[(every <= amax) & (every.float() >= amax.float() * 2.0**-10)]
        near = torch.cat([near, every[::97].minimum(amax), -near])
        rows = near[: near.numel() // 31 * 31].view(-1, 31)
        x = torch.cat([amax.expand(len(rows), 1), rows], dim=1)
        got = ops.quantize_group(x, fmt, backend="numba")
        assert_quantized_equal(got, reference.quantize_group(x, fmt))


def ties(fmt):
    """Every value halfway between two codes, and its neighbours, at scale 1: float32 (3, 2 * ties + 2)."""
    codes = torch.arange(8.0) if isinstance(fmt, GroupInt) else torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = codes[: fmt.largest + 1]
    middle = (codes[1:] + codes[:-1]) / 2
    rows = [middle, torch.nextafter(middle, torch.tensor(9.0)), torch.nextafter(middle, torch.tensor(0.0))]
    return torch.stack([torch.cat([row, -row, torch.tensor([1.0, -1.0]) * fmt.largest]) for row in rows])


@pytest.mark.parametrize("exponent", [-120, 0, 120])
def test_ties_go_to_the_even_code_and_their_neighbours_do_not(backend, fmt, exponent):
    both_ways(backend, ties(fmt) * 2.0**exponent, fmt)


@pytest.mark.parametrize("seed", range(2))
def test_float32_values_next_to_ties_of_any_scale(backend, fmt, seed):
    generator = torch.Generator().manual_seed(seed)
    amax = (1 + torch.rand((64, 1), generator=generator)) * fmt.largest
    scale = reference.quantize_group(amax, fmt)[1].float()
    middle = ties(fmt)[0, :-2] * scale
    x = torch.cat([amax, middle, torch.nextafter(middle, middle * 2), torch.nextafter(middle, middle * 0)], 1)
    both_ways(backend, x[:, :32].contiguous(), fmt)


@pytest.mark.parametrize(("width", "dtype"), [(128, DTYPES[0]), (45, DTYPES[1]), (37, DTYPES[2])], ids=str)
def test_every_code_with_every_kind_of_scale(backend, dtype, width, fmt):
    special = [1.0, 0.75, -3.0, 0.0, -0.0, 2.0**-126, 2.0**-127, 2.0**-149, 1e-39, 2.0**112, 2.0**119]
    special += [2.0**120, 3e38, math.inf, -math.inf, math.nan, -math.nan]
    shape = (len(special), width)
    packed = torch.arange(256, dtype=torch.uint8).repeat(40)[: math.prod(packed_shape(shape, fmt))]
    packed = packed.view(packed_shape(shape, fmt))
    scale = torch.tensor(special).unsqueeze(1).repeat(1, group_scale_shape(shape, fmt)[1])
    got = backend(ops.dequantize_group, packed, scale, fmt, width, dtype)
    assert_bitwise_equal(got, reference.dequantize_group(packed, scale, fmt, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 16, 45, 49, 7])
def test_nvfp4_is_read(backend, dtype, width):
    fmt = NVFP4()
    generator = torch.Generator().manual_seed(width)
    packed = torch.randint(0, 256, packed_shape((2, 6, width), fmt), generator=generator).to(torch.uint8)
    scale = torch.randn(group_scale_shape((2, 6, width), fmt), generator=generator).to(torch.float8_e4m3fn)
    multiplier = reference.nvfp4_scale(scale, torch.tensor([0.003, 1.7]), "modelopt")
    got = backend(ops.dequantize_group, packed, multiplier, fmt, width, dtype)
    assert_bitwise_equal(got, reference.dequantize_group(packed, multiplier, fmt, width, dtype))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 130, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_tensors(backend, shape, fmt):
    packed, scale = backend(ops.quantize_group, torch.empty(shape, dtype=torch.bfloat16), fmt)
    assert packed.shape == packed_shape(shape, fmt)
    assert scale.shape == group_scale_shape(shape, fmt)
    assert backend(ops.dequantize_group, packed, scale, fmt, shape[-1]).shape == shape


@pytest.mark.parametrize(("value", "dtype"), list(zip([math.nan, math.inf, -math.inf], DTYPES, strict=True)))
def test_a_non_finite_weight_is_refused_with_count_and_position(backend, dtype, value, fmt):
    x = data.gaussian((2, 40, 70), dtype)
    x[1, 39, 69], x[1, 3, 4] = value, math.nan
    with pytest.raises(NonFiniteError) as caught:
        backend(ops.quantize_group, x, fmt)
    assert (caught.value.count, caught.value.position) == (2, (1, 3, 4))


def test_a_flag_in_place_of_the_error(backend, fmt):
    x = data.gaussian((20, 40)).to(backend.device)
    flag = torch.full((1,), 7, dtype=torch.int32, device=backend.device)
    ops.quantize_group(x, fmt, flag=flag, backend=backend.name)
    assert flag.item() == 0
    x[19, 39] = math.inf
    ops.quantize_group(x, fmt, flag=flag, backend=backend.name)
    assert flag.item() == 1


@pytest.mark.parametrize("threads", [1, 2, 5, None])
@pytest.mark.parametrize("shape", [LARGE, (3, 400, 700)])
def test_the_number_of_threads_does_not_change_a_bit(shape, threads, fmt):
    x = data.wide_range(shape)
    got = ops.quantize_group(x, fmt, threads=threads, backend="numba")
    assert_quantized_equal(got, reference.quantize_group(x, fmt))
    back = ops.dequantize_group(*got, fmt, shape[-1], threads=threads, backend="numba")
    assert_bitwise_equal(back, reference.dequantize_group(*got, fmt, shape[-1]))


def test_the_reference_in_pieces(monkeypatch, fmt):
    monkeypatch.setattr(dispatch, "_REFERENCE_PIECE", 1000)
    both_ways(Backend("reference", "cpu"), data.wide_range((2, 30, 150)), fmt)


def test_strided_weights_and_codes(backend, fmt):
    wide = data.wide_range((9, 400)).to(backend.device)
    for x in (wide[:, 16:272], wide[::2, 1:130], wide[:, ::2], wide.t()):
        expected = reference.quantize_group(x.cpu().contiguous(), fmt)
        got = ops.quantize_group(x, fmt, backend=backend.name)
        assert_quantized_equal(tuple(part.cpu() for part in got), expected)
        packed, scale = (part.t().contiguous().t() for part in got)
        restored = ops.dequantize_group(packed, scale, fmt, x.shape[1], backend=backend.name)
        assert_bitwise_equal(restored.cpu(), reference.dequantize_group(*expected, fmt, x.shape[1]))


def test_outputs_are_written_in_place_and_nothing_else_is(backend, fmt):
    shape = (7, 45)
    x = data.gaussian(shape).to(backend.device)
    expected = reference.quantize_group(x.cpu(), fmt)
    size = expected[0].numel()
    memory = torch.full((size + 64,), 0x55, dtype=torch.uint8, device=backend.device)
    packed = memory[32:-32].view(expected[0].shape)
    scale = torch.zeros_like(expected[1], device=backend.device)
    got = ops.quantize_group(x, fmt, out=(packed, scale), backend=backend.name)
    assert got[0] is packed
    assert got[1] is scale
    assert_quantized_equal((packed.cpu(), scale.cpu()), expected)
    assert bool((memory[:32] == 0x55).all() and (memory[-32:] == 0x55).all())
    target = torch.full((9, 45), 5.0, device=backend.device)
    ops.dequantize_group(packed, scale, fmt, 45, torch.float32, out=target[1:8], backend=backend.name)
    assert_bitwise_equal(target[1:8].cpu(), reference.dequantize_group(*expected, fmt, 45, torch.float32))
    assert bool((target[0] == 5).all() and (target[8] == 5).all())


_PACKED = torch.zeros((4, 32), dtype=torch.uint8)
_BAD_CALLS = {
    "fmt: cannot quantize to this format .*NVFP4": lambda: ops.quantize_group(torch.zeros(4, 4), NVFP4()),
    "weight: bad dtype": lambda: ops.quantize_group(_PACKED, MXFP4()),
    "weight: wrong shape": lambda: ops.quantize_group(torch.zeros(4), MXFP4()),
    r"out\[1\]: unusable output": lambda: ops.quantize_group(
        torch.zeros(4, 64), MXFP4(), out=(_PACKED, torch.zeros(4, 2))
    ),
    "packed: bad dtype": lambda: ops.dequantize_group(_PACKED.view(torch.int8), _PACKED, MXFP4(), 64),
    "scale: bad dtype": lambda: ops.dequantize_group(_PACKED, _PACKED, MXFP4(), 64),
    r"packed: wrong shape \(expected \[4, 33\], got \[4, 32\]\)": lambda: ops.dequantize_group(
        _PACKED, torch.ones(4, 3), MXFP4(), 65
    ),
    r"scale: wrong shape \(expected \[4, 2\], got \[4, 3\]\)": lambda: ops.dequantize_group(
        _PACKED, torch.ones(4, 3), MXFP4(), 63
    ),
    "fmt: unknown format": lambda: ops.dequantize_group(_PACKED, torch.ones(4, 2), "mxfp4", 64),
    "unknown backend": lambda: ops.quantize_group(torch.zeros(4, 4), MXFP4(), backend="fast"),
}


@pytest.mark.parametrize("message", _BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(BlockscaleError, match=message):
        _BAD_CALLS[message]()


@pytest.mark.gpu
def test_a_weight_that_needs_64_bit_offsets(fmt):
    x = torch.randn((1 << 20, 2112), device="cuda", dtype=torch.bfloat16)
    packed, scale = ops.quantize_group(x, fmt)
    for rows in (slice(0, 100), slice(-100, None)):
        got = packed[rows].cpu(), scale[rows].cpu()
        assert_quantized_equal(got, reference.quantize_group(x[rows].cpu(), fmt))
    back = ops.dequantize_group(packed, scale, fmt, 2112)
    assert_bitwise_equal(
        back[-100:].cpu(), reference.dequantize_group(packed[-100:].cpu(), scale[-100:].cpu(), fmt, 2112)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_random_values_on_the_gpu(seed, dtype, fmt):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = (torch.rand((4096, 4096), generator=generator, device="cuda") * 2 - 1).to(dtype)
    got = ops.quantize_group(x, fmt)
    assert_quantized_equal(got, reference.quantize_group(x, fmt))
    assert_bitwise_equal(
        ops.dequantize_group(*got, fmt, 4096, dtype), reference.dequantize_group(*got, fmt, 4096, dtype)
    )
