"""The converter on a GPU writes the bytes that it writes on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blockscale import BlockscaleError, Recipe, RunOptions, dequantize_checkpoint, quantize_checkpoint
from tests.data import Model, contents, deepseek_v3, write


@pytest.fixture
def model() -> Model:
    return deepseek_v3()


@pytest.mark.gpu
@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
def test_cuda_and_cpu_results_are_byte_identical(tmp_path: Path, model: Model, scale_fmt: str) -> None:
    source = write(tmp_path / "src", model)
    for device in ("cpu", "cuda"):
        run = RunOptions(device=device)
        quantize_checkpoint(source, tmp_path / f"fp8-{device}", Recipe(scale_fmt), run=run)
        dequantize_checkpoint(tmp_path / "fp8-cpu", tmp_path / f"back-{device}", run=run)
    for kind in ("fp8", "back"):
        assert _without_manifest(tmp_path / f"{kind}-cpu") == _without_manifest(tmp_path / f"{kind}-cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path: Path, model: Model) -> None:
    source = write(tmp_path / "src", model)
    with pytest.raises(BlockscaleError, match="no CUDA device; use --device cpu"):
        quantize_checkpoint(source, tmp_path / "dst", run=RunOptions(device="cuda"))
    assert not (tmp_path / "dst").exists()


def _without_manifest(folder: Path) -> dict[str, bytes]:
    files = contents(folder)
    assert files.pop("blockscale.json")
    return files
