"""The audit of GEMMs: a fault that is planted is found where it is, and blamed on what caused it."""

import math
from dataclasses import replace

import pytest
import torch

from blockscale import metrics, ops, reference
from blockscale.errors import BlockscaleError
from blockscale.ops import audit_gemms, gemm_audit, gemm_audit_figures, gemm_dispatch
from tests.ops.audit_cases import K, M, N, activations, plant, weight

# float32 against float32 in another order of summation.
EXACT = 1e-6


@pytest.fixture(params=["float32", "ue8m0"])
def scale_fmt(request):
    return request.param


def test_a_sound_product_has_no_accumulation_error_and_the_quantization_error_of_its_operands(scale_fmt):
    x, (original, b, b_scale) = activations(M, K), weight(N, K, scale_fmt=scale_fmt)
    with audit_gemms(weights={b: original}) as audit:
        a, a_scale = ops.quantize_activation(x, scale_fmt=scale_fmt)
        ops.fp8_gemm_nt(a, a_scale, b, b_scale)
    (record,) = audit.records
    assert record.accumulation.calc_diff < 1e-12
    assert record.accumulation.peak.relative_error < EXACT
    wide_a = reference.dequantize_activation(a, a_scale, dtype=torch.float32)
    wide_b = reference.dequantize_weight(b, b_scale, dtype=torch.float32)
    both, half, exact = wide_a @ wide_b.T, x.float() @ wide_b.T, x.float() @ original.float().T
    for part, got, truth in (
        (record.activations, both, half),
        (record.weight, half, exact),
        (record.quantization, both, exact),
    ):
        assert part.calc_diff == pytest.approx(metrics.calc_diff(got, truth), rel=1e-4)
        size = torch.outer((wide_a if truth is both else x.float()).norm(dim=1), original.float().norm(dim=1))
        at = part.peak.position
        assert part.peak.got == pytest.approx(float(got[at]), rel=1e-5)
        assert part.peak.expected == pytest.approx(float(truth[at]), rel=1e-5)
        error = abs(part.peak.got - part.peak.expected) / float(size[at]) * math.sqrt(K)
        assert part.peak.relative_error == pytest.approx(error, rel=0.05)
    assert record.quantization.calc_diff > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bias_and_rounding_of_the_result_are_no_error(dtype):
    bias = 50 * torch.randn(N, generator=torch.Generator().manual_seed(5))
    _, b, b_scale = weight(N, K)
    with audit_gemms() as audit:
        a = ops.quantize_activation(activations(M, K))
        ops.fp8_gemm_nt(*a, b, b_scale, bias=bias, out_dtype=dtype)
    assert audit.records[0].accumulation.calc_diff < 1e-12
    assert audit.records[0].accumulation.peak.relative_error < EXACT


def test_a_fault_of_accumulation_is_found_at_its_place_and_not_blamed_on_quantization(monkeypatch):
    x, (original, b, b_scale) = activations(M, K), weight(N, K)

    def audited():
        with audit_gemms(weights={b: original}) as audit:
            return ops.fp8_gemm_nt(*ops.quantize_activation(x), b, b_scale), audit.records[0]

    out, sound = audited()
    value = float(out[4, 130].float()) + 0.25
    plant(monkeypatch, (4, 130), value)
    _, record = audited()
    peak = record.accumulation.peak
    assert (peak.position, peak.call) == ((4, 130), 1)
    assert peak.expected == pytest.approx(float(out[4, 130]), rel=2**-8)
    assert peak.got == pytest.approx(value, rel=2**-8)
    assert record.accumulation.calc_diff > 1e6 * sound.accumulation.calc_diff
    same = replace(record, accumulation=sound.accumulation)
    assert same == sound


def test_a_result_in_pieces_has_the_figures_of_the_whole(monkeypatch):
    x, (original, b, b_scale) = activations(M, K), weight(N, K)
    plant(monkeypatch, (4, 130), 9.0)
    found = []
    for values in (1 << 24, 1):
        monkeypatch.setattr(gemm_audit_figures, "_PIECE", values)
        with audit_gemms(weights={b: original}) as audit, audit.site("here"):
            ops.fp8_gemm_nt(*ops.quantize_activation(x), b, b_scale)
        found.append(audit.records[0])
    whole, pieces = found
    assert pieces.codes == whole.codes
    for name in ("accumulation", "activations", "weight", "quantization"):
        one, other = getattr(pieces, name), getattr(whole, name)
        assert one.calc_diff == pytest.approx(other.calc_diff, rel=1e-4)
        assert one.peak.position == other.peak.position


