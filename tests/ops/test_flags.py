"""Where a flag takes the place of the error about NaN and Inf, results are the same and nothing waits."""

import math

import pytest
import torch

from blockscale import ops, reference
from blockscale.errors import BlockscaleError
from blockscale.testing import data
from blockscale.testing.asserts import assert_quantized_equal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NOT_HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these kernels")


@pytest.fixture(
    params=[
        ("reference", "cpu"),
        ("numba", "cpu"),
        pytest.param(("triton", "cpu"), marks=NOT_HERE),
        pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
        pytest.param(("reference", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def backend(request):
    if request.param[0] == "triton":
        pytest.importorskip("triton")
    return request.param


def _flag(device):
    return torch.full((1,), -7, dtype=torch.int32, device=device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("value", [1.0, math.nan, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizing_a_weight(backend, dtype, value):
    name, device = backend
    x = data.gaussian((3, 50, 70), dtype)
    x[2, 49, 69] = value
    flag = _flag(device)
    codes, scale = ops.quantize_weight(x.to(device), (32, 32), flag=flag, backend=name)
    assert flag.tolist() == [int(value != 1.0)]
    if value == 1.0:
        assert_quantized_equal((codes.cpu(), scale.cpu()), reference.quantize_weight(x, (32, 32)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_looking_for_nonfinite_values(backend, dtype, count):
    name, device = backend
    x = data.gaussian((3, 7000), torch.float32)
    x.view(-1)[[20999, 15000, 9999][:count]] = math.nan
    flag = _flag(device)
    ops.flag_nonfinite(x.to(dtype).to(device), flag, backend=name)
    assert flag.tolist() == [int(count > 0)]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_tensors_lower_the_flag(backend, shape):
    name, device = backend
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    for flag, op in ((_flag(device), ops.quantize_weight), (_flag(device), ops.flag_nonfinite)):
        op(x, flag=flag, backend=name)
        assert flag.tolist() == [0]


@pytest.mark.parametrize("flag", [torch.zeros(1), torch.zeros(2, dtype=torch.int32)])
def test_an_unusable_flag_is_refused(flag):
    x = torch.ones(4, 4)
    for op in (ops.quantize_weight, ops.flag_nonfinite):
        line = rf"^{op.__name__}: flag: unusable output \(expected contiguous torch.int32 \[1\] on cpu"
        with pytest.raises(BlockscaleError, match=line):
            op(x, flag=flag)


@pytest.mark.gpu
def test_on_a_gpu_the_host_waits_for_nothing():
    x, flag = data.gaussian((256, 512)).cuda(), _flag("cuda")
    ops.flag_nonfinite(x, flag)  # compiles
    ops.dequantize_weight(*ops.quantize_weight(x, flag=flag))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.flag_nonfinite(x, flag)
        codes, scale = ops.quantize_weight(x, flag=flag)
        ops.dequantize_weight(codes, scale)
        with pytest.raises(RuntimeError, match="synchroniz"):
            ops.quantize_weight(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
