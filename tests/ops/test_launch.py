"""Quick launches of Triton kernels: a compiled kernel is used only where Triton would, with all arguments."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton.language as tl
from triton import JITFunction
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

from blockscale.ops._triton.launch import QuickKernel, sorted_out

_BYTES = torch.zeros(256, dtype=torch.uint8)


def _tensor(dtype, offset):
    first = -_BYTES.data_ptr() % 64 + offset * dtype.itemsize
    return _BYTES[first : first + 2 * dtype.itemsize].view(dtype)


VALUES = st.one_of(
    st.integers(-(1 << 40), 1 << 40),
    st.sampled_from([0, 1, 15, 16, 17, -16, 1 << 31, (1 << 31) - 1, -(1 << 31), -(1 << 31) - 1]),
    st.booleans(),
    st.none(),
    st.floats(),
    st.builds(
        _tensor,
        st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]),
        st.integers(0, 17),
    ),
)


@given(st.lists(VALUES, min_size=10, max_size=40))
def test_arguments_of_one_sort_are_one_specialization(some):
    specializations = {}
    for value in some:
        specialization = native_specialize_impl(CUDABackend, value, False, True, True)
        sort = tuple(sorted_out([value])[0])
        assert specializations.setdefault(sort, specialization) == specialization


class Compiled:
    """Stands for a compiled kernel: remembers what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *values, stream: self.launches.append((grid, values, stream))


class Jit(JITFunction):
    """Compiles nothing, and remembers for what it was to."""

    def __init__(self, fn):
        super().__init__(fn)
        self.made = []

    def run(self, *values, grid, warmup, **options):
        self.made.append((values, options))
        self.compiled = Compiled()
        return self.compiled


def _add(x_ptr, count, factor, BLOCK: tl.constexpr, WIDE: tl.constexpr = False):
    pass


@pytest.fixture
def jit(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77 + device, raising=False)
    return Jit(_add)


def test_what_is_known_is_launched_with_all_parameters(jit):
    kernel, x = QuickKernel(jit), torch.zeros(4)
    kernel[(3,)](x, 5, 0.5, BLOCK=8, num_warps=2)
    assert jit.compiled.launches == [], "the first launch is Triton's own"
    kernel[(4, 2)](x, 7, 0.25, BLOCK=8, num_warps=2)
    assert len(jit.made) == 1
    assert jit.compiled.launches == [((4, 2, 1), (x.data_ptr(), 7, 0.25, 8, False), 77)]


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ((torch.zeros(4), 16, 0.5), {"BLOCK": 8}),
        ((torch.zeros(4), 1, 0.5), {"BLOCK": 8}),
        ((torch.zeros(4), 1 << 33, 0.5), {"BLOCK": 8}),
        ((torch.zeros(4, dtype=torch.int32), 5, 0.5), {"BLOCK": 8}),
        ((torch.zeros(5)[1:], 5, 0.5), {"BLOCK": 8}),
        ((torch.zeros(4), 5, 0.5), {"BLOCK": 16}),
        ((torch.zeros(4), 5, 0.5), {"BLOCK": 8, "WIDE": True}),
        ((torch.zeros(4), 5, 0.5), {"BLOCK": 8, "num_warps": 2}),
    ],
)
def test_another_sort_is_compiled_again(jit, values, options):
    kernel = QuickKernel(jit)
    kernel[(3,)](torch.zeros(4), 5, 0.5, BLOCK=8)
    kernel[(3,)](*values, **options)
    assert len(jit.made) == 2


def test_another_device_is_compiled_for_again(jit, monkeypatch):
    kernel, x = QuickKernel(jit), torch.zeros(4)
    kernel[(3,)](x, 5, 0.5, BLOCK=8)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    kernel[(3,)](x, 5, 0.5, BLOCK=8)
    assert len(jit.made) == 2
