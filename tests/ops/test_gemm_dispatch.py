"""The public GEMMs: which backend runs, the same result from each, torch.compile, CUDA graphs."""

import types

import pytest
import torch
from torch import library

from blockscale import ops, reference
from blockscale.errors import BlockscaleError
from blockscale.metrics import calc_diff
from blockscale.ops import gemm_dispatch, tuning_table
from blockscale.ops._cuda.configs import FewTile
from blockscale.ops.tuning_table import Choice, Entry, Key
from blockscale.testing.data import gaussian
from tests.devices import DEVICES

BACKENDS = ["auto", "reference", "dequantized", "triton", "cuda", "cublas"]
CPU_BACKENDS = ["auto", "reference", "dequantized"]
ON_GPU = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """Pretend that the machine has a Hopper GPU; called with choices, it makes them the user's table.

    The operators of every backend return its name and what they were called with.
    """

    def backend(name):
        def run(*arguments, **keywords):
            return name, arguments, keywords

        ops_of = ("fp8_gemm_nt",) if name == "cublas" else tuning_table.OPERATORS
        return types.SimpleNamespace(**dict.fromkeys(ops_of, run))

    modules = {gemm_dispatch._MODULES[name]: backend(name) for name in tuning_table.BACKENDS}
    found = gemm_dispatch.importlib.import_module
    fake = types.SimpleNamespace(import_module=lambda name: modules.get(name) or found(name))
    monkeypatch.setattr(gemm_dispatch, "importlib", fake)
    monkeypatch.setattr(gemm_dispatch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(tuning_table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (gemm_dispatch._load, tuning_table._choices)
    for cache in caches:
        cache.cache_clear()

    def write(choices):
        table = {key: Entry(choice, 1.0, 2.0, "2026-11-22", "") for key, choice in choices.items()}
        tuning_table.write_table(tuning_table.table_file("Test GPU"), "Test GPU", table)

    yield write
    for cache in caches:
        cache.cache_clear()


def _operands(m=130, n=336, k=576, device="cpu", layout="column"):
    a, a_scale = ops.quantize_activation(gaussian((m, k)).to(device), scale_layout=layout)
    b, b_scale = ops.quantize_weight(gaussian((n, k), seed=1).to(device))
    return a, a_scale, b, b_scale


def _grouped(experts=3, rows=128, n=336, k=576, device="cpu"):
    a, a_scale = ops.quantize_activation(gaussian((experts * rows, k)).to(device), scale_layout="column")
    b, b_scale = ops.quantize_weight(gaussian((experts, n, k), seed=1).to(device))
    m_indices = torch.arange(experts, dtype=torch.int32, device=device).repeat_interleave(rows)
    return a, a_scale, b, b_scale, m_indices


def _masked(experts=3, m_max=48, n=336, k=576, device="cpu"):
    codes, scales = zip(
        *(ops.quantize_activation(gaussian((m_max, k), seed=e).to(device)) for e in range(experts)),
        strict=True,
    )
    b, b_scale = ops.quantize_weight(gaussian((experts, n, k), seed=1).to(device))
    masked_m = torch.tensor([5, 0, m_max], dtype=torch.int32, device=device)
    return torch.stack(codes), torch.stack(scales), b, b_scale, masked_m


def _cases(device):
    """Every backend that has the dense product on this device."""
    return CPU_BACKENDS if device == "cpu" else [name for name in BACKENDS if name != "cublas"]


@pytest.mark.parametrize("m", [0, 1, 7, 64, 130])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_every_backend_gives_the_product(device, out_dtype, m):
    operands = _operands(m, device=device)
    bias = gaussian((336,), seed=2).to(device)
    exact = reference.fp8_gemm_nt(*operands, bias=bias, out_dtype=torch.float32)
    for backend in _cases(device):
        out = torch.full((m, 336), torch.nan, dtype=out_dtype, device=device)
        got = ops.fp8_gemm_nt(*operands, bias=bias, out_dtype=out_dtype, out=out, backend=backend)
        assert got is out
        assert calc_diff(out, exact) < 1e-5, backend


@pytest.mark.parametrize("device", DEVICES)
def test_every_backend_takes_scales_of_any_strides(device):
    a, a_scale, b, b_scale = _operands(33, device=device, layout="row")
    exact = reference.fp8_gemm_nt(a, a_scale, b, b_scale, out_dtype=torch.float32)
    for backend in _cases(device):
        for scale in (a_scale, a_scale.t().contiguous().t(), a_scale.repeat(1, 2)[:, : a_scale.shape[1]]):
            assert calc_diff(ops.fp8_gemm_nt(a, scale, b, b_scale, backend=backend), exact) < 1e-5, backend


@pytest.mark.parametrize("device", DEVICES)
def test_every_backend_gives_the_grouped_products(device):
    contiguous, masked = _grouped(device=device), _masked(device=device)
    exact = reference.m_grouped_fp8_gemm_nt_contiguous(*contiguous)
    exact_masked = reference.m_grouped_fp8_gemm_nt_masked(*masked, 8)
    row = torch.arange(48, device=device)
    counted = row[None, :] < masked[-1][:, None]
    for backend in _cases(device):
        got = ops.m_grouped_fp8_gemm_nt_contiguous(*contiguous, backend=backend)
        assert calc_diff(got, exact) < 1e-5, backend
        out = torch.full((3, 48, 336), torch.nan, dtype=torch.bfloat16, device=device)
        ops.m_grouped_fp8_gemm_nt_masked(*masked, 8, out=out, backend=backend)
        assert calc_diff(out[counted], exact_masked[counted]) < 1e-5, backend
        assert bool(out[~counted].isnan().all()), "rows that do not count are not written"


@ON_GPU
def test_cublas_gives_the_product_where_it_has_a_kernel():
    operands = _operands(64, 384, 512, "cuda")
    exact = reference.fp8_gemm_nt(*operands, out_dtype=torch.float32)
    assert calc_diff(ops.fp8_gemm_nt(*operands, backend="cublas"), exact) < 1e-5
    with pytest.raises(BlockscaleError, match="cuBLASLt has no kernel for this size"):
        ops.fp8_gemm_nt(*_operands(1, 384, 512, "cuda"), backend="cublas")


@ON_GPU
@pytest.mark.parametrize("m", [4, 300])
def test_products_run_in_cuda_graphs(m):
    operands, masked = _operands(m, device="cuda"), _masked(device="cuda")
    eager = ops.fp8_gemm_nt(*operands)
    out, out_masked = torch.empty_like(eager), torch.zeros(3, 48, 336, dtype=torch.bfloat16, device="cuda")
    ops.m_grouped_fp8_gemm_nt_masked(*masked, 8, out=out_masked)
    eager_masked = out_masked.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.fp8_gemm_nt(*operands, out=out)
        ops.m_grouped_fp8_gemm_nt_masked(*masked, 8, out=out_masked)
    out.zero_(), out_masked.zero_()
    graph.replay()
    assert torch.equal(out, eager)
    assert torch.equal(out_masked, eager_masked)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_pass_opcheck(device):
    # All but the schema test, which multiplies its arguments: PyTorch has no product of two FP8 tensors.
    # Rows of the masked product that do not count are uninitialized: its values cannot be compared.
    static = ("test_autograd_registration", "test_faketensor")
    everything = (*static, "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    found, operands = torch.ops.blockscale, _operands(16, device=device)
    library.opcheck(found.fp8_gemm_nt, (*operands, None, torch.bfloat16, "auto"), test_utils=everything)
    contiguous = (*_grouped(device=device), "auto")
    library.opcheck(found.m_grouped_fp8_gemm_nt_contiguous, contiguous, test_utils=everything)
    masked = (*_masked(device=device), 8, "auto")
    library.opcheck(found.m_grouped_fp8_gemm_nt_masked, masked, test_utils=static)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_sees_no_graph_break(device):
    operands = _operands(16, device=device)

    def product(*tensors):
        return ops.fp8_gemm_nt(*tensors) * 2

    compiled = torch.compile(product, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*operands), product(*operands))


def test_what_cannot_run_here_says_so():
    operands = _operands(4)
    with pytest.raises(BlockscaleError, match=r"unknown backend \(expected auto .*, got 'fast'\)"):
        ops.fp8_gemm_nt(*operands, backend="fast")
    for backend in ("cuda", "cublas"):
        with pytest.raises(BlockscaleError, match=f"backend {backend} is not available .*got a cpu tensor"):
            ops.fp8_gemm_nt(*operands, backend=backend)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), "dequantized"),
        ((8, 0), "dequantized"),
        ((8, 9), "triton"),
        ((9, 0), "cuda"),
        ((10, 0), "triton"),
    ],
)
def test_the_choice_by_device(capability, expected, monkeypatch, caplog):
    monkeypatch.setattr(gemm_dispatch, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {capability}")
    for _ in range(2):
        assert gemm_dispatch._candidates(torch.device("cuda"))[0] == expected
    told = [record for record in caplog.records if "has no FP8 arithmetic" in record.message]
    assert len(told) == (capability < (8, 9)), "said once"


def test_a_backend_that_cannot_be_loaded_is_passed_over(monkeypatch, caplog):
    monkeypatch.setitem(gemm_dispatch._MODULES, "cuda", "no_such_package.kernels")
    monkeypatch.setattr(gemm_dispatch, "_candidates", lambda *_: ("cuda", "dequantized"))
    gemm_dispatch._load.cache_clear()
    try:
        operands = _operands(4)
        found = ops.fp8_gemm_nt(*operands)
    finally:
        gemm_dispatch._load.cache_clear()
    assert torch.equal(found, ops.fp8_gemm_nt(*operands, backend="dequantized"))
    assert sum("backend cuda cannot be loaded" in record.message for record in caplog.records) == 1


def test_auto_takes_what_the_table_says_with_its_tile(hopper):
    hopper({Key("fp8_gemm_nt", 4096, 7168, 16): Choice("cuda", FewTile(16, splits=8))})
    run = gemm_dispatch.implementation("fp8_gemm_nt", GPU, (9, 4096, 7168), "auto")
    assert run("a") == ("cuda", ("a",), {"tile": FewTile(16, splits=8)})


def test_sizes_no_table_knows_get_the_heuristics_and_nothing_is_measured(hopper, monkeypatch):
    def refuse(*_):
        raise AssertionError("measured at call time")

    for name in ("Event", "CUDAGraph", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    hopper({Key("fp8_gemm_nt", 4096, 7168, 16): Choice("triton")})
    for m, n, expected in ((9, 4096, "triton"), (17, 4096, "cuda"), (9, 4112, "cuda"), (4096, 4096, "cuda")):
        run = gemm_dispatch.implementation("fp8_gemm_nt", GPU, (m, n, 7168), "auto")
        assert run() == (expected, (), {})


def test_a_backend_asked_for_goes_before_the_table(hopper):
    hopper({Key("fp8_gemm_nt", 4096, 7168, 16): Choice("triton")})
    assert gemm_dispatch.implementation("fp8_gemm_nt", GPU, (9, 4096, 7168), "cuda")() == ("cuda", (), {})


def test_a_choice_that_cannot_be_loaded_leaves_it_to_the_heuristics(hopper, monkeypatch, caplog):
    monkeypatch.setitem(gemm_dispatch._MODULES, "cublas", "no_such_package.kernels")
    hopper({Key("fp8_gemm_nt", 4096, 7168, 4096): Choice("cublas")})
    for _ in range(2):
        assert gemm_dispatch.implementation("fp8_gemm_nt", GPU, (4096, 4096, 7168), "auto")()[0] == "cuda"
    assert sum("backend cublas cannot be loaded" in record.message for record in caplog.records) == 1


def test_what_is_available_runs_here(hopper):
    hopper({})
    assert gemm_dispatch.available("fp8_gemm_nt", GPU, ("cuda", "cublas")) == ("cuda", "cublas")
    assert gemm_dispatch.available("m_grouped_fp8_gemm_nt_masked", GPU, ("cuda", "cublas")) == ("cuda",)
    assert gemm_dispatch.available("fp8_gemm_nt", torch.device("cpu"), ("cuda", "dequantized")) == (
        "dequantized",
    )
