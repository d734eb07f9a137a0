"""W4A8 products as the package offers them: audited as FP8 ones are, and traced by torch.compile."""

import pytest
import torch
from torch import library

from blockscale import metrics, ops, reference
from blockscale.errors import BlockscaleError
from blockscale.group_formats import MXFP4, GroupInt
from blockscale.ops import GemmLimits, _dequantized_w4a8, audit_gemms, gemm_audit_figures
from blockscale.testing import data
from blockscale.testing.asserts import assert_bitwise_equal
from tests.ops.audit_cases import activations

N, K, M = 144, 320, 6  # ragged tiles and groups
EXACT = 1e-6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weight(*shape, fmt=None, device="cpu"):
    """An original weight and what the products read."""
    fmt, original = fmt or GroupInt(4, 128), data.gaussian(shape, seed=1).to(device)
    return original, ops.prepare_w4(*ops.quantize_group(original, fmt), fmt, shape[-1])


def contiguous(device="cpu"):
    """Rows of experts 0 and 2, with padding; operands and the original weight."""
    original, b = weight(3, N, K, device=device)
    m_indices = torch.full((256,), -1, dtype=torch.int32, device=device)
    m_indices[:5], m_indices[128:137] = 0, 2
    return (*ops.quantize_activation(activations(256, K).to(device)), b, m_indices), original


def masked(device="cpu"):
    original, b = weight(3, N, K, device=device)
    masked_m = torch.tensor([2, 0, 8], dtype=torch.int32, device=device)
    return (*ops.quantize_activation(activations(3, 8, K).to(device)), b, masked_m, 4), original


def parts(operands):
    """Arguments of the operator: a weight in its parts."""
    return [
        part
        for each in operands
        for part in ((each.words, each.scale, each.kind) if isinstance(each, reference.W4Weight) else (each,))
    ]


def plant(monkeypatch, name, position, value):
    """Make what computes a product write `value` at `position`."""
    real = getattr(_dequantized_w4a8, name)

    def fault(*operands):
        real(*operands)
        operands[-1][position] = value

    monkeypatch.setattr(_dequantized_w4a8, name, fault)


@pytest.mark.parametrize("fmt", [GroupInt(4, 128), MXFP4()], ids=["int4", "mxfp4"])
def test_a_sound_product_has_the_quantization_error_of_its_operands_alone(fmt):
    x, (original, b) = activations(M, K), weight(N, K, fmt=fmt)
    bias = 50 * torch.randn(N, generator=torch.Generator().manual_seed(5))
    with audit_gemms(weights={b.words: original}, names={b.words: "down"}) as audit:
        a, a_scale = ops.quantize_activation(x)
        ops.w4a8_gemm_nt(a, a_scale, b, bias=bias)
    (record,) = audit.records
    assert (record.site, record.op, record.n, record.k) == ("down", "w4a8_gemm_nt", N, K)
    assert record.accumulation.peak.relative_error < EXACT
    wide_a = reference.dequantize_activation(a, a_scale, dtype=torch.float32)
    wide_b = reference.dequantize_w4(b)
    both, half, exact = wide_a @ wide_b.T, x.float() @ wide_b.T, x.float() @ original.float().T
    for part, got, truth in (
        (record.activations, both, half),
        (record.weight, half, exact),
        (record.quantization, both, exact),
    ):
        assert part.calc_diff == pytest.approx(metrics.calc_diff(got, truth), rel=1e-4)
    assert record.weight.calc_diff > 1e-3 > record.activations.calc_diff


def test_a_fault_among_contiguous_rows_is_found_and_padding_ignored(monkeypatch):
    name = "m_grouped_w4a8_gemm_nt_contiguous"
    with audit_gemms() as audit, audit.site("experts"):
        operands, _ = contiguous()
        out = torch.full((256, N), torch.nan, dtype=torch.bfloat16)
        ops.m_grouped_w4a8_gemm_nt_contiguous(*operands, out=out)
        plant(monkeypatch, name, (130, 139), 9.0)
        ops.m_grouped_w4a8_gemm_nt_contiguous(*operands, out=out)
    (record,) = audit.records
    assert (record.op, record.experts, record.n, record.k) == (name, 3, N, K)
    assert (record.calls, record.rows, record.most_rows) == (2, 28, 14)
    assert (record.accumulation.peak.position, record.accumulation.peak.call) == ((130, 139), 2)
    assert record.accumulation.nonfinite == 0


def test_a_fault_among_masked_rows_is_beyond_limits(monkeypatch):
    operands, original = masked()
    name = "m_grouped_w4a8_gemm_nt_masked"
    with audit_gemms(weights={operands[2].words: original}, limits=GemmLimits(calc_diff=1e-5)) as audit:
        ops.m_grouped_w4a8_gemm_nt_masked(*operands)
    assert (audit.records[0].rows, audit.records[0].op) == (10, name)
    assert audit.records[0].accumulation.peak.relative_error < EXACT
    assert 1e-3 < audit.records[0].weight.calc_diff < 0.05
    plant(monkeypatch, name, (2, 5, 3), 9.0)
    with (
        pytest.raises(BlockscaleError, match=rf"{name}, experts, N {N}.*worst at \[2, 5, 3\].*got 9"),
        audit_gemms(limits=GemmLimits(calc_diff=1e-5)) as audit,
        audit.site("experts"),
    ):
        ops.m_grouped_w4a8_gemm_nt_masked(*operands)


