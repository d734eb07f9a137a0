"""What an audit of GEMMs tells: records by call site, limits that raise, a table, JSON."""

import json
import math
from dataclasses import asdict

import pytest

from blockscale import ops, reference
from blockscale.errors import BlockscaleError
from blockscale.ops import GemmLimits, audit_gemms
from tests.ops.audit_cases import K, M, N, activations, plant, weight


def test_limits_raise_with_site_place_and_values_after_the_call_was_recorded(monkeypatch):
    x, (_, b, b_scale) = activations(M, K), weight(N, K)
    plant(monkeypatch, (1, 2), 7.0)
    for limits in (GemmLimits(calc_diff=1e-5), GemmLimits(max_relative_error=1e-3)):
        with (
            pytest.raises(
                BlockscaleError, match=r"fp8_gemm_nt, o_proj, N 144.*\[1, 2\] \(expected .*, got 7"
            ),
            audit_gemms(limits=limits, names={b: "o_proj"}) as audit,
        ):
            ops.fp8_gemm_nt(*ops.quantize_activation(x), b, b_scale)
        assert audit.records[0].calls == 1
        assert not ops.is_auditing()
    with audit_gemms(limits=GemmLimits(quantization_calc_diff=1e-3)):
        ops.fp8_gemm_nt(*ops.quantize_activation(x), b, b_scale)
    with (
        pytest.raises(BlockscaleError, match="quantization of activations: calc_diff"),
        audit_gemms(limits=GemmLimits(quantization_calc_diff=1e-6)),
    ):
        ops.fp8_gemm_nt(*ops.quantize_activation(x), b, b_scale)


def test_nan_of_a_backend_is_beyond_any_limit_and_still_json(monkeypatch):
    x, (_, b, b_scale) = activations(M, K), weight(N, K)
    plant(monkeypatch, (1, 2), math.nan)
    with (
        pytest.raises(BlockscaleError, match=r"\[1, 2\].*got NaN or Inf"),
        audit_gemms(limits=GemmLimits(max_relative_error=1e6)) as audit,
    ):
        ops.fp8_gemm_nt(*ops.quantize_activation(x), b, b_scale)
    assert audit.records[0].accumulation.nonfinite == 1
    assert audit.records[0].accumulation.peak.got is None
    json.dumps(asdict(audit.records[0]), allow_nan=False)


@pytest.mark.parametrize("limit", [-1.0, math.nan, math.inf])
def test_bad_limits_are_refused(limit):
    with pytest.raises(BlockscaleError, match="GemmLimits: calc_diff"):
        GemmLimits(calc_diff=limit)


def test_an_original_of_another_shape_is_refused():
    x, (original, b, b_scale) = activations(M, K), weight(N, K)
    with (
        pytest.raises(BlockscaleError, match="original of the weight of down"),
        audit_gemms(weights={b: original.T}, names={b: "down"}),
    ):
        ops.fp8_gemm_nt(*ops.quantize_activation(x), b, b_scale)


def test_sites_are_frames_names_or_what_weights_are_called():
    _, b, b_scale = weight(N, K)
    _, other, other_scale = weight(N, K, seed=3)
    with audit_gemms(names={other: "layers.1.up_proj"}) as audit:
        a = ops.quantize_activation(activations(M, K))
        for _ in range(3):
            ops.fp8_gemm_nt(*a, b, b_scale)
        with audit.site("layers.0"), audit.site("gate_proj"):
            ops.fp8_gemm_nt(*a, b, b_scale)
        ops.fp8_gemm_nt(*a, other.detach(), other_scale)
        with audit.site("prefill"):
            ops.fp8_gemm_nt(*a, other, other_scale)
    frame, *named = [record.site for record in audit.records]
    assert frame.startswith("ops/test_gemm_audit_records.py:")
    assert "test_sites_are" in frame
    assert named == ["layers.0.gate_proj", "layers.1.up_proj", "prefill.layers.1.up_proj"]
    assert [record.calls for record in audit.records] == [3, 1, 1, 1]


def test_calls_of_one_site_are_one_record_whatever_their_number_of_rows():
    _, b, b_scale = weight(N, K)
    _, narrow, narrow_scale = weight(16, K)
    with audit_gemms() as audit, audit.site("here"):
        for rows in (1, 5, 3, 0):
            ops.fp8_gemm_nt(*ops.quantize_activation(activations(rows, K)), b, b_scale)
        ops.fp8_gemm_nt(*ops.quantize_activation(activations(2, K)), narrow, narrow_scale)
    wide, other = audit.records
    assert (wide.calls, wide.rows, wide.most_rows) == (3, 9, 5)
    assert (other.n, other.calls) == (16, 1)


def test_summary_and_json():
    x, (original, b, b_scale) = activations(M, K), weight(N, K)
    with audit_gemms(weights={b: original}) as audit:
        for name, codes in (
            ("known", ops.quantize_activation(x)),
            ("copied", reference.quantize_activation(x)),
        ):
            with audit.site(name):
                ops.fp8_gemm_nt(*codes, b, b_scale)
    heading, *lines = audit.summary().splitlines()
    assert heading.startswith("site")
    known, copied = (line.split() for line in lines)
    assert known[:5] == ["known", "dense", f"{N}x{K}", "1", str(M)]
    assert (known.count("-"), copied.count("-")) == (0, 4)
    assert audit.records[1].activations is audit.records[1].quantization is None
    for record in audit.records:
        again = json.loads(json.dumps(asdict(record), allow_nan=False))
        assert again["accumulation"]["peak"]["position"] == list(record.accumulation.peak.position)
        assert again["codes"] == asdict(record.codes)
        assert again["weight"]["calc_diff"] == record.weight.calc_diff
