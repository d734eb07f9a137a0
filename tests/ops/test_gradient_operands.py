"""What FP8 products of training take beside the exporter's codes: codes of gradients, and transposed ones."""

import pytest
import torch

from blockscale import ops, reference
from blockscale.errors import BlockscaleError
from blockscale.reference.fp8 import GRADIENT_AMAX_FLOOR
from blockscale.testing.asserts import assert_bitwise_equal, assert_quantized_equal

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter


@pytest.fixture(
    params=[
        ("auto", "cpu"),
        ("reference", "cpu"),
        pytest.param(("triton", "cpu"), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on GPU")),
        pytest.param(("auto", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def backend(request):
    if request.param[0] == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_gradients_far_below_the_floor_of_activations_keep_their_codes(backend, scale_fmt, dtype):
    x = torch.randn(24, 300, generator=torch.Generator().manual_seed(0))
    sizes = torch.exp2(-torch.arange(0, 96, 4).float())  # through the floor of gradients
    x = (x * sizes[:, None]).to(dtype)
    x[3, :128] = 0
    wanted = reference.quantize_activation(x, 128, scale_fmt, "column", GRADIENT_AMAX_FLOOR)
    found = ops.quantize_activation(
        x.to(backend[1]), 128, scale_fmt, "column", amax_floor=GRADIENT_AMAX_FLOOR, backend=backend[0]
    )
    assert_quantized_equal([each.cpu() for each in found], wanted)
    # The codes of 2**-8 x are those of x, down to the floor; those of activations are not.
    assert torch.equal(wanted[0].view(torch.uint8)[12] != 0, x[12] != 0)
    coarse = reference.quantize_activation(x, 128, scale_fmt)[0]
    assert int((coarse[12].view(torch.uint8) & 0x7F).count_nonzero()) == 0


def test_a_floor_that_scales_cannot_have_is_refused():
    for floor in (0.0, 2.0**-54, 2.0, float("nan")):
        with pytest.raises(BlockscaleError, match="amax_floor"):
            ops.quantize_activation(torch.ones(1, 128), amax_floor=floor)


@pytest.mark.parametrize("shape", [(128, 256), (130, 40), (1, 300), (0, 5)], ids=str)
def test_codes_are_transposed(backend, shape):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    found = ops.transpose_codes(codes.to(backend[1]), backend=backend[0]).cpu()
    assert found.is_contiguous()
    assert_bitwise_equal(found, codes.t().contiguous())
    assert_bitwise_equal(ops.transpose_codes(found.t().to(backend[1]), backend=backend[0]).cpu(), found)


def test_codes_and_scales_of_a_transposed_weight_are_the_transposed_ones():
    weight = torch.randn(200, 330, generator=torch.Generator().manual_seed(1))
    codes, scale = ops.quantize_weight(weight)
    across = ops.quantize_weight(weight.t().contiguous())
    assert_quantized_equal((ops.transpose_codes(codes), scale.t().contiguous()), across)


def test_what_is_no_matrix_of_codes_is_refused():
    with pytest.raises(BlockscaleError, match="codes: bad dtype"):
        ops.transpose_codes(torch.ones(2, 2))
    with pytest.raises(BlockscaleError, match="codes: wrong shape"):
        ops.transpose_codes(torch.ones(2, 2, 2).to(torch.float8_e4m3fn))