def test_accumulation_in_fewer_bits_shows_below_the_rounding_of_the_result(monkeypatch):
    _, b, b_scale = weight(N, 4096)

    def coarse(*operands, bias, out_dtype, out):
        fraction, exponent = torch.frexp(reference.fp8_gemm_nt(*operands, out_dtype=torch.float32))
        return out.copy_(torch.ldexp((fraction * 2**13).floor() / 2**13, exponent))

    def audited():
        with audit_gemms() as audit:
            ops.fp8_gemm_nt(*ops.quantize_activation(activations(32, 4096)), b, b_scale)
        return audit.records[0].accumulation.calc_diff

    sound = audited()
    monkeypatch.setattr(gemm_dispatch, "implementation", lambda *args: coarse)
    assert audited() > max(1e-11, 1000 * sound)


def test_a_clipped_activation_is_an_error_of_quantization_alone():
    x, (_, b, b_scale) = activations(M, K), weight(N, K)
    x[2, 7] = 300.0
    with audit_gemms() as audit:
        a, a_scale = ops.quantize_activation(x)
        with audit.site("sound"):
            ops.fp8_gemm_nt(a, a_scale, b, b_scale)
        a_scale = a_scale.clone()
        a_scale[2, 0] /= 8
        codes = reference.quantize_activation(x)[0]
        codes[2, :128] = (x[2, :128].float() / a_scale[2, 0]).clamp(-448, 448).to(codes.dtype)
        gemm_audit.current.remember(codes, x)
        with audit.site("clipped"):
            ops.fp8_gemm_nt(codes, a_scale, b, b_scale)
    sound, clipped = audit.records
    assert sound.codes.clipped == 0
    assert clipped.codes.clipped == 1
    assert clipped.codes.amax == 300.0
    assert clipped.accumulation.peak.relative_error < EXACT
    assert clipped.activations.calc_diff > 100 * sound.activations.calc_diff
    assert clipped.activations.peak.position[0] == 2


def test_a_wrong_scale_is_an_error_of_quantization_alone(scale_fmt):
    x, (original, b, b_scale) = activations(M, K), weight(N, K, scale_fmt=scale_fmt)
    with audit_gemms(weights=lambda codes: original) as audit:
        a, a_scale = ops.quantize_activation(x, scale_fmt=scale_fmt, scale_layout="column")
        a_scale[3] *= 2
        ops.fp8_gemm_nt(a, a_scale, b, b_scale)
        b_scale[1, 0] *= 2
        with audit.site("weight"):
            ops.fp8_gemm_nt(*ops.quantize_activation(x, scale_fmt=scale_fmt), b, b_scale)
    first, second = audit.records
    for record in audit.records:
        assert record.accumulation.peak.relative_error < EXACT
        assert record.quantization.calc_diff > 0.01
    assert first.activations.peak.position[0] == 3
    assert first.weight.calc_diff < 1e-3
    assert second.weight.peak.position[1] >= 128
    assert second.activations.calc_diff < 1e-3


def test_codes_are_counted():
    x, (_, b, b_scale) = torch.zeros(M, K), weight(N, K)
    x[:, ::128] = 100.0
    x[0, 1] = 1e-6
    x[1, 1] = math.inf
    with audit_gemms() as audit:
        ops.fp8_gemm_nt(*ops.quantize_activation(x), b, b_scale)
    codes, deviation = audit.records[0].codes, audit.records[0].accumulation
    assert codes.values == codes.known == M * K
    assert (codes.nonfinite, codes.bad_scales, codes.flushed, codes.clipped) == (
        1,
        1,
        2,
        0,
    )  # an Inf takes its group along
    assert codes.saturated == 3 * M - 1
    assert codes.nan > 0
    assert codes.amax == 100.0
    assert deviation.nonfinite == 0
    assert deviation.peak.relative_error < EXACT


