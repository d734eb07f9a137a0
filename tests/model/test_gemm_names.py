"""Names of a model's products."""

from blockscale.model.gemm_names import gemm_names
from blockscale.model.load import load_model
from tests.model import models


def test_every_linear_layer_has_a_name_of_its_own(tmp_path):
    models.make(tmp_path)
    names = sorted(gemm_names(load_model(tmp_path, device="cpu")).values())
    assert len(names) == len(set(names))
    assert "head" in names
    assert [name for name in names if name.startswith("layers.1.")] == [
        *(f"layers.1.attention.{part}" for part in ("into", "kv_b", "o", "q_b")),
        *(f"layers.1.mlp.{part}" for part in ("down", "gate_up")),
    ]
