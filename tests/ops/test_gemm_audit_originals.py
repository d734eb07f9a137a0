"""Originals of activations: found by the codes that were made of them, by no others, and freed with them."""

import gc

import pytest
import torch

from blockscale import ops, reference
from blockscale.ops import audit_gemms, gemm_audit
from blockscale.ops.gemm_audit_originals import Originals
from tests.ops.audit_cases import K, M, N, activations, weight


def test_codes_of_fused_ops_are_known():
    _, b, b_scale = weight(N, K)
    norm, x = torch.rand(K).bfloat16(), activations(M, 2 * K)
    with audit_gemms() as audit:
        for name, codes in (
            ("silu", ops.silu_mul_quantize(x, scale_layout="column")),
            ("norm", ops.rms_norm_quantize(x[:, :K], norm)),
            ("normed", ops.rms_norm(x[:, :K], norm, scale_fmt="float32", residual=x[:, K:], plain=False)[2:]),
        ):
            with audit.site(name):
                ops.fp8_gemm_nt(*codes, b, b_scale)
    assert [record.site for record in audit.records] == ["silu", "norm", "normed"]
    assert all(1e-5 < record.activations.calc_diff < 1e-3 for record in audit.records)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs kernels in Triton's interpreter")
def test_originals_of_fused_kernels_are_what_the_unfused_way_makes():
    pytest.importorskip("triton")
    norm, x = torch.rand(256).bfloat16(), activations(4, 512)
    with audit_gemms() as audit:
        for codes, truth in (
            (ops.silu_mul_quantize(x, backend="triton")[0], ops.silu_mul(x)),
            (
                ops.rms_norm_quantize(x[:, :256], norm, residual=x[:, 256:], backend="triton")[0],
                ops.rms_norm(x[:, :256], norm, residual=x[:, 256:]).y,
            ),
        ):
            assert torch.equal(audit._originals.find(codes), truth)


def test_views_of_codes_are_known_copies_and_overwritten_codes_are_not():
    known, x = Originals(), activations(12, K)
    codes = ops.quantize_activation(x)[0]
    known.put(codes, x)
    assert torch.equal(known.find(codes.unflatten(0, (3, 4))), x)
    assert torch.equal(known.find(codes[4:9]), x[4:9])
    for other in (codes.clone(), codes[:, :128], codes.view(24, -1), codes[::2], codes[:0]):
        assert known.find(other) is None
    alike = ops.quantize_activation(torch.ones(2, K))[0]
    known.put(alike, torch.ones(2, K))
    assert known.find(alike.view(-1)[16 : 16 + K].view(1, K)) is None
    codes.view(torch.uint8)[5, 3] ^= 1
    assert known.find(codes) is None
    assert torch.equal(known.find(codes[:5]), x[:5])


def test_what_was_quantized_is_remembered_as_it_was_and_replaced_by_what_comes_after():
    known, x = Originals(), activations(4, K)
    before = x.clone()
    out = reference.quantize_activation(x)
    known.put(out[0], x)
    x.zero_()
    assert torch.equal(known.find(out[0]), before)
    y = activations(4, K, seed=9)
    ops.quantize_activation(y, out=out)
    assert known.find(out[0]) is None
    known.put(out[0], y)
    assert torch.equal(known.find(out[0]), y)
    assert len(known) == 1


def test_memory_of_codes_that_are_gone_is_freed():
    known = Originals()
    codes = ops.quantize_activation(activations(4, K))[0]
    known.put(codes, activations(4, K))
    view = codes.unflatten(0, (2, 2))
    del codes
    gc.collect()
    assert len(known) == 1
    assert known.find(view) is not None
    del view
    gc.collect()
    assert len(known) == 0
    with audit_gemms() as audit:
        kept = ops.quantize_activation(activations(4, K))
    assert kept[0].shape == (4, K)
    assert len(audit._originals) == 0


@pytest.mark.parametrize("permute", [ops.moe_permute, ops.moe_permute_masked])
def test_rows_that_were_moved_are_known_once_that_is_told(permute):
    x = activations(5, K)
    experts = torch.tensor([[0, 2], [2, 1], [-1, 2], [0, 1], [1, 2]], dtype=torch.int32)
    with audit_gemms() as audit:
        codes, scale = ops.quantize_activation(x)
        moved = permute(codes, experts, 3, scale)
        gemm_audit.current.remember_moved(codes, moved.rows, moved.positions)
        original = audit._originals.find(moved.rows)
        gemm_audit.current.remember_moved(x, moved.rows, moved.positions)
    for token, slots in enumerate(moved.positions.tolist()):
        for row in slots:
            assert row < 0 or torch.equal(original[row], x[token])