def contiguous_call(room):
    """Rows of experts 0 and 2, with padding that holds NaN in codes and results."""
    x, (_, b, b_scale) = activations(256, K), weight(3, N, K)
    m_indices = torch.full((256,), -1, dtype=torch.int32)
    m_indices[:5], m_indices[128 : 128 + room] = 0, 2
    a, a_scale = ops.quantize_activation(x)
    a.view(torch.uint8)[m_indices < 0] = 0x7F
    gemm_audit.current.remember(a, x)
    out = torch.full((256, N), torch.nan, dtype=torch.bfloat16)
    return (a, a_scale, b, b_scale, m_indices), out


def test_padding_of_contiguous_rows_is_ignored(monkeypatch):
    with audit_gemms() as audit, audit.site("experts"):
        operands, out = contiguous_call(9)
        ops.m_grouped_fp8_gemm_nt_contiguous(*operands, out=out)
        plant(monkeypatch, (130, 17), 9.0)
        plant(monkeypatch, (200, 1), math.nan)
        ops.m_grouped_fp8_gemm_nt_contiguous(*operands, out=out)
    (record,) = audit.records
    assert (record.experts, record.n, record.k) == (3, N, K)
    assert (record.calls, record.rows, record.most_rows) == (2, 28, 14)
    assert record.accumulation.nonfinite == record.codes.nan == 0
    assert (record.accumulation.peak.position, record.accumulation.peak.call) == ((130, 17), 2)
    assert record.accumulation.calc_diff_call == 2
    assert record.accumulation.mean_calc_diff == pytest.approx(record.accumulation.calc_diff / 2)
    assert 1e-4 < record.activations.calc_diff < 1e-3


def test_rows_beyond_those_of_masked_experts_are_ignored(monkeypatch):
    x, (original, b, b_scale) = activations(3, 8, K), weight(3, N, K)
    masked_m = torch.tensor([2, 0, 8], dtype=torch.int32)
    plant(monkeypatch, (2, 5, 3), 9.0)
    plant(monkeypatch, (0, 2, 3), 99.0)
    with audit_gemms(weights={b: original}) as audit:
        a, a_scale = ops.quantize_activation(x)
        ops.m_grouped_fp8_gemm_nt_masked(a, a_scale, b, b_scale, masked_m, 4)
        masked_m.zero_()
        ops.m_grouped_fp8_gemm_nt_masked(a, a_scale, b, b_scale, masked_m, 4)
    (record,) = audit.records
    assert (record.calls, record.rows, record.codes.values) == (1, 10, 10 * K)
    assert record.accumulation.peak.position == (2, 5, 3)
    assert 1e-4 < record.quantization.calc_diff < 3e-3


def test_nothing_is_recorded_outside_nor_by_an_outer_audit():
    _, b, b_scale = weight(N, K)
    a = ops.quantize_activation(activations(M, K))
    with audit_gemms() as outer:
        with audit_gemms() as inner:
            ops.fp8_gemm_nt(*a, b, b_scale)
        with pytest.raises(BlockscaleError), audit_gemms():
            ops.fp8_gemm_nt(*a, b[:, :128], b_scale)
        assert gemm_audit.current is outer
    ops.fp8_gemm_nt(*a, b, b_scale)
    assert not ops.is_auditing()
    assert outer.records == ()
    assert [record.calls for record in inner.records] == [1]


def test_compiled_code_is_audited_without_original_activations():
    _, b, b_scale = weight(N, K)
    compiled = torch.compile(ops.fp8_gemm_nt, fullgraph=True, backend="eager")
    a = reference.quantize_activation(activations(M, K))
    with audit_gemms() as audit:
        compiled(*a, b, b_scale)
    (record,) = audit.records
    assert (record.calls, record.activations) == (1, None)
    assert record.site.startswith("ops/test_gemm_audit.py:")


@pytest.mark.gpu
def test_capture_of_a_cuda_graph_is_refused():
    x, (_, b, b_scale) = activations(M, K).cuda(), weight(N, K)
    with (
        audit_gemms(),
        pytest.raises(BlockscaleError, match="while a CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.fp8_gemm_nt(*ops.quantize_activation(x), b.cuda(), b_scale.cuda())