def test_a_weight_in_pieces_has_the_figures_of_the_whole(monkeypatch):
    operands, original = masked()
    found = []
    for values in (1 << 24, 1):
        monkeypatch.setattr(gemm_audit_figures, "_PIECE", values)
        with audit_gemms(weights={operands[2].words: original}) as audit, audit.site("here"):
            ops.m_grouped_w4a8_gemm_nt_masked(*operands)
        found.append(audit.records[0])
    whole, pieces = found
    assert pieces.accumulation.peak.relative_error < EXACT
    assert pieces.weight.calc_diff == pytest.approx(whole.weight.calc_diff, rel=1e-4)
    assert pieces.weight.peak.position == whole.weight.peak.position


def test_the_summary_tells_them_from_fp8():
    with audit_gemms() as audit:
        for site, run, operands in (
            ("a", ops.w4a8_gemm_nt, (*ops.quantize_activation(activations(M, K)), weight(N, K)[1])),
            ("b", ops.m_grouped_w4a8_gemm_nt_contiguous, contiguous()[0]),
            ("c", ops.m_grouped_w4a8_gemm_nt_masked, masked()[0]),
        ):
            with audit.site(site):
                run(*operands)
    lines = [line.split()[1:3] for line in audit.summary().splitlines()[1:]]
    sizes = f"{N}x{K}", f"3x{N}x{K}", f"3x{N}x{K}"
    assert lines == [
        [f"w4-{op}", size] for op, size in zip(("dense", "contiguous", "masked"), sizes, strict=True)
    ]


def test_an_original_of_another_shape_is_refused():
    original, b = weight(N, K)
    with (
        pytest.raises(BlockscaleError, match="original of the weight"),
        audit_gemms(weights={b.words: original.T}),
    ):
        ops.w4a8_gemm_nt(*ops.quantize_activation(activations(M, K)), b)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_pass_opcheck(device):
    # As for FP8: no schema test, and values of masked rows that do not count cannot be compared.
    static = ("test_autograd_registration", "test_faketensor")
    everything = (*static, "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    found = torch.ops.blockscale
    dense = *ops.quantize_activation(activations(M, K).to(device)), weight(N, K, device=device)[1]
    library.opcheck(found.w4a8_gemm_nt, (*parts(dense), None, torch.bfloat16, "auto"), test_utils=everything)
    rows, scale, b, m_indices = contiguous(device)[0]
    m_indices[:128], m_indices[128:] = 0, 2  # values of padding are undefined
    grouped = (*parts((rows, scale, b, m_indices)), "auto")
    library.opcheck(found.m_grouped_w4a8_gemm_nt_contiguous, grouped, test_utils=everything)
    library.opcheck(
        found.m_grouped_w4a8_gemm_nt_masked, (*parts(masked(device)[0]), "auto"), test_utils=static
    )


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_sees_no_graph_break(device):
    dense = *ops.quantize_activation(activations(M, K).to(device)), weight(N, K, device=device)[1]
    for name, operands, rows in (
        ("w4a8_gemm_nt", dense, slice(None)),
        ("m_grouped_w4a8_gemm_nt_contiguous", contiguous(device)[0], slice(128, 137)),
        ("m_grouped_w4a8_gemm_nt_masked", masked(device)[0], 2),
    ):
        product = getattr(ops, name)
        compiled = torch.compile(lambda *all, run=product: run(*all) * 2, fullgraph=True, backend="eager")
        assert_bitwise_equal(compiled(*operands)[rows], (product(*operands) * 2)[rows])


def test_another_width_is_refused_under_torch_compile_too():
    a, a_scale = ops.quantize_activation(activations(M, K - 16))
    _, b = weight(N, K)
    compiled = torch.compile(lambda a, a_scale: ops.w4a8_gemm_nt(a, a_scale, b), backend="eager")
    with pytest.raises(BlockscaleError, match="w4a8_gemm_nt"):
        compiled(a, a_scale)


def test_compiled_code_is_audited_without_original_activations():
    original, b = weight(N, K)
    compiled = torch.compile(ops.w4a8_gemm_nt, fullgraph=True, backend="eager")
    a = reference.quantize_activation(activations(M, K))
    with audit_gemms(weights={b.words: original}) as audit:
        compiled(*a, b)
    (record,) = audit.records
    assert (record.calls, record.activations) == (1, None)
    assert record.weight.calc_diff > 1e-3
    assert record.site.startswith("ops/test_w4a8.py:")
